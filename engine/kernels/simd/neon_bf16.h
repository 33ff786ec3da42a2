// Arm with the products of bfloat16 of Armv8.2 and later: of pairs of input channels, summed in
// float32. Everything else is as portable, since the compiler makes the same instructions of it.
#pragma once

#include <arm_neon.h>

#include "engine/kernels/simd/vectors.h"

namespace rbln_vae::neon_bf16 {

struct Registers {
  using Register = float __attribute__((vector_size(16)));
  static constexpr Index kMaxPixels = 5;
  static Register multiply_add(Register a, Register b, Register c) { return a * b + c; }
};

struct BFloat16Images : Images<Registers, BFloat16> {
  static void store_elements(T* p, const Vector& v) {
    for (int i = 0; i < kRegisters; i += 2) {
      const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)v.part[i]);
      const bfloat16x8_t both = vcvtq_high_bf16_f32(low, (float32x4_t)v.part[i + 1]);
      std::memcpy(p + i * kLanes, &both, sizeof both);
    }
  }
};

// The registers for `Broadcast`. BFMMLA would multiply twice as much at once, but needs four input
// channels side by side, where weights are packed in pairs for all processors.
struct BFloat16Products {
  using T = BFloat16;
  using Scratch = T;
  using Vector = float32x4_t;
  using Weights = bfloat16x8_t;
  static constexpr int kPerPanel = 4;
  static constexpr int kChannels = 2;
  static constexpr int kUnrolled = 1;               // more were not measured
  static constexpr bool kPrefetchesPixels = false;  // not measured
  static constexpr Index kMaxPixels = Registers::kMaxPixels;
  static constexpr Index kMaxPanels = 1;
  static Vector zero() { return vdupq_n_f32(0.0f); }
  static Weights weights(const T* p, int) {
    Weights w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  // The instruction takes them of any lane.
  static bfloat16x4_t spread(const T* p) {
    float pair;
    std::memcpy(&pair, p, sizeof pair);
    return vreinterpret_bf16_f32(vset_lane_f32(pair, vdup_n_f32(0.0f), 0));
  }
  static Vector dot(bfloat16x4_t x, Weights w, Vector sum) {
    return vbfdotq_lane_f32(sum, w, x, 0);
  }
  static void store(float* p, Vector v) { vst1q_f32(p, v); }
};

}  // namespace rbln_vae::neon_bf16
