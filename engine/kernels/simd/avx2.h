// AVX2 with fused multiply-add and F16C: a vector of 16 floats is two registers. Products are
// computed in float32, with weights in any type.
#pragma once

#include <immintrin.h>

#include "engine/kernels/simd/vectors.h"

namespace rbln_vae::avx2 {

struct Registers {
  using Register = __m256;
  static constexpr Index kMaxPixels = 6;
  // By name: of a sum of two products, the compiler could fuse either.
  static Register multiply_add(Register a, Register b, Register c) {
    return _mm256_fmadd_ps(a, b, c);
  }
};

// Images in float16.
struct Float16Images : Images<Registers, Float16> {
  static Vector load_elements(const T* p) { return {{widened(p), widened(p + 8)}}; }
  static void store_elements(T* p, const Vector& v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), nearest(v.part[0]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), nearest(v.part[1]));
  }
  static __m256 widened(const T* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

 private:
  static __m128i nearest(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

// Images in bfloat16, which is the upper half of float32.
struct BFloat16Images : Images<Registers, BFloat16> {
  static Vector load_elements(const T* p) { return {{widened(p), widened(p + 8)}}; }
  static void store_elements(T* p, const Vector& v) {
    // Packing works on each half of the registers separately.
    const __m256i packed = _mm256_packus_epi32(rounded(v.part[0]), rounded(v.part[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }

 private:
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

// The registers for `Broadcast`.
template <class Element>
struct Products : rbln_vae::Products<Registers, Element> {
  static constexpr int kUnrolled = 4;

  // In place, by name: GCC 12 would copy sums from register to register, and keep some in memory.
  static __m256 dot(__m256 x, __m256 w, __m256 sum) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
    return sum;
  }

  static __m256 weights(const Element* p, int channel) {
    if constexpr (std::same_as<Element, Float16>) return Float16Images::widened(p);
    return rbln_vae::Products<Registers, Element>::weights(p, channel);
  }
};

}  // namespace rbln_vae::avx2
