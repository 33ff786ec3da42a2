// The rows of the table of kernels in sets.cc, one file of sets/ per instruction set. The build
// may leave out files.
#pragma once

#include "engine/kernels/kernels.h"

namespace rbln_vae {

// Common values of rows; a row may have its own.
constexpr Index kTileBytes = 560'000;
constexpr Index kMostQueries = 112;

namespace generic {
extern const Kernels float32, float16, bfloat16;
}
namespace avx2 {
extern const Kernels float32, float16, bfloat16;
}
namespace avx512 {
extern const Kernels float32, float16, bfloat16;
}
namespace avx512_bf16 {
extern const Kernels bfloat16;
}
namespace amx_bf16 {
extern const Kernels bfloat16;
}
namespace neon_bf16 {
extern const Kernels bfloat16;
}

}  // namespace rbln_vae
