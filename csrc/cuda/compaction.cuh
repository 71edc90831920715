// Compaction by one thread block; compaction.cu launches it by itself, gate_step.cu in its last block.
#pragma once

#include "compaction.h"
#include "ptx.cuh"

namespace skipnet::cuda {

// How many of a batch's places hold an image: the first `present`, or all where that is null.
__device__ inline int images_of(const int* present, int batch) { return present ? *present : batch; }

// Of so many images at most, the decisions fit into a word beside the number of those that have decided.
constexpr int kFlagsInWord = 27;

// By one warp, for one image: adds its decision to the word. If it is the last one, it lists all, and the word is zero
// again. A lane's image is either listed or leaves a place behind the list empty.
__device__ inline void compact_in_warp(bool executed, int image, int images, const RowList& list, int* arrivals) {
    const int lane = threadIdx.x % 32;
    unsigned word = (1u << kFlagsInWord) + (static_cast<unsigned>(executed) << image);
    if (lane == 0) word += atomicAdd(reinterpret_cast<unsigned*>(arrivals), word);
    word = __shfl_sync(~0u, word, 0);
    if (static_cast<int>(word >> kFlagsInWord) != images) return;
    const unsigned flags = word & ((1u << kFlagsInWord) - 1);
    const int count = __popc(flags), before = __popc(flags & ((1u << lane) - 1));
    const bool listed = flags >> lane & 1;
    if (lane < images) list.rows[listed ? before : count + lane - before] = listed ? lane : -1;
    if (lane == 0) *list.count = count, *arrivals = 0;
}

// A prefix sum, no atomics: the order of the images is kept. All threads of the block take part.
template <int kThreads>
__device__ void compact_in_block(const bool* executed, int batch, const RowList& list,
                                 int* warp_counts /* shared, [kThreads / 32] */) {
    constexpr int kWarps = kThreads / 32, kFlags = 4;  // flags a thread and round: their loads overlap
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int before = 0;
    for (int start = 0; start < batch; start += kThreads * kFlags) {
        const int first = start + thread * kFlags;
        unsigned flags = 0;
#pragma unroll
        for (int i = 0; i < kFlags; ++i)
            if (first + i < batch && __ldcg(reinterpret_cast<const unsigned char*>(executed) + first + i))
                flags |= 1u << i;
        const int mine = __popc(flags);
        int through = mine;  // this lane's and all lower lanes'
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int lower = __shfl_up_sync(~0u, through, lanes);
            if (lane >= lanes) through += lower;
        }
        if (lane == 31) store_shared(warp_counts + warp, through);
        __syncthreads();
        int place = before + through - mine;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            const int count = load_shared(warp_counts + other);
            if (other < warp) place += count;
            before += count;
        }
#pragma unroll
        for (int i = 0; i < kFlags; ++i)
            if (flags >> i & 1) list.rows[place++] = first + i;
        __syncthreads();  // before the counts are written again
    }
    for (int i = before + thread; i < batch; i += kThreads) list.rows[i] = -1;
    if (thread == 0) *list.count = before;
}

}  // namespace skipnet::cuda
