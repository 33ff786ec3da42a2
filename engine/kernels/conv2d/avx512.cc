#include "engine/kernels/conv2d/conv2d.h"
#include "engine/kernels/simd/avx512.h"

namespace rbln_vae::avx512 {

constexpr Conv2dKernels conv2d_float32 = conv2d_or_winograd_kernels<Float32>();
constexpr Conv2dKernels conv2d_bfloat16 = conv2d_or_winograd_kernels<WidenedBFloat16, Float32>();

}  // namespace rbln_vae::avx512
