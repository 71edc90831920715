// Kernels with and without a fault: what the harness has to accept and to catch (tests/simulated/test_simt_harness.py).
#include "simt.h"

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace skipnet::cuda;

namespace {

enum Fault {
    none,
    barrier,
    copy_wait,
    shared_bounds,
    global_bounds,
    unwritten,
    divergent,
    early_exit,
    warp,
    hasty_end,
    spin,
    release,
    acquire,
    late_release,
    no_wait,
    hasty_middle,
    counter_fence
};

// out[i] = the sum of x's 128-element block, rotated by one: through shared memory, cp.async and a warp's shuffles.
__global__ void rotate(const float* x, float* out, int fault) {
    float* values = reinterpret_cast<float*>(shared_memory());  // [blockDim.x]
    const int thread = threadIdx.x, threads = blockDim.x;
    x += blockIdx.x * threads;
    out += blockIdx.x * threads;
    if (thread < threads / 4) cp_async16(values + 4 * thread, x + 4 * thread);
    cp_async_commit();
    if (fault != copy_wait || thread != 3) cp_async_wait<0>();
    if (fault == divergent && thread < 32)
        __syncthreads();
    else if (fault == early_exit && thread == 5)
        return;
    else if (fault != barrier)
        __syncthreads();
    if (fault == copy_wait) cp_async_wait<0>();
    const int next = fault == shared_bounds ? thread + 1 : (thread + 1) % threads;
    float sum = values[next];
    if (fault == warp && thread == 7) return;
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    const bool even_lanes = __ballot_sync(~0u, thread % 2 == 0) == 0x55555555;
    if (fault == unwritten && thread == 64) return;
    out[fault == global_bounds ? thread + 1 : thread] = even_lanes ? values[next] + 0.0f * sum : 0.0f;
}

// out[block, lane, turn] = 2 next + turn where `next` is the next block of the cluster, by distributed shared memory.
__global__ void pass_on(float* out, int fault) {
    auto* counters = reinterpret_cast<StoreCounter*>(shared_memory());  // in turn
    auto* values = reinterpret_cast<unsigned*>(counters + 2);           // [lane, turn]
    const int lane = threadIdx.x, size = cluster_size();
    if (lane == 0) {
        for (int turn = 0; turn < 2; ++turn) begin_counting(counters + turn);
        if (fault != counter_fence) fence_counters();
    }
    if (fault != barrier) {
        cluster_arrive();
        cluster_wait();
    }
    for (int turn = 0; turn < 2; ++turn) {
        store_async(values + 2 * lane + turn, 2 * blockIdx.x + turn, counters + turn,
                    (cluster_rank() + size - 1) % size, true);
        if (lane == 0) expect_stores(counters + turn, 32 * 4);
        if (fault == hasty_end) return;
    }
    for (int turn = 0; turn < 2; ++turn) {
        if (fault != no_wait || turn == 0) wait_for_stores(counters + turn, false);
        const unsigned value = values[2 * ((lane + 1) % 32) + turn];
        out[(blockIdx.x * 32 + lane) * 2 + turn] = value == ~0u ? NAN : static_cast<float>(value);
    }
    if (fault == no_wait) wait_for_stores(counters + 1, false);
}

// Each block adds to the sum of the blocks before it, in the order of tickets.
__global__ void chain(int* ticket, int* sums /* [blocks + 1] */, int fault) {
    const int mine = fault == spin ? static_cast<int>(blockIdx.x) : atomicAdd(ticket, 1);
    int before;
    while ((before = simt::load(sums + mine)) < 0) {
    }
    atomicExch(sums + mine + 1, before + mine);
}

// Each block leaves its number for every thread; the block that arrives last adds them up.
__global__ void join(float4* left /* [blocks, threads] */, int* arrivals, float* out /* [threads] */, int fault) {
    const int thread = threadIdx.x, threads = blockDim.x;
    __stcg(left + blockIdx.x * threads + thread, {static_cast<float>(blockIdx.x), 0.0f, 0.0f, 0.0f});
    __syncthreads();
    bool last = false;
    if (thread == 0) {
        if (fault != release && fault != late_release) __threadfence();
        last = atomicAdd(arrivals, 1) == static_cast<int>(gridDim.x) - 1;
        if (fault == late_release) __threadfence();
    }
    if (!__syncthreads_or(last)) return;
    if (fault != acquire) __threadfence();
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += __ldcg(left + block * threads + thread).x;
    out[thread] = sum;
}

// One of a chain of grids: each adds one to what another thread block of the grid before has left.
__global__ void pass_along(const int* from, int* to, bool waits) {
    let_next_grid();
    if (waits) wait_for_previous_grid();
    const int i = blockIdx.x * blockDim.x + threadIdx.x, size = gridDim.x * blockDim.x;
    to[i] = from[size - 1 - i] + 1;
}

// d = a b^T by one warp; all [16, 16] row-major.
template <typename Element>
__global__ void multiply(const Element* a, const Element* b, float* d) {
    auto* tile = reinterpret_cast<Element*>(shared_memory());  // a, then b
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        tile[i] = a[i];
        tile[256 + i] = b[i];
    }
    __syncwarp();
    unsigned lhs[4], rhs[4];
    ldmatrix_x4(tile + lane % 16 * 16 + lane / 16 * 8, lhs);
    ldmatrix_x4(tile + 256 + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8, rhs);
    for (int half = 0; half < 2; ++half) {  // of b's rows
        const unsigned pair[2] = {rhs[2 * half], rhs[2 * half + 1]};
        float sums[4] = {};
        mma_m16n8k16<Element>(sums, lhs, pair);
        for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 16 + 8 * half + lane % 4 * 2 + i % 2] = sums[i];
    }
}

}  // namespace

extern "C" {

const char* run_rotate(const float* x, float* out, int blocks, int fault) {
    return simt::report([=] { launch("rotate", rotate, {blocks, 128, 512}, nullptr, x, out, fault); });
}
const char* run_pass_on(float* out, int blocks, int cluster, int fault) {
    return simt::report([=] { launch("pass_on", pass_on, {blocks, 32, 272, cluster}, nullptr, out, fault); });
}
const char* run_chain(int* ticket, int* sums, int blocks, int fault) {
    return simt::report([=] { launch("chain", chain, {blocks, 1}, nullptr, ticket, sums, fault); });
}
const char* run_join(void* left, int* arrivals, float* out, int blocks, int fault) {
    return simt::report(
        [=] { launch("join", join, {blocks, 64}, nullptr, static_cast<float4*>(left), arrivals, out, fault); });
}
// Four grids, each from the one before; or the last one from the second, with a third in between that does not wait.
const char* run_pass_along(const int* from, int* to /* [4, blocks, 32] */, int blocks, int fault) {
    return simt::report([=] {
        for (int grid = 0; grid < 4; ++grid) {
            const bool waits = !(fault == no_wait && grid == 3) && !(fault == hasty_middle && grid == 2);
            const int* before =
                grid == 0 ? from : to + (fault == hasty_middle && grid == 3 ? 1 : grid - 1) * 32 * blocks;
            Grid launched{blocks, 32, 0};
            launched.dependent = grid > 0;
            launch("pass_along", pass_along, launched, nullptr, before, to + grid * 32 * blocks, waits);
        }
    });
}
const char* run_multiply(const void* a, const void* b, float* d, int bfloat16) {
    return simt::report([=] {
        if (bfloat16)
            launch("multiply", multiply<Bfloat16>, {1, 32, 1024}, nullptr, static_cast<const Bfloat16*>(a),
                   static_cast<const Bfloat16*>(b), d);
        else
            launch("multiply", multiply<Half>, {1, 32, 1024}, nullptr, static_cast<const Half*>(a),
                   static_cast<const Half*>(b), d);
    });
}
// bits -> float -> bits for all 16-bit values.
const char* run_round_trip(const float* x, std::uint16_t* half, std::uint16_t* bfloat16, float* back, int count) {
    return simt::report([=] {
        for (int i = 0; i < count; ++i) {
            half[i] = from_float<Half>(x[i]).bits;
            bfloat16[i] = from_float<Bfloat16>(x[i]).bits;
            back[i] = to_float(Half{half[i]});
        }
    });
}
}
