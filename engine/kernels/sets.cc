#include "engine/kernels/sets.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "engine/cpu_features.h"

namespace rbln_vae {
namespace {

// The best kernels come last. Where all element types multiply in float32, those of float32 are
// better: the others only save memory, and round; float16 rounds less.
const std::vector<Kernels>& table() {
  static const std::vector<Kernels> list = {
      generic::bfloat16,     generic::float16, generic::float32,
#if defined(RBLN_VAE_BUILDS_AVX2)
      avx2::bfloat16,        avx2::float16,    avx2::float32,
#endif
#if defined(RBLN_VAE_BUILDS_AVX512)
      avx512::bfloat16,      avx512::float16,  avx512::float32,
#endif
#if defined(RBLN_VAE_BUILDS_AVX512_BF16)
      avx512_bf16::bfloat16,
#endif
#if defined(RBLN_VAE_BUILDS_AMX_BF16)
      amx_bf16::bfloat16,
#endif
#if defined(RBLN_VAE_BUILDS_NEON_BF16)
      neon_bf16::bfloat16,
#endif
  };
  return list;
}

bool built(Isa isa) {
  return std::ranges::any_of(table(), [isa](const Kernels& each) { return each.isa == isa; });
}

}  // namespace

std::span<const Kernels> built_kernels() { return table(); }

std::span<const Isa> isas() {
  static constexpr Isa all[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16,
                                Isa::kAmxBf16, Isa::kNeonBf16};
  return all;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmxBf16: return "amx_bf16";
    case Isa::kNeonBf16: return "neon_bf16";
  }
  return "unknown";
}

bool supported(Isa isa) {
  const CpuFeatures& f = cpu_features();
  const bool avx512 = f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
  switch (isa) {
    case Isa::kGeneric: return true;
    case Isa::kAvx2: return f.avx2 && f.fma && f.f16c;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512 && f.avx512_bf16;
#if defined(RBLN_VAE_EMULATE_TILES)
    case Isa::kAmxBf16: return true;
#else
    case Isa::kAmxBf16: return avx512 && f.avx512_bf16 && f.amx_tile && f.amx_bf16;
#endif
    case Isa::kNeonBf16: return f.neon_bf16;
  }
  return false;
}

bool available(Isa isa) { return supported(isa) && built(isa); }

bool prepare(Isa isa) {
#if defined(RBLN_VAE_EMULATE_TILES)
  return available(isa);
#else
  return available(isa) && (isa != Isa::kAmxBf16 || request_tiles());
#endif
}

std::span<const Kernels* const> all_kernels() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> result;
    for (const Kernels& each : built_kernels()) {
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
