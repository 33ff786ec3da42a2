// Denormal numbers as zero, for as long as an object of this class lives: arithmetic on
// them is a hundred times slower, and none of it matters here.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rbln_vae {

class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;

 public:
#else
  FlushDenormals() = default;
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace rbln_vae
