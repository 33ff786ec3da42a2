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

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

[[maybe_unused]] static inline float to_float(float x) { return x; }

[[maybe_unused]] static inline float to_float(BFloat16 x) {
  const std::uint32_t word = std::uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

[[maybe_unused]] static inline float to_float(Float16 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 31;
  const std::uint32_t fraction = x.bits & 0x3ff;
  std::uint32_t word;
  float result;
  if (exponent == 0) {  // zero, or a denormal: fraction times 2^-24
    result = static_cast<float>(fraction) * (1.0f / 16777216.0f);
    return sign ? -result : result;
  }
  if (exponent == 31) {
    word = sign | 0x7f800000u | (fraction << 13);
  } else {
    word = sign | ((exponent + 112) << 23) | (fraction << 13);
  }
  std::memcpy(&result, &word, sizeof result);
  return result;
}

[[maybe_unused]] static inline void from_float(float x, float& out) { out = x; }

// Rounds to nearest, ties to even; a NaN stays a NaN.
[[maybe_unused]] static inline void from_float(float x, BFloat16& out) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  // Both are computed, so that a loop of these can be vectorised.
  const std::uint32_t nan = (word >> 16) | 0x40;
  const std::uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  out.bits = static_cast<std::uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

[[maybe_unused]] static inline void from_float(float x, Float16& out) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const std::uint32_t sign = (word >> 16) & 0x8000;
  const std::uint32_t magnitude = word & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // A denormal half: its unit is 2^-24, and rounding to it is rounding to an integer.
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof absolute);
    const float scaled = absolute * 16777216.0f;
    const auto whole = static_cast<std::uint32_t>(scaled);
    const float rest = scaled - static_cast<float>(whole);
    half = whole + ((rest > 0.5f || (rest == 0.5f && (whole & 1))) ? 1 : 0);
  } else {
    const std::uint32_t shifted = magnitude - (112u << 23);
    half = (shifted + 0xfff + ((shifted >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}

[[maybe_unused]] static inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
[[maybe_unused]] static inline Index smaller(Index a, Index b) { return a < b ? a : b; }
[[maybe_unused]] static inline Index larger(Index a, Index b) { return a > b ? a : b; }

}  // namespace rbln_vae
