// How a grid's thread blocks find out which of them is the last to have done its part.
#pragma once

namespace skipnet::cuda {

// Whether this thread block is the last of `all` that come here. Then it sees what the others have left with __stcg,
// and the counter is zero again. All threads take part.
__device__ inline bool comes_last(int* arrivals, int all) {
    __syncthreads();  // the block's stores before the fence
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();  // what the block leaves before its arrival
        last = atomicAdd(arrivals, 1) == all - 1;
        __threadfence();  // all arrivals before what the others have left; the barrier passes that on to the block
        if (last) *arrivals = 0;
    }
    return __syncthreads_or(last);
}

}  // namespace skipnet::cuda
