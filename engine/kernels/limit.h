// Measures the peak of an instruction set, in products per second, with which kernels are
// compared. It uses random data, since the clock speed falls as the power consumption rises.
#pragma once

#include <chrono>
#include <random>

#include "engine/kernels/element.h"

namespace rbln_vae {

// The floating-point operations per second of one thread that calls `work`, which returns the
// number of its operations, for at least `seconds`.
template <class Work>
double operations_per_second(double seconds, Work&& work) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  double done = 0;
  for (;;) {
    done += work();
    const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    if (elapsed >= seconds) return done / elapsed;
  }
}

// Random elements from -1 to 1; few enough to fit in the L1 cache.
template <class T, Index kCount>
struct RandomElements {
  alignas(64) T values[kCount];

  RandomElements() {
    std::minstd_rand random(1);
    for (T& value : values) {
      from_float(static_cast<float>(random() % 2001) / 1000.0f - 1.0f, value);
    }
  }
};

// The peak of products that are summed in registers, with enough independent sums to hide their
// latency.
template <class Weights, int kSums>
double limit_of_products(double seconds) {
  using T = typename Weights::T;
  using Vector = typename Weights::Vector;
  constexpr Index kLanes = sizeof(Vector) / sizeof(float);
  constexpr Index kStep = kLanes * Weights::kChannels;
  constexpr Index kTurns = 32;
  static_assert(kSums <= 24);  // as the loops below are unrolled
  const RandomElements<T, 2 * kTurns * kStep> data;
  // Sums are stored here; without that, the compiler would remove them.
  alignas(64) float kept[kSums * kLanes] = {};
  return operations_per_second(seconds, [&] {
    constexpr int kRepeats = 1000;
    Vector sums[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {  // all different, or the compiler merges them
      sums[i] = Weights::dot(Weights::spread(data.values + i * Weights::kChannels),
                              Weights::weights(data.values + i * kStep, 0), Weights::zero());
    }
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      for (Index turn = 0; turn < kTurns; ++turn) {
        const auto w = Weights::weights(data.values + turn * kStep, 0);
        const auto x = Weights::spread(data.values + (kTurns + turn) * kStep);
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) sums[i] = Weights::dot(x, w, sums[i]);
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) Weights::store(kept + i * kLanes, sums[i]);
    __asm__ volatile("" : : "r"(kept) : "memory");  // all of them may be read
    return 2.0 * kRepeats * kTurns * kSums * kStep;
  });
}

}  // namespace rbln_vae
