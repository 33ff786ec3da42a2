#include "engine/kernels/conv2d/conv2d.h"
#include "engine/kernels/sets.h"
#include "engine/kernels/simd/generic.h"

namespace rbln_vae {

namespace generic_float32 {
constexpr Conv2dKernels conv2d = conv2d_or_winograd_kernels<GenericSimd<float>>();
}  // namespace generic_float32

namespace generic_bfloat16 {
constexpr Conv2dKernels conv2d = conv2d_or_winograd_kernels<GenericSimd<BFloat16>, GenericSimd<float>>();
}  // namespace generic_bfloat16

}  // namespace rbln_vae
