#include "engine/kernels/simd/avx512_bf16.h"

#include "engine/kernels/limit.h"
#include "engine/kernels/sets/make_kernels.h"

namespace rbln_vae::avx512_bf16 {

using ProductsOfBFloat16 = Joined<BFloat16Images, Broadcast<BFloat16Weights>>;
// For Winograd's algorithm.
using Float32 = Joined<avx512::Float32Images, Broadcast<Float32Weights>>;
static_assert(InstructionSet<ProductsOfBFloat16> && InstructionSet<Float32>);

constexpr Kernels bfloat16 = make_winograd_kernels<ProductsOfBFloat16, Float32>(
    {Isa::kAvx512Bf16, kTileBytes, kMostQueries,
     {.product = 0.5, .norm = 48, .copy = 12, .weights = 16},
     {.input = 48, .output = 40, .product = 1.1},
     limit_of_products<BFloat16Weights, 24>});

}  // namespace rbln_vae::avx512_bf16
