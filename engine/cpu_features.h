// The processor features that the operating system supports.
#pragma once

#include <string>
#include <vector>

namespace rbln_vae {

// A flag is set only if the processor has the instructions and the operating system saves their
// registers at a task switch. Those of other processors are false.
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
  bool neon_bf16 = false;
};

// The features of this machine.
const CpuFeatures& cpu_features();

// Requests permission from Linux to use AMX tiles, for the process and its children. Returns
// false if Linux refuses. Only the first call requests it.
bool request_tiles();

// The names of the features that are present, in the order of the struct.
std::vector<std::string> names(const CpuFeatures& features);

}  // namespace rbln_vae
