// AVX-512: vectors of 16 floats. Products are computed in float32, with weights in any type.
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
  static Vector magnitude(Vector v) { return _mm512_abs_ps(v); }
  static float largest(Vector v) { return _mm512_reduce_max_ps(v); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }

  // Clamps to the range in which the result is a normal number. The bound is the first operand:
  // with a NaN, the instruction returns the second operand.
  static Vector bounded(Vector x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    return _mm512_min_ps(_mm512_set1_ps(126.0f), x);
  }

  // 2 to the power of x, to float32's precision: a Taylor polynomial of the fraction in
  // [-1/2, 1/2]; the integer part goes into the exponent.
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

  static Vector silu(Vector x) {
    const Vector e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
  }
};

struct Float32Images : Vectors {
  using T = float;

  static Vector load_elements(const T* p) { return load(p); }
  static void store_elements(T* p, Vector v) { store(p, v); }
};

// Images in float16; arithmetic is in float32.
struct Float16Images : Vectors {
  using T = Float16;

  static Vector load_elements(const T* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_elements(T* p, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// Images in bfloat16, which is the upper half of float32; arithmetic is in float32.
struct BFloat16Images : Vectors {
  using T = BFloat16;

  static Vector load_elements(const T* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // Every second of 32 elements, from the given one on.
  static Vector load_alternate(const T* p, Index from) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(from == 0
                                   ? _mm512_slli_epi32(pairs, 16)
                                   : _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
  // Rounds to nearest, ties to even; a NaN stays a NaN.
  static void store_elements(T* p, Vector v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i all = _mm512_mask_or_epi32(nearest, is_nan, upper, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(all));
  }

  // 2 to the power of x, to 1e-4, since bfloat16 has a precision of 4e-3: a minimax polynomial of
  // the fraction; the integer part, rounded down, goes into the exponent.
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
    // The reciprocal has 14 correct bits, and bfloat16 keeps 8.
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), e)));
  }
};

// The registers for Broadcast, with weights of any type.
struct Registers {
  using Scratch = float;
  using Vector = __m512;
  using Weights = __m512;
  static constexpr int kPerPanel = 1;
  static constexpr int kChannels = 1;
  static constexpr int kUnrolled = 1;               // more were not measured
  static constexpr bool kPrefetchesPixels = false;  // not measured
  static constexpr Index kMaxPixels = 14;
  static constexpr Index kMaxPanels = 2;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector spread(const float* p) { return _mm512_set1_ps(*p); }
  static Vector dot(Vector x, Weights w, Vector sum) { return _mm512_fmadd_ps(x, w, sum); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
};

struct Float32Weights : Registers {
  using T = float;
  static Weights weights(const T* p, int) { return _mm512_loadu_ps(p); }
};

struct Float16Weights : Registers {
  using T = Float16;
  static Weights weights(const T* p, int) { return Float16Images::load_elements(p); }
};

struct BFloat16Weights : Registers {
  using T = BFloat16;
  // Weights are in pairs of input channels, the first one in the lower half.
  static Weights weights(const T* p, int channel) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(channel == 0
                                   ? _mm512_slli_epi32(pairs, 16)
                                   : _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
};

}  // namespace rbln_vae::avx512
