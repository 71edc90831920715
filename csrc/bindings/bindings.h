// Each adds its part to the extension module.
#pragma once

#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);  // where CUDA was built
