// Minimal filtering over time: several frames of a convolution over three frames at once, with
// fewer products than three for each.
//
// Two frames take four products instead of six, by F(2, 3), and four take six instead of twelve,
// by F(4, 3). The factors are sums of frames, and of the kernel's taps in time; each is then
// transformed in space. So the products of the two algorithms are nested.
#pragma once

#include "engine/kernels/conv2d/winograd.h"

namespace rbln_vae {

// The algorithm for so many frames; of a single one, the blocks of all frames are summed together.
template <InstructionSet Simd, Index kFrames>
struct OverTime {
  static_assert(kFrames == 1);
  static constexpr Index kTimes = 1;
};

template <InstructionSet Simd>
struct OverTime<Simd, 2> {
  using Vector = typename Simd::Vector;
  static constexpr Index kTimes = 4;

  [[gnu::always_inline]] static void forward(const Vector (&d)[kTimes], Vector (&v)[kTimes]) {
    v[0] = Simd::subtract(d[0], d[2]);
    v[1] = Simd::add(d[1], d[2]);
    v[2] = Simd::subtract(d[2], d[1]);
    v[3] = Simd::subtract(d[3], d[1]);
  }

  [[gnu::always_inline]] static void backward(const Vector (&m)[kTimes], Vector (&y)[2]) {
    y[0] = Simd::add(m[0], Simd::add(m[1], m[2]));
    y[1] = Simd::add(m[3], Simd::subtract(m[1], m[2]));
  }

  [[gnu::always_inline]] static void values(const Vector (&g)[3], Vector (&v)[kTimes]) {
    const Vector half = Simd::set(0.5f);
    const Vector even = Simd::multiply(half, Simd::add(g[0], g[2]));
    const Vector odd = Simd::multiply(half, g[1]);
    v[0] = g[0];
    v[1] = Simd::add(even, odd);
    v[2] = Simd::subtract(even, odd);
    v[3] = g[2];
  }
};

// The one that Winograd's algorithm uses in space.
template <InstructionSet Simd>
struct OverTime<Simd, 4> : Winograd<Simd> {
  static constexpr Index kTimes = Winograd<Simd>::kSide;
};

}  // namespace rbln_vae
