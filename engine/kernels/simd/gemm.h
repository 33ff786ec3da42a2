// The one product that every kernel is made of, and how its operands lie in memory.
#pragma once

#include "engine/kernels/element.h"

namespace rbln_vae {

// Elements of a weight panel for one block of 32 channels and one tap.
constexpr Index kPanelBlock = kBlock * kPanel;

// Where input channel `k` (0 to 31) and output channel `n` (0 to 15) lie in it: bfloat16
// products take two input channels at once.
[[maybe_unused]] static constexpr Index panel_index(const float*, Index k, Index n) {
  return k * kPanel + n;
}
[[maybe_unused]] static constexpr Index panel_index(const BFloat16*, Index k, Index n) {
  return (k / 2) * 2 * kPanel + n * 2 + k % 2;
}

// The shape of products that make a row of up to `kPixels` pixels, for up to `kPanels` panels,
// in the registers of vectors.
template <Index kPixels, Index kPanels>
struct RowProducts {
  static constexpr Index kMaxRows = 1;
  static constexpr Index kMaxPixels = kPixels;
  static constexpr Index kMaxPanels = kPanels;
  static constexpr bool kOverlaps = false;
  static constexpr bool kWholeTiles = false;

  static constexpr Index sums_pitch(Index) { return kPixels; }
  static constexpr Index rows_at_once(Index) { return kMaxRows; }
  static void enter() {}
  static void leave() {}
};

// Sums over blocks and taps, for `rows` x `pixels` output pixels and `panels` panels:
//
//   c[panel][row][pixel][n] = sum over block, tap, k of
//       a[block * plane + taps[tap] + row * row_step + pixel * pixel_step + k]
//     * b[panel * panel_step + (block * tap_count + tap) * 512 + (k, n)]
//
// Rows of c are sums_pitch(pixels) of the instruction set apart, panels `rows` of them.
// All steps count elements. Only the first `last_channels` of the last block are summed: the others
// are zero. Pixels lie in the scratch, in float32 where weights of bfloat16 are multiplied in it.
template <class T, class Scratch = T>
struct Gemm {
  const Scratch* a;
  Index row_step;
  Index pixel_step;
  const Index* taps;
  Index tap_count;
  Index blocks;
  Index plane;
  Index last_channels;
  const T* b;
  Index panel_step;
  float* c;
  Index rows;
  Index pixels;
  Index panels;
  // What is to be fetched meanwhile, as much as one panel of weights; may be null.
  const T* ahead = nullptr;
};

}  // namespace rbln_vae
