// The engine's classes in Python.
#pragma once

#include <nanobind/nanobind.h>

namespace rbln_vae {

void bind_engine(nanobind::module_& module);

}  // namespace rbln_vae
