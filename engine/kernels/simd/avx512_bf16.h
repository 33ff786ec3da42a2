// AVX-512 with bfloat16 products: pairs of input channels, summed in float32.
#pragma once

#include <cstring>

#include "engine/kernels/simd/avx512.h"

namespace rbln_vae::avx512_bf16 {

// Images stored in bfloat16, worked on in float32.
struct Vectors : avx512::Vectors {
  using T = BFloat16;

  static Vector load_elements(const T* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store_elements(T* p, Vector v) {
    const __m256bh bits = _mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
  }

  // 2 to the power of x, to 1e-4: bfloat16 keeps 4e-3. A minimax fit of what follows the
  // point; the whole part, rounded down, goes into the exponent.
  static Vector exp2(Vector x) {
    const Vector f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vector p = _mm512_set1_ps(7.80245222e-02f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.26067171e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.95833526e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99925221e-01f));
    return _mm512_scalef_ps(p, x);
  }

  static Vector silu(Vector x) {
    const Vector e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f)));
    // The reciprocal is good to 14 bits, of which bfloat16 keeps 8.
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), e)));
  }
};

struct BFloat16Products : Vectors {
  static constexpr Index kMaxRows = 1;
  static constexpr Index kMaxPixels = 14;
  static constexpr Index kMaxPanels = 2;

  // Sums of a row of pixels lie this far apart.
  static constexpr Index sums_pitch(Index) { return kMaxPixels; }
  static constexpr Index rows_at_once(Index) { return kMaxRows; }
  static constexpr bool kOverlaps = false;
  static constexpr bool kWholeTiles = false;

  static void enter() {}
  static void leave() {}

  // For Broadcast.
  static constexpr int kPerPanel = 1;
  static constexpr int kChannels = 2;
  using Weights = __m512bh;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Weights weights(const T* p) { return (__m512bh)_mm512_loadu_si512(p); }
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
  static void gemm(const Gemm<T>& g) { Broadcast<Float32Products>::gemm(g); }
};

}  // namespace rbln_vae::avx512_bf16
