// The Python module `rbln_vae._engine`. `make stub` writes its types to src/rbln_vae/_engine.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "engine/binding.h"
#include "engine/cpu_features.h"

NB_MODULE(_engine, m) {
  m.doc() = "The CPU engine.";
  // Models that live until the interpreter ends, in a cache or a thread, are no leaks.
  nanobind::set_leak_warnings(false);
  m.def(
      "cpu_features", [] { return rbln_vae::names(rbln_vae::cpu_features()); },
      "The instruction sets that this processor and operating system support, by the\n"
      "names of Linux's /proc/cpuinfo; empty where the processor isn't x86.");
  rbln_vae::bind_engine(m);
}
