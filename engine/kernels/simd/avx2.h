// AVX2 with fused multiply-add and F16C: a vector of 16 floats is two registers. Products are
// computed in float32, with weights in any type.
#pragma once

#include <immintrin.h>

#include "engine/kernels/simd/broadcast.h"

namespace rbln_vae::avx2 {

struct Vectors {
  struct Pair {
    __m256 low, high;
  };
  using Vector = Pair;

  static __m256 exp2(__m256 x) {
    // The bound is the first operand: with a NaN, the instruction returns the second operand.
    x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    x = _mm256_min_ps(_mm256_set1_ps(126.0f), x);
    const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x, whole);
    __m256 p = _mm256_set1_ps(1.5403530393381609e-4f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.3333558146428443e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6181291076284772e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5504108664821580e-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022650695910072e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314718055994531e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
  }

  static Pair set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Pair load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, const Pair& v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
  }
  static Pair add(const Pair& a, const Pair& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static Pair subtract(const Pair& a, const Pair& b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  static Pair multiply(const Pair& a, const Pair& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  static Pair multiply_add(const Pair& a, const Pair& b, const Pair& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static Pair maximum(const Pair& a, const Pair& b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
  }
  static Pair magnitude(const Pair& v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, v.low), _mm256_andnot_ps(sign, v.high)};
  }
  static float largest(const Pair& v) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_max_ps(v.low, v.high));
    float result = lanes[0];
    for (int i = 1; i < 8; ++i) result = lanes[i] > result ? lanes[i] : result;
    return result;
  }
  static float sum(const Pair& v) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_add_ps(v.low, v.high));
    float result = 0;
    for (const float lane : lanes) result += lane;
    return result;
  }
  static Pair exp2(const Pair& v) { return {exp2(v.low), exp2(v.high)}; }
  static __m256 silu(__m256 x) {
    const __m256 e = exp2(_mm256_mul_ps(x, _mm256_set1_ps(-1.44269504088896341f)));
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
  }
  static Pair silu(const Pair& v) { return {silu(v.low), silu(v.high)}; }
};

struct Float32Images : Vectors {
  using T = float;

  static Pair load_elements(const T* p) { return load(p); }
  static void store_elements(T* p, const Pair& v) { store(p, v); }
};

// Images in float16.
struct Float16Images : Vectors {
  using T = Float16;

  static Pair load_elements(const T* p) { return {widened(p), widened(p + 8)}; }
  static void store_elements(T* p, const Pair& v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), nearest(v.low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), nearest(v.high));
  }
  static __m256 widened(const T* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

 private:
  static __m128i nearest(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

// Images in bfloat16, which is the upper half of float32.
struct BFloat16Images : Vectors {
  using T = BFloat16;

  static Pair load_elements(const T* p) { return {widened(p), widened(p + 8)}; }
  // Every second of 32 elements, from the given one on.
  static Pair load_alternate(const T* p, Index from) {
    return {alternate(p, from), alternate(p + 16, from)};
  }
  static void store_elements(T* p, const Pair& v) {
    // Packing works on each half of the registers separately.
    const __m256i packed = _mm256_packus_epi32(rounded(v.low), rounded(v.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }

 private:
  static __m256 alternate(const T* p, Index from) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(from == 0
                                   ? _mm256_slli_epi32(pairs, 16)
                                   : _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
  }
  static __m256 widened(const T* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // Rounds to nearest, ties to even, in the lower half of each lane; a NaN stays a NaN.
  static __m256i rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(nearest, quiet, is_nan);
  }
};

// The registers for Broadcast, with weights of any type.
struct Registers {
  using Scratch = float;
  using Vector = __m256;
  using Weights = __m256;
  static constexpr int kPerPanel = 2;
  static constexpr int kChannels = 1;
  static constexpr Index kMaxPixels = 6;
  static constexpr Index kMaxPanels = 1;
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector spread(const float* p) { return _mm256_broadcast_ss(p); }
  static Vector dot(Vector x, Weights w, Vector sum) { return _mm256_fmadd_ps(x, w, sum); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
};

struct Float32Weights : Registers {
  using T = float;
  static Weights weights(const T* p, int) { return _mm256_loadu_ps(p); }
};

struct Float16Weights : Registers {
  using T = Float16;
  static Weights weights(const T* p, int) { return Float16Images::widened(p); }
};

struct BFloat16Weights : Registers {
  using T = BFloat16;
  // Weights are in pairs of input channels, the first one in the lower half.
  static Weights weights(const T* p, int channel) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(channel == 0
                                   ? _mm256_slli_epi32(pairs, 16)
                                   : _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
  }
};

}  // namespace rbln_vae::avx2
