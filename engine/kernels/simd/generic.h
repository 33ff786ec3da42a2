// The registers that every processor has, or that the compiler makes of others: of four floats. All
// other instruction sets are compared with these kernels in tests.
#pragma once

#include "engine/kernels/simd/vectors.h"

namespace rbln_vae::generic {

struct Registers {
  using Register = float __attribute__((vector_size(16)));
  // Sums of 3 pixels, one of them and four registers of weights fill 16 registers; sums of 5, all
  // of them and the weights fit in 32, and no compiler has to keep a sum in memory.
#if defined(__x86_64__) || defined(__i386__)
  static constexpr Index kMaxPixels = 3;
#else
  static constexpr Index kMaxPixels = 5;
#endif
  static Register multiply_add(Register a, Register b, Register c) { return a * b + c; }
};

}  // namespace rbln_vae::generic
