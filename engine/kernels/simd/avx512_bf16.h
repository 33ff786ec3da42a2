// AVX-512 with bfloat16 products of pairs of input channels, summed in float32.
#pragma once

#include <cstring>

#include "engine/kernels/simd/avx512.h"

namespace rbln_vae::avx512_bf16 {

struct BFloat16Images : avx512::BFloat16Images {
  static void store_elements(T* p, Vector v) {
    const __m256bh bits = _mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
  }
};

// The registers for Broadcast.
struct BFloat16Weights {
  using T = BFloat16;
  using Scratch = T;
  using Vector = __m512;
  using Weights = __m512bh;
  static constexpr int kPerPanel = 1;
  static constexpr int kChannels = 2;
  static constexpr int kUnrolled = 1;               // more were not measured
  static constexpr bool kPrefetchesPixels = false;  // not measured
  static constexpr Index kMaxPixels = 14;
  static constexpr Index kMaxPanels = 2;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Weights weights(const T* p, int) { return (__m512bh)_mm512_loadu_si512(p); }
  static Weights spread(const T* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vector dot(Weights x, Weights w, Vector sum) { return _mm512_dpbf16_ps(sum, x, w); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
};

// Float32 weights for images in bfloat16. It has its own type, because each file compiles its
// products for its own instruction set.
struct Float32Weights : avx512::Float32Weights {};

}  // namespace rbln_vae::avx512_bf16
