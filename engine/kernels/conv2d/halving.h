// Convolutions of 3x3 with stride 2, with 81 products for 4x4 outputs, where the definition has 144.
//
// In one direction, an output is the sum of two convolutions with stride 1: the even pixels meet
// the outer taps, and the odd ones the tap between them. The first takes five products for four
// outputs instead of eight, as in Winograd's algorithm with two taps, without the point at
// infinity. The second takes one for each output, all with the same tap. So there are nine
// products, with only six different kernels: as many as F(4x4, 3x3) has.
#pragma once

#include "engine/kernels/conv2d/winograd.h"

namespace rbln_vae {

template <InstructionSet Simd>
struct Halving {
  using Vector = typename Simd::Vector;
  static constexpr Index kStride = 2;
  static constexpr Index kPoints = kOutputSquare;
  static constexpr Index kEven = kPoints + 1;        // products of even pixels
  static constexpr Index kSide = kEven + kPoints;    // and of odd ones, with the same kernel
  static constexpr Index kKernels = kEven + 1;       // different ones
  static constexpr Index kPixels = kSide;
  static constexpr Index kProducts = kSide * kSide;
  static constexpr Index kValues = kProducts;
  static constexpr Index kMatrices = kKernels * kKernels;
  static_assert(kMatrices == WinogradStep::kMatrices);

  static constexpr Index value(Index product) { return product; }

  // Products are numbered in the order of their kernels: nine in each even row, then those of all
  // odd rows, four for an even column and 16 for the odd ones.
  static constexpr Index first(Index matrix) {
    const Index row = matrix / kKernels, column = matrix % kKernels;
    if (row < kEven) return row * kSide + column;
    return row == kEven ? kEven * kSide + column * kPoints : kProducts;
  }
  static constexpr Index number_of_product(Index y, Index x) {
    if (y < kEven) return y * kSide + x;
    const Index odd = kEven * kSide, row = y - kEven;
    if (x < kEven) return odd + x * kPoints + row;
    return odd + kEven * kPoints + row * kPoints + x - kEven;
  }
  static constexpr Index number_of_value(Index y, Index x) { return number_of_product(y, x); }

  // The outer taps at the points, and the one between them.
  [[gnu::always_inline]] static void values(const Vector (&g)[3], Vector (&v)[kKernels]) {
    const Vector outer[3] = {g[0], g[2], Simd::set(0.0f)};
    Winograd<Simd>::values(outer, v);
    v[kEven] = g[1];
  }

  [[gnu::always_inline]] static void forward(const Vector (&d)[kSide], Vector (&v)[kSide]) {
    const Vector even[Winograd<Simd>::kSide] = {d[0], d[2], d[4], d[6], d[8], Simd::set(0.0f)};
    Vector transformed[Winograd<Simd>::kSide];
    Winograd<Simd>::forward(even, transformed);
#pragma GCC unroll 5
    for (Index i = 0; i < kEven; ++i) v[i] = transformed[i];
#pragma GCC unroll 4
    for (Index i = 0; i < kPoints; ++i) v[kEven + i] = d[2 * i + 1];
  }

  [[gnu::always_inline]] static void backward(const Vector (&m)[kSide],
                                              Vector (&y)[kOutputSquare]) {
    const Vector even[Winograd<Simd>::kSide] = {m[0], m[1], m[2], m[3], m[4], Simd::set(0.0f)};
    Winograd<Simd>::backward(even, y);
#pragma GCC unroll 4
    for (Index i = 0; i < kOutputSquare; ++i) y[i] = Simd::add(y[i], m[kEven + i]);
  }
};

}  // namespace rbln_vae
