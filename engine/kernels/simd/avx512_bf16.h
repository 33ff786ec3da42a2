// AVX-512 with bfloat16 products: pairs of input channels, summed in float32.
#pragma once

#include <cstring>

#include "engine/kernels/simd/avx512.h"

namespace rbln_vae::avx512_bf16 {

struct Vectors : avx512::BFloat16Images {
  static void store_elements(T* p, Vector v) {
    const __m256bh bits = _mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
  }
};

struct BFloat16Products : Vectors {
  using Scratch = T;

  // For Broadcast.
  static constexpr int kPerPanel = 1;
  static constexpr int kChannels = 2;
  using Weights = __m512bh;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Weights weights(const T* p, int) { return (__m512bh)_mm512_loadu_si512(p); }
  static Weights spread(const T* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vector dot(Weights x, Weights w, Vector sum) { return _mm512_dpbf16_ps(sum, x, w); }

  static void gemm(const Gemm<T>& g) { Broadcast<BFloat16Products>::gemm(g); }
};

// Of float32, beside images in bfloat16. A type of its own, since each file's products are
// compiled for its own instruction set.
struct Float32Products : avx512::Float32 {
  struct Products : avx512::Float32::Products {};
  static void gemm(const Gemm<T>& g) { Broadcast<Products>::gemm(g); }
};

}  // namespace rbln_vae::avx512_bf16
