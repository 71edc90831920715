// What the lanes of a warp do together.
#pragma once

namespace skipnet::cuda {

// The sum over all lanes, for every lane, in an order that is always the same.
__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

}  // namespace skipnet::cuda
