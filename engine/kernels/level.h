// The levels of pictures: bytes from 0 for -1 to 255 for 1, as diffusers' VaeImageProcessor
// converts them.
//
// Everything here has internal linkage, as in element.h. A multiplication and an addition must not
// be fused: files that include this are compiled with -ffp-contract=off.
#pragma once

#include "engine/kernels/element.h"

namespace rbln_vae {

// A level that shows a value of type T: each operation on the value is rounded to T.
template <class T>
struct Level {
  using Shown = T;
  std::uint8_t bits;
};

template <class T>
[[maybe_unused]] static inline float to_float(Level<T> level) {
  return static_cast<float>(level.bits) / 255.0f * 2.0f - 1.0f;
}

// Values beyond -1 and 1 are clamped, and halves are rounded to even; a NaN becomes 0.
template <class T>
[[maybe_unused]] static inline void from_float(float x, Level<T>& out) {
  T value;
  from_float(x, value);
  // Halving is exact, so the sum alone is rounded.
  from_float(to_float(value) * 0.5f + 0.5f, value);
  float shown = to_float(value);
  shown = shown > 0.0f ? shown : 0.0f;
  shown = shown < 1.0f ? shown : 1.0f;
  // Adding 2^23 rounds to an integer, which the last bits of the sum are.
  const float sum = shown * 255.0f + 8388608.0f;
  std::uint32_t word;
  std::memcpy(&word, &sum, sizeof word);
  out.bits = static_cast<std::uint8_t>(word);
}

}  // namespace rbln_vae
