#include "engine/kernels/sets.h"

#include <stdexcept>
#include <vector>

#include "engine/cpu_features.h"

namespace rbln_vae {
namespace {

constexpr Kernels join(Isa isa, DType dtype, const Conv2dKernels& conv2d,
                       const AttentionKernels& attention,
                       double (*limit)(double) = nullptr) {
  return {isa,
          dtype,
          conv2d.pixels,
          conv2d.rows,
          conv2d.panels,
          conv2d.scratch,
          conv2d.run,
          conv2d.winograd_kernels,
          attention.pack,
          attention.scratch,
          attention.run,
          limit};
}

// Every set of kernels in this build, the best last. Where both element types are multiplied
// in float32, that is float32: bfloat16 saves memory there, and rounds for it.
const std::vector<Kernels>& built() {
  static const std::vector<Kernels> list = {
      join(Isa::kGeneric, DType::kBFloat16, generic::conv2d_bfloat16, generic::attention_bfloat16),
      join(Isa::kGeneric, DType::kFloat32, generic::conv2d_float32, generic::attention_float32),
#if defined(RBLN_VAE_X86_KERNELS)
      join(Isa::kAvx2, DType::kBFloat16, avx2::conv2d_bfloat16, avx2::attention_bfloat16,
           avx2::limit),
      join(Isa::kAvx2, DType::kFloat32, avx2::conv2d_float32, avx2::attention_float32,
           avx2::limit),
      join(Isa::kAvx512, DType::kBFloat16, avx512::conv2d_bfloat16, avx512::attention_bfloat16,
           avx512::limit),
      join(Isa::kAvx512, DType::kFloat32, avx512::conv2d_float32, avx512::attention_float32,
           avx512::limit),
      join(Isa::kAvx512Bf16, DType::kBFloat16, avx512_bf16::conv2d, avx512_bf16::attention,
           avx512_bf16::limit),
#endif
#if defined(RBLN_VAE_X86_KERNELS) || defined(RBLN_VAE_EMULATE_TILES)
      join(Isa::kAmxBf16, DType::kBFloat16, amx_bf16::conv2d, amx_bf16::attention, amx_bf16::limit),
#endif
  };
  return list;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmxBf16: return "amx_bf16";
  }
  return "unknown";
}

bool available(Isa isa) {
  const CpuFeatures& f = cpu_features();
  [[maybe_unused]] const bool avx512 = f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
  switch (isa) {
    case Isa::kGeneric: return true;
#if defined(RBLN_VAE_X86_KERNELS)
    case Isa::kAvx2: return f.avx2 && f.fma;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512 && f.avx512_bf16;
#endif
#if defined(RBLN_VAE_EMULATE_TILES)
    case Isa::kAmxBf16: return true;
#elif defined(RBLN_VAE_X86_KERNELS)
    case Isa::kAmxBf16: return avx512 && f.avx512_bf16 && f.amx_tile && f.amx_bf16;
#endif
    default: return false;
  }
}

bool prepare(Isa isa) {
#if defined(RBLN_VAE_EMULATE_TILES)
  (void)isa;
  return true;
#else
  return isa != Isa::kAmxBf16 || request_tiles();
#endif
}

std::span<const Kernels* const> all_kernels() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> result;
    for (const Kernels& each : built()) {
      if (available(each.isa)) result.push_back(&each);
    }
    return result;
  }();
  return list;
}

const Kernels& kernels(DType dtype, Isa most) {
  const Kernels* best = nullptr;
  for (const Kernels* each : all_kernels()) {
    if (each->dtype == dtype && each->isa <= most) best = each;
  }
  if (best == nullptr) throw std::invalid_argument("no kernels for this element type");
  return *best;
}

}  // namespace rbln_vae
