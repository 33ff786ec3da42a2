#include "engine/kernels/conv2d/conv2d.h"
#include "engine/kernels/sets.h"
#include "engine/kernels/simd/generic.h"

namespace rbln_vae::generic {

constexpr Conv2dKernels conv2d_float32 = conv2d_or_winograd_kernels<GenericSimd<float>>();
constexpr Conv2dKernels conv2d_bfloat16 =
    conv2d_or_winograd_kernels<GenericSimd<BFloat16>, GenericSimd<float>>();

}  // namespace rbln_vae::generic
