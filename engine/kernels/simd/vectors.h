// Images and products in the compiler's vector extensions, for any processor: a vector of 16 floats
// is as many registers as it takes.
//
// `Set` gives a type Register of floats, multiply_add(a, b, c) = a * b + c, and kMaxPixels for
// `Broadcast`. Its name is a part of those of all functions here, so that instruction sets share none.
#pragma once

#include <concepts>
#include <cstring>
#include <utility>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "engine/kernels/simd/broadcast.h"

namespace rbln_vae {

template <class Set>
struct Vectors {
  using Register = typename Set::Register;
  // The bits of a register; all ones or zeros for each lane of a comparison.
  using Bits = decltype(Register{} < Register{});
  static constexpr int kLanes = sizeof(Register) / sizeof(float);
  static constexpr int kRegisters = kPanel / kLanes;
  struct Vector {
    Register part[kRegisters];
  };

  // A vector of f(0), f(1) and so on. It is no loop, which would keep the parts in memory unless the
  // compiler unrolls it early.
  template <class F>
  static Vector each(F&& f) {
    return each(f, std::make_integer_sequence<int, kRegisters>());
  }

  static Register spread(float x) { return spread(x, std::make_integer_sequence<int, kLanes>()); }
  static Register fetch(const void* p) {
    Register r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, Register r) { std::memcpy(p, &r, sizeof r); }
  // Every second of twice as many elements as a register has, from the given one on.
  static Register alternate(const BFloat16* p, Index from) {
    const Bits pairs = (Bits)fetch(p);
    return (Register)(from == 0 ? pairs << 16 : pairs & -0x10000);
  }
  // Of a NaN and another, the second.
  static Register maximum(Register a, Register b) { return a > b ? a : b; }
  // 2 to the power of x, to float32's precision: a Taylor polynomial of the fraction in
  // [-1/2, 1/2]; the integer part goes into the exponent.
  static Register exp2(Register x) {
    // The range in which the result is a normal number; a NaN stays one.
    x = maximum(spread(-126.0f), x);
    x = spread(126.0f) < x ? spread(126.0f) : x;
    // Adding 1.5 * 2^23 rounds to an integer, which the last bits of the sum are.
    const Register sum = x + 0x1.8p23f;
    const Register f = x - (sum - 0x1.8p23f);
    Register p = spread(1.5403530393381609e-4f);
    for (const float next : {1.3333558146428443e-3f, 9.6181291076284772e-3f, 5.5504108664821580e-2f,
                             2.4022650695910072e-1f, 6.9314718055994531e-1f, 1.0f}) {
      p = Set::multiply_add(p, f, spread(next));
    }
    return p * (Register)(((Bits)sum << 23) + (127 << 23));
  }
  static Register silu(Register x) { return x / (exp2(x * -1.44269504088896341f) + 1.0f); }

  static Vector set(float x) {
    return each([&](int) { return spread(x); });
  }
  static Vector load(const float* p) {
    return each([&](int i) { return fetch(p + i * kLanes); });
  }
  // Each register alone: GCC copies several through others, eight bytes at a time.
  static void store(float* p, const Vector& v) {
    store(p, v, std::make_integer_sequence<int, kRegisters>());
  }
  static Vector add(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
  }
  static Vector subtract(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
  }
  static Vector multiply(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
  }
  static Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
    return each([&](int i) { return Set::multiply_add(a.part[i], b.part[i], c.part[i]); });
  }
  static Vector maximum(const Vector& a, const Vector& b) {
    return each([&](int i) { return maximum(a.part[i], b.part[i]); });
  }
  static Vector magnitude(const Vector& v) {
    return each([&](int i) { return (Register)((Bits)v.part[i] & 0x7fffffff); });
  }
  static float largest(const Vector& v) {
    Register most = v.part[0];
    for (int i = 1; i < kRegisters; ++i) most = maximum(most, v.part[i]);
    float result = most[0];
    for (int i = 1; i < kLanes; ++i) result = most[i] > result ? most[i] : result;
    return result;
  }
  static float sum(const Vector& v) {
    Register sums = v.part[0];
    for (int i = 1; i < kRegisters; ++i) sums = sums + v.part[i];
    float result = 0;
    for (int i = 0; i < kLanes; ++i) result += sums[i];
    return result;
  }
  static Vector exp2(const Vector& v) {
    return each([&](int i) { return exp2(v.part[i]); });
  }
  static Vector silu(const Vector& v) {
    return each([&](int i) { return silu(v.part[i]); });
  }

 private:
  template <class F, int... i>
  static Vector each(F& f, std::integer_sequence<int, i...>) {
    return {{f(i)...}};
  }
  template <int... i>
  static void store(float* p, const Vector& v, std::integer_sequence<int, i...>) {
    (store(p + i * kLanes, v.part[i]), ...);
  }
  template <int... lane>
  static Register spread(float x, std::integer_sequence<int, lane...>) {
    return Register{(static_cast<void>(lane), x)...};
  }
};

// Images with elements of any type; the compiler vectorises their conversion.
template <class Set, class Element>
struct Images : Vectors<Set> {
  using T = Element;
  using typename Vectors<Set>::Vector;

  static Vector load_elements(const T* p) {
    if constexpr (std::same_as<T, float>) return Vectors<Set>::load(p);
    alignas(64) float lanes[kPanel];
    for (Index i = 0; i < kPanel; ++i) lanes[i] = to_float(p[i]);
    return Vectors<Set>::load(lanes);
  }
  // Every second of 32 elements, from the given one on.
  static Vector load_alternate(const T* p, Index from)
    requires std::same_as<T, BFloat16>
  {
    return Vectors<Set>::each(
        [&](int i) { return Vectors<Set>::alternate(p + 2 * i * Vectors<Set>::kLanes, from); });
  }
  static void store_elements(T* p, const Vector& v) {
    if constexpr (std::same_as<T, float>) return Vectors<Set>::store(p, v);
    alignas(64) float lanes[kPanel];
    Vectors<Set>::store(lanes, v);
    for (Index i = 0; i < kPanel; ++i) from_float(lanes[i], p[i]);
  }
};

// The registers for `Broadcast`: products in float32, with weights of any type.
template <class Set, class Element>
struct Products {
  using T = Element;
  using Scratch = float;
  using Vector = typename Set::Register;
  using Weights = Vector;
  static constexpr int kLanes = Vectors<Set>::kLanes;
  static constexpr int kPerPanel = Vectors<Set>::kRegisters;
  static constexpr int kChannels = 1;
  static constexpr int kUnrolled = 1;
  static constexpr bool kPrefetchesPixels = true;
  static constexpr Index kMaxPixels = Set::kMaxPixels;
  static constexpr Index kMaxPanels = 1;

  static Vector zero() { return Vector{}; }
  static Vector spread(const float* p) { return Vectors<Set>::spread(*p); }
  static Vector dot(Vector x, Weights w, Vector sum) { return Set::multiply_add(x, w, sum); }
  static void store(float* p, Vector v) { Vectors<Set>::store(p, v); }

  static Weights weights(const float* p, int) { return Vectors<Set>::fetch(p); }
  static Weights weights(const Float16* p, int) {
#if defined(__aarch64__)
    // GCC would convert each alone.
    static_assert(kLanes == 4);
    return (Weights)vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p)));
#else
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(p[i]);
    return Vectors<Set>::fetch(lanes);
#endif
  }
  // They are in pairs of input channels, the first one in the lower half.
  static Weights weights(const BFloat16* p, int channel) {
    return Vectors<Set>::alternate(p, channel);
  }
};

}  // namespace rbln_vae
