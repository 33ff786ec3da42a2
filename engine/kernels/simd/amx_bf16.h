// AMX: products of 16 pixels by 16 channels over 32 input channels, in tile registers.
//
// Six tiles hold sums: three rows of 32 pixels, or six rows of 16, for one panel of channels. So
// each tile of weights is used six times, and the taps share rows of the image while these are in
// the L1 cache. Later weights are prefetched, and the vector units process the epilogue of the
// previous product meanwhile.
#pragma once

#include "engine/kernels/simd/gemm.h"
#include "engine/kernels/simd/tiles.h"

namespace rbln_vae::amx_bf16 {

struct Products {
  using T = BFloat16;
  using Scratch = T;

  static constexpr Index kMaxRows = 3;
  static constexpr Index kMaxPixels = 32;
  static constexpr Index kMaxPanels = 1;
  static constexpr bool kOverlaps = true;
  static constexpr bool kWholeTiles = true;
  static constexpr Index kPrefetchTurns = 1;

  static constexpr Index sums_pitch(Index pixels) { return pixels > kTileRows ? 32 : 16; }
  static constexpr Index rows_at_once(Index pixels) { return pixels > kTileRows ? 3 : 6; }

  static void enter() { begin_tiles(); }
  static void leave() { end_tiles(); }

  static void gemm(const Gemm<T>& g) {
    gemm(g, [] {});
  }

  // Calls `meanwhile` once for each block and tap.
  template <class Meanwhile>
  static void gemm(const Gemm<T>& g, Meanwhile&& meanwhile) {
    tiles_read_memory();
    if (g.pixels > kTileRows) {
      switch (g.rows) {
        case 1: return product<1, 2>(g, meanwhile);
        case 2: return product<2, 2>(g, meanwhile);
        default: return product<3, 2>(g, meanwhile);
      }
    }
    switch (g.rows) {
      case 1: return product<1, 1>(g, meanwhile);
      case 2: return product<2, 1>(g, meanwhile);
      case 3: return product<3, 1>(g, meanwhile);
      case 4: return product<4, 1>(g, meanwhile);
      case 5: return product<5, 1>(g, meanwhile);
      default: return product<6, 1>(g, meanwhile);
    }
  }

 private:
  static constexpr int kWeights = 6;
  static constexpr int kImage = 7;
  // Bytes of a tile of weights, and the number of tiles to prefetch ahead.
  static constexpr Index kWeightBytes = kTileRows * kTileBytes;
  static constexpr Index kAhead = 3;

  template <int kRows, int kAcross, int kTile = 0>
  static void clear() {
    zero_tile<kTile>();
    if constexpr (kTile + 1 < kRows * kAcross) clear<kRows, kAcross, kTile + 1>();
  }

  // Multiplies one tile of weights with all tiles of the image. Each product also prefetches a
  // part of later weights.
  template <int kRows, int kAcross, int kTile = 0>
  static void multiply_all(const T* a, Index row_step, Index pixel_step, const char* ahead) {
    constexpr int kSums = kRows * kAcross;
    load_tile<kImage>(a + kTile / kAcross * row_step + kTile % kAcross * kTileRows * pixel_step,
                      pixel_step * static_cast<Index>(sizeof(T)));
    multiply_tiles<kTile, kImage, kWeights>();
    constexpr int kBegin = 16 * kTile / kSums;
    constexpr int kEnd = 16 * (kTile + 1) / kSums;
    for (int line = kBegin; line < kEnd; ++line) prefetch(ahead + line * kTileBytes);
    if constexpr (kTile + 1 < kSums) {
      multiply_all<kRows, kAcross, kTile + 1>(a, row_step, pixel_step, ahead);
    }
  }

  template <int kRows, int kAcross, int kTile = 0>
  static void store_all(float* c) {
    constexpr Index pitch = kAcross * kTileRows;
    store_tile<kTile>(c + (kTile / kAcross * pitch + kTile % kAcross * kTileRows) * kPanel,
                      kPanel * static_cast<Index>(sizeof(float)));
    if constexpr (kTile + 1 < kRows * kAcross) store_all<kRows, kAcross, kTile + 1>(c);
  }

  template <int kRows, int kAcross, class Meanwhile>
  static void product(const Gemm<T>& g, Meanwhile& meanwhile) {
    const Index row_step = g.row_step;
    const Index pixel_step = g.pixel_step;
    const T* b = g.b;
    clear<kRows, kAcross>();
    for (Index block = 0; block < g.blocks; ++block) {
      const T* plane = g.a + block * g.plane;
      for (Index tap = 0; tap < g.tap_count; ++tap) {
        load_tile<kWeights>(b, kTileBytes);
        multiply_all<kRows, kAcross>(plane + g.taps[tap], row_step, pixel_step,
                                 reinterpret_cast<const char*>(b) + kAhead * kWeightBytes);
        b += kPanelBlock;
        meanwhile();
      }
    }
    store_all<kRows, kAcross>(g.c);
  }
};

}  // namespace rbln_vae::amx_bf16
