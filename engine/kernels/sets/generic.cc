#include "engine/kernels/simd/generic.h"

#include "engine/kernels/sets/make_kernels.h"

namespace rbln_vae::generic {

using Float32 = Joined<Images<float>, Products<float>>;
using StoredFloat16 = Joined<Images<Float16>, Products<Float16>>;
using StoredBFloat16 = Joined<Images<BFloat16>, Products<BFloat16>>;
static_assert(InstructionSet<Float32> && InstructionSet<StoredFloat16> &&
              InstructionSet<StoredBFloat16>);

constexpr Facts kFacts = {Isa::kGeneric, kTileBytes, kMostQueries, kFloat32Costs,
                          kFloat32Doubling, nullptr};
constexpr Kernels float32 = make_winograd_kernels<Float32>(kFacts);
constexpr Kernels float16 = make_winograd_kernels<StoredFloat16, Float32>(kFacts);
constexpr Kernels bfloat16 = make_winograd_kernels<StoredBFloat16, Float32>(kFacts);

}  // namespace rbln_vae::generic
