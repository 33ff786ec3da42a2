// The matrix product that every kernel uses, and the memory layout of its operands.
#pragma once

#include "engine/kernels/element.h"
#include "engine/steps.h"

namespace rbln_vae {

// Elements of a weight panel for one block of 32 channels and one tap.
constexpr Index kPanelBlock = kBlock * kPanel;

// The index of input channel `k` (0 to 31) and output channel `n` (0 to 15) in a weight panel.
// Products of bfloat16 take two input channels at once.
[[maybe_unused]] static constexpr Index panel_index(const float*, Index k, Index n) {
  return k * kPanel + n;
}
[[maybe_unused]] static constexpr Index panel_index(const Float16*, Index k, Index n) {
  return k * kPanel + n;
}
[[maybe_unused]] static constexpr Index panel_index(const BFloat16*, Index k, Index n) {
  return (k / 2) * 2 * kPanel + n * 2 + k % 2;
}

// The shape of products in vector registers, which compute a row of up to `kPixels` pixels for up
// to `kPanels` panels.
template <Index kPixels, Index kPanels>
struct RowProducts {
  static constexpr Index kMaxRows = 1;
  static constexpr Index kMaxPixels = kPixels;
  static constexpr Index kMaxPanels = kPanels;
  static constexpr bool kOverlaps = false;
  static constexpr bool kWholeTiles = false;
  static constexpr Index kPrefetchTurns = 1;

  static constexpr Index sums_pitch(Index) { return kPixels; }
  static constexpr Index rows_at_once(Index) { return kMaxRows; }
  static void enter() {}
  static void leave() {}
};

// Whether the run ends, asked where no sum is in registers. What the caller does meanwhile may use
// the unit of products and leave it, so the item enters it again.
template <class Simd>
static bool interrupted(const Context& context) {
  const bool result = stopped(context);
  Simd::enter();
  return result;
}

// Sums over blocks and taps, for `rows` x `pixels` output pixels and `panels` panels:
//
//   c[panel][row][pixel][n] = sum over block, tap, k of
//       a[block * plane + taps[tap] + row * row_step + pixel * pixel_step + k]
//     * b[panel * panel_step + (block * tap_count + tap) * 512 + (k, n)]
//
// In c, rows are sums_pitch(pixels) pixels apart, and panels are `rows` rows apart. All steps count
// elements. Only the first `last_channels` of the last block are summed: the others are zero.
// Pixels are in the scratch, as float32 if weights of a narrower type are multiplied in float32.
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
  // Memory to prefetch meanwhile; may be null. It is as large as a panel of weights, divided by the
  // number of products that take turns to prefetch one: kPrefetchTurns, or 1.
  const T* ahead = nullptr;
  Index turns = 1;
};

}  // namespace rbln_vae
