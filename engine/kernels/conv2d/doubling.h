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
  static constexpr Index kPoints = 2;
  static constexpr Index kPixels = kPoints + 2;
  static constexpr Index kSide = kDoublingSide;
  static constexpr Index kValues = kPixels * kPixels;
  static constexpr Index kProducts = kSide * kSide;
  static constexpr Index kMatrices = kProducts;
  static constexpr Index kStride = 1;

  static constexpr Index number_of_value(Index y, Index x) { return y * kPixels + x; }
  static constexpr Index number_of_product(Index y, Index x) { return y * kSide + x; }
  static constexpr Index first(Index matrix) { return matrix; }

  // The transformed pixels of a product: m2 and m3 have the same.
  static constexpr Index value(Index product) {
    constexpr Index of[kSide] = {0, 1, 2, 2, 3};
    return number_of_value(of[product / kSide], of[product % kSide]);
  }

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
