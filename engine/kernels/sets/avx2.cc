#include "engine/kernels/simd/avx2.h"

#include "engine/kernels/limit.h"
#include "engine/kernels/sets/make_kernels.h"

namespace rbln_vae::avx2 {

using Float32 = Joined<Images<Registers, float>, Broadcast<Products<float>>>;
using StoredFloat16 = Joined<Float16Images, Broadcast<Products<Float16>>>;
using StoredBFloat16 = Joined<BFloat16Images, Broadcast<Products<BFloat16>>>;
static_assert(InstructionSet<Float32> && InstructionSet<StoredFloat16> &&
              InstructionSet<StoredBFloat16>);

constexpr Facts kFacts = {Isa::kAvx2, kTileBytes, kMostQueries, kFloat32Costs,
                          kFloat32Doubling, limit_of_products<Products<float>, 12>};
constexpr Kernels float32 = make_winograd_kernels<Float32>(kFacts);
constexpr Kernels float16 = make_winograd_kernels<StoredFloat16, Float32>(kFacts);
constexpr Kernels bfloat16 = make_winograd_kernels<StoredBFloat16, Float32>(kFacts);

}  // namespace rbln_vae::avx2
