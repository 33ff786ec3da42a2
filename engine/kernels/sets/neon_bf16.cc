#include "engine/kernels/simd/neon_bf16.h"

#include "engine/kernels/limit.h"
#include "engine/kernels/sets/make_kernels.h"

namespace rbln_vae::neon_bf16 {

using ProductsOfBFloat16 = Joined<BFloat16Images, Broadcast<BFloat16Products>>;
// For Winograd's algorithm.
using Float32 = Joined<Images<Registers, float>, Broadcast<Products<Registers, float>>>;
static_assert(InstructionSet<ProductsOfBFloat16> && InstructionSet<Float32>);

// The costs are those of AVX-512 with bfloat16, since none has been measured on Arm.
constexpr Kernels bfloat16 = make_winograd_kernels<ProductsOfBFloat16, Float32>(
    {Isa::kNeonBf16, kTileBytes, kMostQueries,
     {.product = 0.5, .norm = 48, .copy = 12, .weights = 16},
     {.input = 48, .output = 40, .product = 1.1},
     limit_of_products<BFloat16Products, 24>});

}  // namespace rbln_vae::neon_bf16
