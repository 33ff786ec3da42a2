#include "engine/kernels/conv2d/conv2d.h"
#include "engine/kernels/simd/avx512_bf16.h"

namespace rbln_vae::avx512_bf16 {

constexpr Conv2dKernels conv2d = conv2d_or_winograd_kernels<BFloat16Products, Float32Products>();

}  // namespace rbln_vae::avx512_bf16
