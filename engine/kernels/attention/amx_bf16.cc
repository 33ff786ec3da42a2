#include "engine/kernels/attention/attention.h"
#include "engine/kernels/simd/amx_bf16.h"

namespace rbln_vae::amx_bf16 {

constexpr AttentionKernels attention = attention_kernels<Tiles>();

}  // namespace rbln_vae::amx_bf16
