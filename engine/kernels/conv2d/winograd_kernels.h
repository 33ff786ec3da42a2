// Transforms the packed weights of a convolution for Winograd's algorithm, and over time.
#pragma once

#include <type_traits>

#include "engine/kernels/conv2d/halving.h"
#include "engine/kernels/conv2d/over_time.h"

namespace rbln_vae {

// Transforms the weights of one panel and block: [phases][taps][512] to
// [phases][times][matrices][512], where consecutive matrices are `blocks` apart.
template <StoresImages Images, InstructionSet Simd>
class WinogradKernels {
  using T = typename Images::T;
  using Vector = typename Simd::Vector;
  static constexpr Index kSide = 6;
  static_assert(kSide * kSide == WinogradStep::kMatrices);

 public:
  static void run(const WinogradStep& s, const Context& context, Index item) {
    switch (s.at_once) {
      case 2: return run<2>(s, context, item);
      case 4: return run<4>(s, context, item);
      default: return run<1>(s, context, item);
    }
  }

 private:
  template <Index kFrames>
  static void run(const WinogradStep& s, const Context& context, Index item) {
    using Times = OverTime<Simd, kFrames>;
    const Index panel = item / s.blocks;
    const Index block = item % s.blocks;
    const Index step = s.blocks * kPanelBlock;
    for (Index phase = 0; phase < s.phases; ++phase) {
      const Index at = panel * s.phases + phase;
      const T* from = static_cast<const T*>(s.weights) +
                      (at * s.packed_blocks() + s.skipped + block) * s.kTaps * kPanelBlock;
      float* kernels =
          s.kept != nullptr ? s.kept : reinterpret_cast<float*>(context.at(s.kernels));
      float* to =
          kernels + (at * Times::kTimes * s.kMatrices * s.blocks + block) * kPanelBlock;
      for (Index k = 0; k < kBlock; ++k, to += kPanel) {
        Vector taps[Times::kTimes][9];
        for (Index i = 0; i < s.kTaps; ++i) {
          if constexpr (kFrames == 1) {
            taps[0][i] = tap(from + i * kPanelBlock, k);
          } else {
            Vector g[3], v[Times::kTimes];
            for (Index frame = 0; frame < 3; ++frame) {
              g[frame] = tap(from + (frame * s.blocks * s.kTaps + i) * kPanelBlock, k);
            }
            Times::values(g, v);
            for (Index time = 0; time < Times::kTimes; ++time) taps[time][i] = v[time];
          }
        }
        for (Index time = 0; time < Times::kTimes; ++time) {
          float* const all = to + time * s.kMatrices * step;
          s.stride == 2 ? transform<Halving<Simd>>(taps[time], all, step)
                        : transform<Winograd<Simd>>(taps[time], all, step);
        }
      }
    }
  }

  // The weights of a tap for 16 output channels and one input channel of a block.
  static Vector tap(const T* block, Index channel) {
    if constexpr (panel_index(static_cast<const T*>(nullptr), 0, 1) == 1) {
      return Images::load_elements(block + panel_index(block, channel, 0));
    } else if constexpr (requires { Images::load_alternate(block, channel); }) {
      // Two input channels are side by side.
      const Index pair = channel & ~Index{1};
      return Images::load_alternate(block + panel_index(block, pair, 0), channel & 1);
    } else {
      alignas(64) float lanes[kPanel];
      for (Index n = 0; n < kPanel; ++n) lanes[n] = to_float(block[panel_index(block, channel, n)]);
      return Simd::load(lanes);
    }
  }

  // Transforms the kernels of 16 output channels for one input channel.
  template <class Algorithm>
  static void transform(const Vector (&taps)[9], float* to, Index step) {
    Vector rows[kSide][3];
    for (Index x = 0; x < 3; ++x) {
      Vector g[3], v[kSide];
      for (Index y = 0; y < 3; ++y) g[y] = taps[y * 3 + x];
      Algorithm::values(g, v);
      for (Index y = 0; y < kSide; ++y) rows[y][x] = v[y];
    }
    for (Index y = 0; y < kSide; ++y) {
      Vector v[kSide];
      Algorithm::values(rows[y], v);
      for (Index x = 0; x < kSide; ++x) Simd::store(to + (y * kSide + x) * step, v[x]);
    }
  }
};

}  // namespace rbln_vae
