// Convolutions of 3x3 of an image that is doubled by nearest neighbours first, with 25 products for
// 4x4 outputs, where the definition has 144.
//
// In one direction, four outputs depend on four pixels a, b, c and d, which the kernel g meets as
// a, b, b, c, c, d. With s for the sum of its three taps,
//
//   m0 = (a - c) g0    m1 = (b + c) s/2    m2 = (c - b) (g2 - s/2)    m3 = (c - b) (s/2 - g0)
//   m4 = (d - b) g2
//
// give m0 + m1 - m3, m1 + m2, m1 + m3 and m4 + m1 - m2. So there are five products, fewer than
// the six that F(2x2, 3x3) has for its d = (a, b, b, c), twice; and their coefficients are all 1 or
// -1, so that they can be computed in bfloat16: for independent pixels and taps, the rounding of
// the factors causes 1 to 5/3 times the variance of that by the definition.
//
// The kernels are transformed when they are packed (`targets/cpu/packing.py`).
#pragma once

#include "engine/kernels/conv2d/filtering.h"

namespace rbln_vae {

template <InstructionSet Simd>
struct Doubling {
  using Vector = typename Simd::Vector;
  using Factor = typename Simd::Scratch;
  static constexpr Index kPoints = 2;
  static constexpr Index kPixels = kPoints + 2;
  static constexpr Index kSide = kDoublingSide;
  static constexpr Index kValues = kPixels * kPixels;
  static constexpr Index kProducts = kSide * kSide;
  static constexpr Index kMatrices = kProducts;
  static constexpr Index kStride = 1;

  static constexpr Index first(Index matrix) { return matrix; }

  // The transformed pixels of a product: m2 and m3 have the same.
  static constexpr Index value(Index product) {
    constexpr Index of[kSide] = {0, 1, 2, 2, 3};
    return of[product / kSide] * kPixels + of[product % kSide];
  }

  // Transforms 4x4 pixels of 16 channels.
  static void input(const float* from, Index row_step, Factor* to, Index step) {
    Vector columns[kPixels][kPixels];
#pragma GCC unroll 4
    for (Index x = 0; x < kPixels; ++x) {
      Vector d[kPixels], v[kPixels];
#pragma GCC unroll 4
      for (Index y = 0; y < kPixels; ++y) d[y] = Simd::load(from + y * row_step + x * kBlock);
      forward(d, v);
#pragma GCC unroll 4
      for (Index y = 0; y < kPixels; ++y) columns[y][x] = v[y];
    }
#pragma GCC unroll 4
    for (Index y = 0; y < kPixels; ++y) {
      Vector v[kPixels];
      forward(columns[y], v);
#pragma GCC unroll 4
      for (Index x = 0; x < kPixels; ++x) put<Simd>(to + (y * kPixels + x) * step, v[x]);
    }
  }

  // Computes 4x4 pixels of a panel.
  static void output(const float* from, Index step, float* to, Index row_step) {
    Vector rows[kOutputSquare][kSide];
#pragma GCC unroll 5
    for (Index x = 0; x < kSide; ++x) {
      Vector m[kSide], v[kOutputSquare];
#pragma GCC unroll 5
      for (Index y = 0; y < kSide; ++y) m[y] = Simd::load(from + (y * kSide + x) * step);
      backward(m, v);
#pragma GCC unroll 4
      for (Index y = 0; y < kOutputSquare; ++y) rows[y][x] = v[y];
    }
#pragma GCC unroll 4
    for (Index y = 0; y < kOutputSquare; ++y) {
      Vector v[kOutputSquare];
      backward(rows[y], v);
#pragma GCC unroll 4
      for (Index x = 0; x < kOutputSquare; ++x) {
        Simd::store(to + y * row_step + x * kPanel, v[x]);
      }
    }
  }

 private:
  [[gnu::always_inline]] static void forward(const Vector (&d)[kPixels], Vector (&v)[kPixels]) {
    v[0] = Simd::subtract(d[0], d[2]);
    v[1] = Simd::add(d[1], d[2]);
    v[2] = Simd::subtract(d[2], d[1]);
    v[3] = Simd::subtract(d[3], d[1]);
  }

  [[gnu::always_inline]] static void backward(const Vector (&m)[kSide],
                                              Vector (&y)[kOutputSquare]) {
    y[0] = Simd::add(Simd::subtract(m[1], m[3]), m[0]);
    y[1] = Simd::add(m[1], m[2]);
    y[2] = Simd::add(m[1], m[3]);
    y[3] = Simd::add(Simd::subtract(m[1], m[2]), m[4]);
  }
};

}  // namespace rbln_vae
