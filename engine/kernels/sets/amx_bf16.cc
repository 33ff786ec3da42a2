#include "engine/kernels/simd/amx_bf16.h"

#include "engine/kernels/limit.h"
#include "engine/kernels/sets/make_kernels.h"
#if defined(RBLN_VAE_EMULATE_TILES)
#include "engine/kernels/simd/generic.h"
#else
#include "engine/kernels/simd/avx512_bf16.h"
#endif

namespace rbln_vae::amx_bf16 {

#if defined(RBLN_VAE_EMULATE_TILES)
using Tiles = Joined<Images<generic::Registers, BFloat16>, Products>;
#else
using Tiles = Joined<avx512_bf16::BFloat16Images, Products>;
#endif
static_assert(InstructionSet<Tiles>);

// Six sums, with tiles of the image from the L1 cache, as in convolutions.
static double limit(double seconds) {
  constexpr Index kElements = kTileRows * kTileBytes / 2;
  constexpr int kTurns = 8;
  const RandomElements<BFloat16, (kTurns + 1) * kElements> data;
  begin_tiles();
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  zero_tile<4>();
  zero_tile<5>();
  const double result = operations_per_second(seconds, [&] {
    constexpr int kRepeats = 1000;
    tiles_read_memory();
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      load_tile<6>(data.values + kTurns * kElements, kTileBytes);
      for (int turn = 0; turn < kTurns; ++turn) {
        load_tile<7>(data.values + turn * kElements, kTileBytes);
        multiply_tiles<0, 7, 6>();
        multiply_tiles<1, 7, 6>();
        multiply_tiles<2, 7, 6>();
        multiply_tiles<3, 7, 6>();
        multiply_tiles<4, 7, 6>();
        multiply_tiles<5, 7, 6>();
      }
    }
    return 2.0 * kRepeats * kTurns * 6 * kTileRows * 16 * 32;
  });
  end_tiles();
  return result;
}

// Two tiles of the plan are in the L2 cache of 2 MiB. Products are so fast that everything else
// is expensive in comparison, and Winograd's algorithm is no gain.
constexpr Kernels bfloat16 = make_kernels<Tiles>(
    {Isa::kAmxBf16, 700'000, 192, {.product = 0.5, .norm = 256, .copy = 64, .weights = 100},
     {.input = 256, .output = 200, .product = 1.5}, limit});

}  // namespace rbln_vae::amx_bf16
