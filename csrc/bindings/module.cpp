// The extension module. This folder is all that knows Python.
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "skipnet-rt's native code; use it through skipnet_rt's engines.";
    bind_cpu(module);
#ifdef SKIPNET_CUDA_ARCHS
    bind_cuda(module);
    module.attr("cuda_archs") = SKIPNET_CUDA_ARCHS;
#else
    module.attr("cuda_archs") = "";
#endif
    module.attr("cuda_build") = SKIPNET_CUDA_BUILD;
}
