#include "engine/kernels/attention/attention.h"
#include "engine/kernels/simd/avx2.h"

namespace rbln_vae::avx2 {

constexpr AttentionKernels attention = attention_kernels<Float32>();

}  // namespace rbln_vae::avx2
