#include "engine/kernels/attention/attention.h"
#include "engine/kernels/sets.h"
#include "engine/kernels/simd/generic.h"

namespace rbln_vae::generic {

constexpr AttentionKernels attention_float32 = attention_kernels<GenericSimd<float>>();
constexpr AttentionKernels attention_bfloat16 = attention_kernels<GenericSimd<BFloat16>>();

}  // namespace rbln_vae::generic
