// AVX-512: vectors of 16 floats, and products in float32.
#pragma once

#include <immintrin.h>

#include "engine/kernels/simd/broadcast.h"

namespace rbln_vae::avx512 {

struct Vectors {
  using Vector = __m512;

  static Vector set(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static float largest(Vector v) { return _mm512_reduce_max_ps(v); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }

  // Within the range in which the result is a normal number. The bound comes first: where
  // an operand is a NaN the instruction gives the second one.
  static Vector bounded(Vector x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    return _mm512_min_ps(_mm512_set1_ps(126.0f), x);
  }

  // 2 to the power of x, to float32's precision: the fraction in [-1/2, 1/2] through a
  // polynomial (Taylor's), the whole part into the exponent.
  static Vector exp2(Vector x) {
    x = bounded(x);
    const Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector f = _mm512_sub_ps(x, whole);
    Vector p = _mm512_set1_ps(1.5403530393381609e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558146428443e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291076284772e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504108664821580e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022650695910072e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718055994531e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
  }
};

struct Float32 : Vectors {
  using T = float;

  static constexpr Index kMaxRows = 1;
  static constexpr Index kMaxPixels = 14;
  static constexpr Index kMaxPanels = 2;

  // Sums of a row of pixels lie this far apart.
  static constexpr Index sums_pitch(Index) { return kMaxPixels; }
  static constexpr Index rows_at_once(Index) { return kMaxRows; }
  static constexpr bool kOverlaps = false;
  static constexpr bool kWholeTiles = false;

  static Vector load_elements(const float* p) { return load(p); }
  static void store_elements(float* p, Vector v) { store(p, v); }

  static Vector silu(Vector x) {
    const Vector e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
  }

  static void enter() {}
  static void leave() {}

  // For Broadcast.
  static constexpr int kPerPanel = 1;
  static constexpr int kChannels = 1;
  static Vector zero() { return _mm512_setzero_ps(); }
  using Weights = Vector;
  static Weights weights(const float* p) { return load(p); }
  static Vector spread(const float* p) { return _mm512_set1_ps(*p); }
  static Vector dot(Vector x, Vector w, Vector sum) { return _mm512_fmadd_ps(x, w, sum); }

  static void gemm(const Gemm<float>& g) { Broadcast<Float32>::gemm(g); }
};

}  // namespace rbln_vae::avx512
