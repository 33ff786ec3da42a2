#include "engine/kernels/limit/limit.h"
#include "engine/kernels/simd/avx512.h"

namespace rbln_vae::avx512 {

double limit(double seconds) { return limit_of_products<Float32::Products, 24>(seconds); }

}  // namespace rbln_vae::avx512
