// What the processor and the operating system together let a program use.
#pragma once

#include <string>
#include <vector>

namespace rbln_vae {

// Each flag is set only if the processor has the instructions and the operating system
// keeps their registers over a task switch. On a processor that isn't x86 all are false.
struct CpuFeatures {
  bool sse4_2 = false;
  bool avx = false;
  bool f16c = false;
  bool fma = false;
  bool avx2 = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512_bf16 = false;
  bool avx512_fp16 = false;
  bool amx_tile = false;
  bool amx_bf16 = false;
};

// The features of this machine.
const CpuFeatures& cpu_features();

// Asks Linux for the right to use the tiles of AMX, which holds for the whole process and its
// children; false if it refuses. Only the first call asks.
bool request_tiles();

// The names of the features that are present, in the order of the struct.
std::vector<std::string> names(const CpuFeatures& features);

}  // namespace rbln_vae
