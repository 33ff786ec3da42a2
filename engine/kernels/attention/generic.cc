#include "engine/kernels/attention/attention.h"
#include "engine/kernels/sets.h"
#include "engine/kernels/simd/generic.h"

namespace rbln_vae {

namespace generic_float32 {
constexpr AttentionKernels attention = attention_kernels<GenericSimd<float>>();
}  // namespace generic_float32

namespace generic_bfloat16 {
constexpr AttentionKernels attention = attention_kernels<GenericSimd<BFloat16>>();
}  // namespace generic_bfloat16

}  // namespace rbln_vae
