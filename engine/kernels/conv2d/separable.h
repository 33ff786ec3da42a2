// The transforms of an algorithm in two directions, made of those in one.
//
// An `Algorithm` turns `kPixels` pixels into as many values (`forward`), and the sums of `kSide`
// products into four outputs (`backward`). It numbers the values of a square, and its products.
#pragma once

#include "engine/kernels/simd/instruction_set.h"
#include "engine/steps.h"

namespace rbln_vae {

template <InstructionSet Simd, class Algorithm>
struct Separable {
  using Vector = typename Simd::Vector;
  using Factor = typename Simd::Scratch;
  static constexpr Index kPixels = Algorithm::kPixels;
  static constexpr Index kSide = Algorithm::kSide;
  static_assert(kPixels <= 9 && kSide <= 9);  // as often as loops are unrolled

  // Transforms the pixels of 16 channels that 4x4 outputs depend on.
  static void input(const float* from, Index row_step, Factor* to, Index step) {
    Vector columns[kPixels][kPixels];
#pragma GCC unroll 9
    for (Index x = 0; x < kPixels; ++x) {
      Vector d[kPixels], v[kPixels];
#pragma GCC unroll 9
      for (Index y = 0; y < kPixels; ++y) d[y] = Simd::load(from + y * row_step + x * kBlock);
      Algorithm::forward(d, v);
#pragma GCC unroll 9
      for (Index y = 0; y < kPixels; ++y) columns[y][x] = v[y];
    }
#pragma GCC unroll 9
    for (Index y = 0; y < kPixels; ++y) {
      Vector v[kPixels];
      Algorithm::forward(columns[y], v);
#pragma GCC unroll 9
      for (Index x = 0; x < kPixels; ++x) {
        put<Simd>(to + Algorithm::number_of_value(y, x) * step, v[x]);
      }
    }
  }

  // Computes 4x4 outputs of a panel.
  static void output(const float* from, Index step, float* to, Index row_step) {
    Vector rows[kOutputSquare][kSide];
#pragma GCC unroll 9
    for (Index x = 0; x < kSide; ++x) {
      Vector m[kSide], v[kOutputSquare];
#pragma GCC unroll 9
      for (Index y = 0; y < kSide; ++y) {
        m[y] = Simd::load(from + Algorithm::number_of_product(y, x) * step);
      }
      Algorithm::backward(m, v);
#pragma GCC unroll 4
      for (Index y = 0; y < kOutputSquare; ++y) rows[y][x] = v[y];
    }
#pragma GCC unroll 4
    for (Index y = 0; y < kOutputSquare; ++y) {
      Vector v[kOutputSquare];
      Algorithm::backward(rows[y], v);
#pragma GCC unroll 4
      for (Index x = 0; x < kOutputSquare; ++x) {
        Simd::store(to + y * row_step + x * kPanel, v[x]);
      }
    }
  }
};

}  // namespace rbln_vae
