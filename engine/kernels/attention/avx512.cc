#include "engine/kernels/attention/attention.h"
#include "engine/kernels/simd/avx512.h"

namespace rbln_vae::avx512 {

constexpr AttentionKernels attention_float32 = attention_kernels<Float32>();
constexpr AttentionKernels attention_bfloat16 = attention_kernels<WidenedBFloat16>();

}  // namespace rbln_vae::avx512
