#include "engine/kernels/attention/attention.h"
#include "engine/kernels/simd/avx512.h"

namespace rbln_vae::avx512 {

constexpr AttentionKernels attention = attention_kernels<Float32>();

}  // namespace rbln_vae::avx512
