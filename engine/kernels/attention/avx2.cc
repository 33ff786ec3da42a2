#include "engine/kernels/attention/attention.h"
#include "engine/kernels/simd/avx2.h"

namespace rbln_vae::avx2 {

constexpr AttentionKernels attention_float32 = attention_kernels<Float32>();
constexpr AttentionKernels attention_bfloat16 = attention_kernels<WidenedBFloat16>();

}  // namespace rbln_vae::avx2
