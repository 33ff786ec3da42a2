#include "engine/kernels/limit/limit.h"
#include "engine/kernels/simd/avx2.h"

namespace rbln_vae::avx2 {

double limit(double seconds) { return limit_of_products<Float32::Products, 12>(seconds); }

}  // namespace rbln_vae::avx2
