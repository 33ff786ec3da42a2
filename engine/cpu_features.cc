#include "engine/cpu_features.h"

#include <cstdint>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#define RBLN_VAE_X86 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace rbln_vae {
namespace {

#ifdef RBLN_VAE_X86

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero if the processor does not have the leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool bit(std::uint64_t word, int index) { return (word >> index) & 1; }

// The register sets that the operating system saves. Valid only with OSXSAVE.
std::uint64_t saved_registers() {
  std::uint32_t low, high;
  // The intrinsic would need the whole file compiled with -mxsave.
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

#if defined(__linux__) && defined(__x86_64__)
constexpr long kTileData = 18;  // the number of the tile registers among those that are saved
#endif

// Whether Linux would permit a process to use the tile registers.
bool offers_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long arch_get_xcomp_supp = 0x1021;
  std::uint64_t offered = 0;
  return syscall(SYS_arch_prctl, arch_get_xcomp_supp, &offered) == 0 && bit(offered, kTileData);
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures f;
  const Registers basic = cpuid(1, 0);
  const Registers extended = cpuid(7, 0);
  // Subleaf 1 exists only if subleaf 0 says so.
  const Registers more = extended.eax >= 1 ? cpuid(7, 1) : Registers{};

  f.sse4_2 = bit(basic.ecx, 20);
  const bool osxsave = bit(basic.ecx, 27);
  const std::uint64_t saved = osxsave ? saved_registers() : 0;
  const auto saves = [saved](std::uint64_t mask) { return (saved & mask) == mask; };
  constexpr std::uint64_t ymm = 0x6;             // xmm and the upper half of ymm
  constexpr std::uint64_t zmm = ymm | 0xe0;      // masks, upper zmm, zmm16 to zmm31
  constexpr std::uint64_t tiles = 0x60000;       // tile configuration and data

  if (saves(ymm)) {
    f.avx = bit(basic.ecx, 28);
    f.f16c = bit(basic.ecx, 29);
    f.fma = bit(basic.ecx, 12);
    f.avx2 = bit(extended.ebx, 5);
  }
  if (saves(zmm)) {
    f.avx512f = bit(extended.ebx, 16);
    f.avx512dq = bit(extended.ebx, 17);
    f.avx512bw = bit(extended.ebx, 30);
    f.avx512vl = bit(extended.ebx, 31);
    f.avx512_fp16 = bit(extended.edx, 23);
    f.avx512_bf16 = bit(more.eax, 5);
  }
  if (saves(tiles) && bit(extended.edx, 24) && offers_tiles()) {
    f.amx_tile = true;
    f.amx_bf16 = bit(extended.edx, 22);
  }
  return f;
}

#else

CpuFeatures detect() {
  CpuFeatures f;
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long bf16 = 1 << 14;  // HWCAP2_BF16, which old headers lack
  f.neon_bf16 = (getauxval(AT_HWCAP2) & bf16) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof has;
  f.neon_bf16 =
      sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#endif
  return f;
}

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long arch_req_xcomp_perm = 0x1023;
  static const bool granted = syscall(SYS_arch_prctl, arch_req_xcomp_perm, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

std::vector<std::string> names(const CpuFeatures& f) {
  const std::pair<const char*, bool> all[] = {
      {"sse4_2", f.sse4_2},
      {"avx", f.avx},
      {"f16c", f.f16c},
      {"fma", f.fma},
      {"avx2", f.avx2},
      {"avx512f", f.avx512f},
      {"avx512bw", f.avx512bw},
      {"avx512dq", f.avx512dq},
      {"avx512vl", f.avx512vl},
      {"avx512_bf16", f.avx512_bf16},
      {"avx512_fp16", f.avx512_fp16},
      {"amx_tile", f.amx_tile},
      {"amx_bf16", f.amx_bf16},
      {"neon_bf16", f.neon_bf16},
  };
  std::vector<std::string> present;
  for (const auto& [name, has] : all) {
    if (has) present.emplace_back(name);
  }
  return present;
}

}  // namespace rbln_vae
