#include "engine/kernels/conv2d/conv2d.h"
#include "engine/kernels/simd/amx_bf16.h"

namespace rbln_vae::amx_bf16 {

constexpr Conv2dKernels conv2d = conv2d_kernels<Tiles>();

}  // namespace rbln_vae::amx_bf16
