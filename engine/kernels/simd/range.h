// Notices values beyond the range of stored images, so that no infinity takes their place unseen.
// Of the types of images, only float16 has a smaller range than float32.
#pragma once

#include <type_traits>

#include "engine/kernels/simd/instruction_set.h"
#include "engine/steps.h"

namespace rbln_vae {

// Takes 16 values that are stored into the largest magnitudes so far. A NaN is not beyond a range.
template <StoresImages Simd>
static inline void see(const typename Simd::Vector& v, typename Simd::Vector& largest) {
  if constexpr (std::is_same_v<typename Simd::T, Float16>) {
    largest = Simd::maximum(Simd::magnitude(v), largest);
  }
}

// Tells the run if one of them is beyond the range.
template <StoresImages Simd>
static inline void report(const typename Simd::Vector& largest, const Context& context, Index n) {
  if constexpr (std::is_same_v<typename Simd::T, Float16>) {
    if (Simd::largest(largest) >= kFloat16Infinity) {
      context.overflow(n);
    }
  }
}

}  // namespace rbln_vae
