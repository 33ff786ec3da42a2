#include "engine/kernels/limit/limit.h"
#include "engine/kernels/simd/avx512_bf16.h"

namespace rbln_vae::avx512_bf16 {

double limit(double seconds) { return limit_of_products<BFloat16Products, 24>(seconds); }

}  // namespace rbln_vae::avx512_bf16
