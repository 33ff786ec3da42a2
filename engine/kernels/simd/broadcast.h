// Products for instruction sets whose registers hold rows of output channels: one input value is
// broadcast to a register and multiplied with many weights.
#pragma once

#include <utility>

#include "engine/kernels/simd/gemm.h"

namespace rbln_vae {

// `Set` gives the element types T of weights and Scratch of pixels, a register type Vector, and:
//   kPerPanel     registers that hold a panel of 16 channels
//   kMaxPixels    pixels whose sums, for kMaxPanels panels, all fit in registers
//   kChannels     input channels of one product: 1, or 2 in bfloat16
//   kUnrolled     input channels of a turn of the loop. If there are several, as many products
//                 share in prefetching weights: for registers whose products leave few loads to spare
//   kPrefetchesPixels   whether the pixels of the next block are prefetched, since the hardware
//                       doesn't follow so many short rows
//   Weights, weights(p, k)   a register of weights at p, for input channel k of adjacent ones
//   spread(p)                the input channels at p, in every lane
//   dot(x, w, sum)           the product, added to a sum
//   zero(), store(p, v)
template <class Set>
class Broadcast : public RowProducts<Set::kMaxPixels, Set::kMaxPanels> {
 public:
  using T = typename Set::T;
  using Scratch = typename Set::Scratch;

 private:
  using Operands = Gemm<T, Scratch>;
  // The number of input channels whose weights are adjacent.
  static constexpr int kSideBySide = panel_index(static_cast<const T*>(nullptr), 0, 1);
  static constexpr int kLanes = kPanel / Set::kPerPanel;
  // Rows of weights of a turn of the loop over input channels. Beyond the last channel are zeros.
  static constexpr int kSteps = Set::kUnrolled > 1 ? Set::kUnrolled / kSideBySide : 1;
  // Instead of the steps from one line that is prefetched to the next: there is none to prefetch.
  static constexpr int kNever = 0;

  // Pixels, panels and the distance of pixels are template parameters, so that sums stay in
  // registers and addresses are constants.
  template <int kPixels, int kPanels, int kDistance, int kEvery>
  static void product(const Operands& g) {
    constexpr int kColumns = kPanels * Set::kPerPanel;
    constexpr Index kRow = kPanel * kSideBySide;
    // A loop that is not fully unrolled would keep its sums in memory.
    static_assert(kPixels <= 16 && kColumns <= 4 && kSideBySide <= 2 * Set::kChannels);
    typename Set::Vector sums[kPixels][kColumns];
#pragma GCC unroll 16
    for (int m = 0; m < kPixels; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sums[m][n] = Set::zero();
    }
    const T* b = g.b;
    // A condition in the loop would take longer than to prefetch what is there already.
    [[maybe_unused]] const T* ahead = g.ahead != nullptr ? g.ahead : g.b;
    const Index panel_step = g.panel_step;
    for (Index block = 0; block < g.blocks; ++block) {
      const Index channels = block + 1 < g.blocks ? kBlock : g.last_channels;
      for (Index tap = 0; tap < g.tap_count; ++tap) {
        const Scratch* a = g.a + block * g.plane + g.taps[tap];
        const T* w = b;
        if (Set::kPrefetchesPixels && g.tap_count == 1) {
          const Scratch* next = a + g.plane;
#pragma GCC unroll 16
          for (int m = 0; m < kPixels; ++m) {
            __builtin_prefetch(next + m * kDistance, 0, 3);
            __builtin_prefetch(next + m * kDistance + kBlock / 2, 0, 3);
          }
        }
        for (Index k = 0; k < channels; k += kSteps * kSideBySide) {
#pragma GCC unroll 4
          for (int step = 0; step < kSteps; ++step) {
            if constexpr (kEvery != kNever) {
              if (step % kEvery == 0) {
                __builtin_prefetch(ahead, 0, 2);
                ahead += kRow;
              }
            }
#pragma GCC unroll 2
            for (int channel = 0; channel < kSideBySide; channel += Set::kChannels) {
              typename Set::Weights weights[kColumns];
#pragma GCC unroll 4
              for (int n = 0; n < kColumns; ++n) {
                weights[n] = Set::weights(w + n / Set::kPerPanel * panel_step +
                                              n % Set::kPerPanel * kLanes * kSideBySide,
                                          channel);
              }
#pragma GCC unroll 16
              for (int m = 0; m < kPixels; ++m) {
                const auto x = Set::spread(a + m * kDistance + channel);
#pragma GCC unroll 4
                for (int n = 0; n < kColumns; ++n) {
                  sums[m][n] = Set::dot(x, weights[n], sums[m][n]);
                }
              }
            }
            a += kSideBySide;
            w += kRow;
            // Loads of the next step, if they were moved up here, would take the registers of sums.
            if constexpr (kSteps > 1) __asm__ volatile("" : : : "memory");
          }
        }
        b += kPanelBlock;
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      float* c = g.c + n / Set::kPerPanel * Set::kMaxPixels * kPanel + n % Set::kPerPanel * kLanes;
#pragma GCC unroll 16
      for (int m = 0; m < kPixels; ++m) Set::store(c + m * kPanel, sums[m][n]);
    }
  }

  using Product = void (*)(const Operands&);

  template <int kPanels, int kDistance, int kEvery, int... kPixels>
  static void dispatch(const Operands& g, std::integer_sequence<int, kPixels...>) {
    static constexpr Product table[] = {product<kPixels + 1, kPanels, kDistance, kEvery>...};
    table[g.pixels - 1](g);
  }

  template <int kPanels, int kDistance>
  static void dispatch(const Operands& g) {
    constexpr auto pixels = std::make_integer_sequence<int, Set::kMaxPixels>();
    if constexpr (kSteps > 1) {
      if (g.ahead == nullptr) return dispatch<kPanels, kDistance, kNever>(g, pixels);
      if (g.turns > 1) return dispatch<kPanels, kDistance, kSteps>(g, pixels);
    }
    dispatch<kPanels, kDistance, 1>(g, pixels);
  }

  template <int kDistance>
  static void dispatch(const Operands& g) {
    if constexpr (Set::kMaxPanels == 2) {
      if (g.panels == 2) return dispatch<2, kDistance>(g);
    }
    dispatch<1, kDistance>(g);
  }

 public:
  static constexpr Index kPrefetchTurns = kSteps;

  // The distance of pixels is one block, or two with stride 2. With larger strides there is only
  // one pixel, and the distance does not matter.
  static void gemm(const Operands& g) {
    if (g.pixel_step == 2 * kBlock) {
      dispatch<2 * kBlock>(g);
    } else {
      dispatch<kBlock>(g);
    }
  }
};

}  // namespace rbln_vae
