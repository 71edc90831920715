// A CUDA stream for sources that do not see the CUDA runtime's headers.
#pragma once

struct CUstream_st;

namespace skipnet::cuda {

using Stream = CUstream_st*;  // the runtime's cudaStream_t

}  // namespace skipnet::cuda
