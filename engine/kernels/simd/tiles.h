// AMX tiles: eight registers of 16 rows of 64 bytes.
//
// With RBLN_VAE_EMULATE_TILES they are plain memory, so that kernels can be tested on any machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "engine/kernels/element.h"

namespace rbln_vae::amx_bf16 {

constexpr Index kTileRows = 16;
constexpr Index kTileBytes = 64;  // of a row

#if defined(RBLN_VAE_EMULATE_TILES)

struct Tile {
  alignas(64) unsigned char rows[kTileRows][kTileBytes];
};

// As on the processor, no tile can be used before they are begun, or after their end.
struct TileRegisters {
  bool begun = false;
  Tile all[8];
};

static inline TileRegisters& tiles() {
  thread_local TileRegisters found;
  return found;
}

static inline Tile& tile(int number) {
  if (!tiles().begun) std::abort();
  return tiles().all[number];
}

static inline void begin_tiles() {
  std::memset(static_cast<void*>(tiles().all), 0xff, sizeof tiles().all);
  tiles().begun = true;
}
static inline void end_tiles() { tiles().begun = false; }
static inline void tiles_read_memory() {}
static inline void prefetch(const void*) {}

template <int kTile>
static inline void zero_tile() {
  std::memset(tile(kTile).rows, 0, sizeof(Tile));
}

template <int kTile>
static inline void load_tile(const void* from, Index stride) {
  for (Index row = 0; row < kTileRows; ++row) {
    std::memcpy(tile(kTile).rows[row], static_cast<const char*>(from) + row * stride,
                kTileBytes);
  }
}

template <int kTile>
static inline void store_tile(void* to, Index stride) {
  for (Index row = 0; row < kTileRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile(kTile).rows[row], kTileBytes);
  }
}

// sum[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]
template <int kSum, int kA, int kB>
static inline void multiply_tiles() {
  for (Index m = 0; m < kTileRows; ++m) {
    float sums[16];
    std::memcpy(sums, tile(kSum).rows[m], sizeof sums);
    BFloat16 a[32];
    std::memcpy(a, tile(kA).rows[m], sizeof a);
    for (Index k = 0; k < 16; ++k) {
      BFloat16 b[32];
      std::memcpy(b, tile(kB).rows[k], sizeof b);
      for (Index n = 0; n < 16; ++n) {
        sums[n] += to_float(a[2 * k]) * to_float(b[2 * n]);
        sums[n] += to_float(a[2 * k + 1]) * to_float(b[2 * n + 1]);
      }
    }
    std::memcpy(tile(kSum).rows[m], sums, sizeof sums);
  }
}

#else

// The memory layout that the instruction LDTILECFG reads.
struct TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The number of a tile is part of the instruction. It is passed through inline assembly, because
// the compiler's intrinsics do not accept template parameters.

static inline void begin_tiles() {
  alignas(64) static constexpr TileConfig config;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
static inline void end_tiles() { __asm__ volatile("tilerelease"); }

// The loads below do not tell the compiler that they read memory, so that it need not write out
// all values before each of them. This function does so once.
static inline void tiles_read_memory() { __asm__ volatile("" : : : "memory"); }

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

template <int kTile>
static inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
static inline void load_tile(const void* from, Index stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile));
}

template <int kTile>
static inline void store_tile(void* to, Index stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(stride), "i"(kTile)
                   : "memory");
}

template <int kSum, int kA, int kB>
static inline void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                   :
                   : "i"(kSum), "i"(kA), "i"(kB));
}

#endif

}  // namespace rbln_vae::amx_bf16
