#include "engine/kernels/simd/generic.h"

#include "engine/kernels/limit.h"
#include "engine/kernels/sets/make_kernels.h"

namespace rbln_vae::generic {

template <class Element>
using Stored = Joined<Images<Registers, Element>, Broadcast<Products<Registers, Element>>>;
using Float32 = Stored<float>;
using StoredFloat16 = Stored<Float16>;
using StoredBFloat16 = Stored<BFloat16>;
static_assert(InstructionSet<Float32> && InstructionSet<StoredFloat16> &&
              InstructionSet<StoredBFloat16>);

constexpr Facts kFacts = {Isa::kGeneric, kTileBytes, kMostQueries, kFloat32Costs,
                          kFloat32Doubling,
                          limit_of_products<Products<Registers, float>, 4 * Registers::kMaxPixels>};
constexpr Kernels float32 = make_winograd_kernels<Float32>(kFacts);
constexpr Kernels float16 = make_winograd_kernels<StoredFloat16, Float32>(kFacts);
constexpr Kernels bfloat16 = make_winograd_kernels<StoredBFloat16, Float32>(kFacts);

}  // namespace rbln_vae::generic
