// Each file of an instruction set gives its part of the kernels; sets.cc lists them.
#pragma once

#include "engine/kernels/kernels.h"

namespace rbln_vae {

struct Conv2dKernels {
  Index rows, pixels, panels;
  Index (*scratch)(const ConvStep&);
  void (*run)(const ConvStep&, const Context&, Index item);
  void (*winograd_kernels)(const WinogradStep&, const Context&, Index item);
};

struct AttentionKernels {
  void (*pack)(const AttentionPackStep&, const Context&, Index item);
  Index (*scratch)(const AttentionStep&);
  void (*run)(const AttentionStep&, const Context&, Index item);
};

namespace generic {
extern const Conv2dKernels conv2d_float32, conv2d_bfloat16;
extern const AttentionKernels attention_float32, attention_bfloat16;
}  // namespace generic

#if defined(RBLN_VAE_X86_KERNELS)
namespace avx2 {
extern const Conv2dKernels conv2d_float32, conv2d_bfloat16;
extern const AttentionKernels attention_float32, attention_bfloat16;
double limit(double seconds);
}  // namespace avx2

namespace avx512 {
extern const Conv2dKernels conv2d_float32, conv2d_bfloat16;
extern const AttentionKernels attention_float32, attention_bfloat16;
double limit(double seconds);
}  // namespace avx512

namespace avx512_bf16 {
extern const Conv2dKernels conv2d;
extern const AttentionKernels attention;
double limit(double seconds);
}  // namespace avx512_bf16
#endif

#if defined(RBLN_VAE_X86_KERNELS) || defined(RBLN_VAE_EMULATE_TILES)
namespace amx_bf16 {
extern const Conv2dKernels conv2d;
extern const AttentionKernels attention;
double limit(double seconds);
}  // namespace amx_bf16
#endif

}  // namespace rbln_vae
