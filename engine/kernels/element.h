// The element types of stored images, and their conversions.
//
// Everything here has internal linkage: each kernel file is compiled for a different instruction
// set, and the linker must never use one file's copy for another file.
#pragma once

#include <cstdint>
#include <cstring>

namespace rbln_vae {

using Index = std::int64_t;

// Channels are stored in blocks: the layout of an image is [N][ceil(C / 32)][H][W][32].
constexpr Index kBlock = 32;
// Kernels compute output channels in panels of 16.
constexpr Index kPanel = 16;

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// The smallest number that rounds to infinity.
constexpr float kFloat16Infinity = 65520.0f;

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

[[maybe_unused]] static inline Index bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

[[maybe_unused]] static inline float to_float(float x) { return x; }

[[maybe_unused]] static inline float to_float(BFloat16 x) {
  const std::uint32_t word = std::uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// One of two numbers, without a branch that would keep a loop from being vectorised.
[[maybe_unused]] static inline std::int32_t either(bool first, std::int32_t a, std::int32_t b) {
  const std::int32_t mask = -static_cast<std::int32_t>(first);
  return (a & mask) | (b & ~mask);
}

// Every processor of 64 bits by Arm converts float16; of others, not all do.
[[maybe_unused]] static inline float to_float(Float16 x) {
#if defined(__aarch64__)
  __fp16 result;
  std::memcpy(&result, &x.bits, sizeof result);
  return result;
#else
  const std::int32_t wide = static_cast<std::int16_t>(x.bits) * (1 << 13);
  const std::int32_t magnitude = wide & 0x0fffe000;
  // A denormal is the fraction of a number from 2^-14 on, without that.
  const std::int32_t above = magnitude + (113 << 23);
  float small;
  std::memcpy(&small, &above, sizeof small);
  small -= 0x1p-14f;
  std::int32_t denormal;
  std::memcpy(&denormal, &small, sizeof denormal);
  const std::int32_t normal =
      magnitude + (112 << 23) + either(magnitude >= 31 << 23, 112 << 23, 0);
  const std::int32_t sign = wide & ~0x7fffffff;
  const std::int32_t word = either(magnitude < 1 << 23, denormal, normal) | sign;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
#endif
}

[[maybe_unused]] static inline void from_float(float x, float& out) { out = x; }

// Rounds to the nearest, ties to even; a NaN stays a NaN.
[[maybe_unused]] static inline void from_float(float x, BFloat16& out) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  // Both are computed, so that a loop of these can be vectorised.
  const std::uint32_t nan = (word >> 16) | 0x40;
  const std::uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  out.bits = static_cast<std::uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// The same; beyond the range, the nearest is an infinity.
[[maybe_unused]] static inline void from_float(float x, Float16& out) {
#if defined(__aarch64__)
  const __fp16 nearest = static_cast<__fp16>(x);
  std::memcpy(&out.bits, &nearest, sizeof nearest);
#else
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  // Signed numbers are compared by one instruction everywhere.
  const auto magnitude = static_cast<std::int32_t>(word & 0x7fffffffu);
  const std::int32_t unbiased = magnitude - (112 << 23);
  const std::int32_t normal = (unbiased + 0xfff + ((unbiased >> 13) & 1)) >> 13;
  // A denormal: its unit is 2^-24, and that of float32 at 2^23 is 1, to which the sum rounds.
  float small;
  std::memcpy(&small, &magnitude, sizeof small);
  small = small * 0x1p24f + 0x1p23f;
  std::int32_t denormal;
  std::memcpy(&denormal, &small, sizeof denormal);
  std::int32_t half = either(magnitude < 0x38800000, denormal & 0x7fff, normal);
  half = either(magnitude >= 0x477ff000, 0x7c00, half);
  half = either(magnitude > 0x7f800000, 0x7e00, half);
  out.bits = static_cast<std::uint16_t>(static_cast<std::uint32_t>(half) |
                                        ((word >> 16) & 0x8000u));
#endif
}

// Whether an element is an infinity in a type whose range is smaller than that of float32.
[[maybe_unused]] static inline bool overflowed(float) { return false; }
[[maybe_unused]] static inline bool overflowed(BFloat16) { return false; }
[[maybe_unused]] static inline bool overflowed(Float16 x) { return (x.bits & 0x7fff) == 0x7c00; }

[[maybe_unused]] static inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
[[maybe_unused]] static inline Index smaller(Index a, Index b) { return a < b ? a : b; }
[[maybe_unused]] static inline Index larger(Index a, Index b) { return a > b ? a : b; }

}  // namespace rbln_vae
