#include "engine/kernels/attention/attention.h"
#include "engine/kernels/simd/avx512_bf16.h"

namespace rbln_vae::avx512_bf16 {

constexpr AttentionKernels attention = attention_kernels<BFloat16Products>();

}  // namespace rbln_vae::avx512_bf16
