// Convolutions of 3x3 with a quarter of the products, by Winograd's minimal filtering
// F(4x4, 3x3).
//
// The values of a polynomial at as many points as it has coefficients determine it, and the
// product of two polynomials is the product of their values. So 4x4 outputs need 6x6 products
// instead of 4x4x9, at the points 0, a, -a, b, -b and infinity in each direction. The weights are
// transformed before that, in each run or once for many.
//
// Images may be stored in a narrower type, but everything in between is float32: products in
// bfloat16 are not fast enough to make direct convolution, with four times the products, faster.
//
// The algorithm: "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308. The error
// as a function of the points: "Error Analysis and Improving the Accuracy of Winograd Convolution
// for Deep Neural Networks", arXiv 1803.10986.
#pragma once

#include <concepts>

#include "engine/kernels/simd/instruction_set.h"
#include "engine/steps.h"

namespace rbln_vae {

// The algorithm for `Filtering`, in float32.
template <InstructionSet Simd>
  requires std::same_as<typename Simd::T, float>
struct Winograd {
  using Vector = typename Simd::Vector;
  static constexpr Index kPoints = kOutputSquare;
  static constexpr Index kSide = kPoints + 2;
  static constexpr Index kPixels = kSide;
  static constexpr Index kProducts = kSide * kSide;
  static constexpr Index kValues = kProducts;
  static constexpr Index kMatrices = kProducts;
  static constexpr Index kStride = 1;
  static_assert(kSide == 6);  // the transforms are written for it

  // The rounding error grows with the spread of the points' powers; 1 and 2 would double it.
  static constexpr double kA = 0.625;
  static constexpr double kB = 1.5;

  static constexpr Index number_of_value(Index y, Index x) { return y * kSide + x; }
  static constexpr Index number_of_product(Index y, Index x) { return y * kSide + x; }
  // The value that a product takes.
  static constexpr Index value(Index product) { return product; }
  // The first product with a transformed kernel.
  static constexpr Index first(Index matrix) { return matrix; }

  // Evaluates three taps at the points, each divided by the product of its distances from the
  // other points.
  [[gnu::always_inline]] static void values(const Vector (&g)[3], Vector (&v)[kSide]) {
    constexpr double aa = kA * kA, bb = kB * kB;
    constexpr double share_a = 1 / (2 * aa * (aa - bb)), share_b = 1 / (2 * bb * (bb - aa));
    const Vector even_a = times(aa * share_a, g[2], scaled(share_a, g[0]));
    const Vector even_b = times(bb * share_b, g[2], scaled(share_b, g[0]));
    v[0] = scaled(1 / (aa * bb), g[0]);
    v[1] = times(kA * share_a, g[1], even_a);
    v[2] = times(-kA * share_a, g[1], even_a);
    v[3] = times(kB * share_b, g[1], even_b);
    v[4] = times(-kB * share_b, g[1], even_b);
    v[5] = g[2];
  }

  // Transforms six inputs in one direction: the transpose of interpolation.
  [[gnu::always_inline]] static void forward(const Vector (&d)[kSide], Vector (&v)[kSide]) {
    constexpr double aa = kA * kA, bb = kB * kB;
    const Vector even_a = times(-bb, d[2], d[4]);
    const Vector odd_a = times(-bb, d[1], d[3]);
    const Vector even_b = times(-aa, d[2], d[4]);
    const Vector odd_b = times(-aa, d[1], d[3]);
    v[0] = times(aa * bb, d[0], times(-aa - bb, d[2], d[4]));
    v[1] = times(kA, odd_a, even_a);
    v[2] = times(-kA, odd_a, even_a);
    v[3] = times(kB, odd_b, even_b);
    v[4] = times(-kB, odd_b, even_b);
    v[5] = times(aa * bb, d[1], times(-aa - bb, d[3], d[5]));
  }

  // Computes four outputs from the products at six points, with the powers of the points.
  [[gnu::always_inline]] static void backward(const Vector (&m)[kSide], Vector (&y)[kOutputSquare]) {
    constexpr double aa = kA * kA, bb = kB * kB;
    const Vector even_a = Simd::add(m[1], m[2]);
    const Vector odd_a = Simd::subtract(m[1], m[2]);
    const Vector even_b = Simd::add(m[3], m[4]);
    const Vector odd_b = Simd::subtract(m[3], m[4]);
    y[0] = Simd::add(Simd::add(even_a, even_b), m[0]);
    y[1] = times(kA, odd_a, scaled(kB, odd_b));
    y[2] = times(aa, even_a, scaled(bb, even_b));
    y[3] = times(aa * kA, odd_a, times(bb * kB, odd_b, m[5]));
  }

 private:
  static Vector scaled(double factor, const Vector& x) {
    return Simd::multiply(Simd::set(static_cast<float>(factor)), x);
  }
  static Vector times(double factor, const Vector& x, const Vector& sum) {
    return Simd::multiply_add(Simd::set(static_cast<float>(factor)), x, sum);
  }
};

}  // namespace rbln_vae
