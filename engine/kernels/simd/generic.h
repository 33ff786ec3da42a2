// Plain C++ for any machine, with which all other instruction sets are compared in tests.
#pragma once

#include <cmath>

#include "engine/kernels/simd/gemm.h"

namespace rbln_vae::generic {

struct Vectors {
  struct Vector {
    float lane[kPanel];
  };

  template <class F>
  static Vector each(F&& f) {
    Vector v;
    for (Index i = 0; i < kPanel; ++i) v.lane[i] = f(i);
    return v;
  }

  static Vector set(float x) {
    return each([&](Index) { return x; });
  }
  static Vector load(const float* p) {
    return each([&](Index i) { return p[i]; });
  }
  static void store(float* p, const Vector& v) {
    for (Index i = 0; i < kPanel; ++i) p[i] = v.lane[i];
  }
  static Vector add(const Vector& a, const Vector& b) {
    return each([&](Index i) { return a.lane[i] + b.lane[i]; });
  }
  static Vector subtract(const Vector& a, const Vector& b) {
    return each([&](Index i) { return a.lane[i] - b.lane[i]; });
  }
  static Vector multiply(const Vector& a, const Vector& b) {
    return each([&](Index i) { return a.lane[i] * b.lane[i]; });
  }
  static Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
    return each([&](Index i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Vector maximum(const Vector& a, const Vector& b) {
    return each([&](Index i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vector magnitude(const Vector& v) {
    return each([&](Index i) { return std::fabs(v.lane[i]); });
  }
  static float largest(const Vector& v) {
    float result = v.lane[0];
    for (Index i = 1; i < kPanel; ++i) result = v.lane[i] > result ? v.lane[i] : result;
    return result;
  }
  static float sum(const Vector& v) {
    float result = 0;
    for (Index i = 0; i < kPanel; ++i) result += v.lane[i];
    return result;
  }
  // 2 to the power of x.
  static Vector exp2(const Vector& v) {
    return each([&](Index i) { return std::exp2(v.lane[i]); });
  }
  static Vector silu(const Vector& v) {
    return each([&](Index i) { return v.lane[i] / (1.0f + std::exp(-v.lane[i])); });
  }
};

template <class Element>
struct Images : Vectors {
  using T = Element;

  static Vector load_elements(const T* p) {
    return each([&](Index i) { return to_float(p[i]); });
  }
  static void store_elements(T* p, const Vector& v) {
    for (Index i = 0; i < kPanel; ++i) from_float(v.lane[i], p[i]);
  }
};

// Products in float32, for weights of any type.
template <class Element>
struct Products : RowProducts<16, 1> {
  using T = Element;
  using Scratch = float;

  static void gemm(const Gemm<T, Scratch>& g) {
    float sums[kMaxPixels][kPanel] = {};
    for (Index block = 0; block < g.blocks; ++block) {
      const Index channels = block + 1 < g.blocks ? kBlock : g.last_channels;
      for (Index tap = 0; tap < g.tap_count; ++tap) {
        const float* a = g.a + block * g.plane + g.taps[tap];
        const T* b = g.b + (block * g.tap_count + tap) * kPanelBlock;
        // Converted once for all pixels, whose sums stay in registers meanwhile.
        float weights[kBlock][kPanel];
        for (Index k = 0; k < channels; ++k) {
          for (Index n = 0; n < kPanel; ++n) weights[k][n] = to_float(b[panel_index(b, k, n)]);
        }
        for (Index pixel = 0; pixel < g.pixels; ++pixel) {
          float lanes[kPanel];
          for (Index n = 0; n < kPanel; ++n) lanes[n] = sums[pixel][n];
          for (Index k = 0; k < channels; ++k) {
            const float x = a[pixel * g.pixel_step + k];
            for (Index n = 0; n < kPanel; ++n) lanes[n] += x * weights[k][n];
          }
          for (Index n = 0; n < kPanel; ++n) sums[pixel][n] = lanes[n];
        }
      }
    }
    for (Index pixel = 0; pixel < g.pixels; ++pixel) {
      for (Index n = 0; n < kPanel; ++n) g.c[pixel * kPanel + n] = sums[pixel][n];
    }
  }
};

}  // namespace rbln_vae::generic
