// How a grid's thread blocks find out which of them is the last to have done its part.
#pragma once

namespace skipnet::cuda {

// A thread block has done its part, one of `all`. It may do something else before it asks whether it is the last. All
// threads take part.
class Arrival {
public:
    __device__ Arrival(int* arrivals, int all) : arrivals_(arrivals), all_(all) {
        __syncthreads();  // the block's stores before the fence
        if (threadIdx.x == 0) {
            __threadfence();  // what the block leaves before its arrival
            others_ = atomicAdd(arrivals, 1);
        }
    }

    // If so, it sees what the others have left with __stcg, and the counter is zero again.
    __device__ bool is_last() const {
        bool last = false;
        if (threadIdx.x == 0) {
            last = others_ == all_ - 1;
            __threadfence();  // all arrivals before what the others have left; the barrier passes that on to the block
            if (last) *arrivals_ = 0;
        }
        return __syncthreads_or(last);
    }

private:
    int* arrivals_;
    int all_, others_ = 0;  // those that came before; thread 0's
};

__device__ inline bool comes_last(int* arrivals, int all) { return Arrival(arrivals, all).is_last(); }

}  // namespace skipnet::cuda
