// All PTX of this project, one function per instruction. On the CPU tests/simulated/simt gives the functions a meaning.
#pragma once

#include <cstdint>

namespace skipnet::cuda {

// 16-bit floating point; only these functions look inside.
struct Half {
    std::uint16_t bits;
};
struct Bfloat16 {
    std::uint16_t bits;
};
// A float32 in memory; in products it counts with 10 bits of fraction.
struct Tf32 {
    float value;
};

// In shared memory: where stores of a cluster's other thread blocks are counted, an mbarrier. A phase ends when one
// thread has said how many bytes come in it, and they have come; then the next one begins. Phases are waited for in
// order, by whether their number is odd.
struct StoreCounter {
    std::uint64_t state;
};

}  // namespace skipnet::cuda

#ifdef SKIPNET_SIMT
#include "ptx_on_host.h"
#else

namespace skipnet::cuda {

// ---- conversions

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Tf32 x) { return x.value; }
__device__ inline float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ inline float to_float(Bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

// Two floats as two neighbouring 16-bit values, rounded to nearest even; `low` comes first in memory.
template <typename Element>
__device__ unsigned pack(float low, float high);
template <>
__device__ inline unsigned pack<Half>(float low, float high) {
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
__device__ inline unsigned pack<Bfloat16>(float low, float high) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The floats that two neighbouring 16-bit values are.
template <typename Element>
__device__ void unpack(unsigned both, float& low, float& high);
template <>
__device__ inline void unpack<Half>(unsigned both, float& low, float& high) {
    asm("{.reg .b16 first, second; mov.b32 {first, second}, %2; cvt.f32.f16 %0, first; cvt.f32.f16 %1, second;}"
        : "=f"(low), "=f"(high)
        : "r"(both));
}
template <>
__device__ inline void unpack<Bfloat16>(unsigned both, float& low, float& high) {
    low = __uint_as_float(both << 16);
    high = __uint_as_float(both & 0xffff0000);
}

// pack(max(0, low), max(0, high)), but NaN stays NaN; without an instruction of its own.
template <typename Element>
__device__ unsigned pack_relu(float low, float high);
template <>
__device__ inline unsigned pack_relu<Half>(float low, float high) {
    unsigned y;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
__device__ inline unsigned pack_relu<Bfloat16>(float low, float high) {
    unsigned y;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// Rounds to nearest even.
template <typename Element>
__device__ Element from_float(float x) {
    return {static_cast<std::uint16_t>(pack<Element>(x, 0.0f))};
}
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline Tf32 from_float<Tf32>(float x) {
    return {x};
}

// The greater one in each of two neighbouring 16-bit values, or of a float32; NaN wins, and -0 is less than 0.
template <typename Element>
__device__ unsigned greater(unsigned a, unsigned b);
template <>
__device__ inline unsigned greater<Half>(unsigned a, unsigned b) {
    unsigned y;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ inline unsigned greater<Bfloat16>(unsigned a, unsigned b) {
    unsigned y;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ inline unsigned greater<float>(unsigned a, unsigned b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    return __float_as_uint(y);
}

// A float32's bits with 10 bits of fraction, rounded to nearest, halfway cases away from zero.
__device__ inline unsigned round_to_tf32(unsigned x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
    return y;
}

// ---- functions that are a few instructions without a branch; their last two bits may be wrong

__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- global memory

// value = *address, if `loads`: by a predicate, not a branch. An ordinary load that stays on its side of a
// __syncwarp(); ptxas moves those through the read-only path (ld.global.nc) to the end of a stretch of code, where it
// is too late.
__device__ inline void load_global(uint4& value, const uint4* address, bool loads = true) {
    asm volatile("{.reg .pred loads; setp.ne.b32 loads, %5, 0; @loads ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
                 : "l"(address), "r"(static_cast<int>(loads)));
}
__device__ inline void load_global(uint2& value, const uint2* address, bool loads = true) {
    asm volatile("{.reg .pred loads; setp.ne.b32 loads, %3, 0; @loads ld.global.v2.u32 {%0, %1}, [%2];}"
                 : "+r"(value.x), "+r"(value.y)
                 : "l"(address), "r"(static_cast<int>(loads)));
}
__device__ inline void load_global(float2& value, const float2* address, bool loads = true) {
    asm volatile("{.reg .pred loads; setp.ne.b32 loads, %3, 0; @loads ld.global.v2.f32 {%0, %1}, [%2];}"
                 : "+f"(value.x), "+f"(value.y)
                 : "l"(address), "r"(static_cast<int>(loads)));
}

__device__ inline void load_global(float& value, const float* address) {
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address));
}
// The same past L1, for what thread blocks of the same grid have left.
__device__ inline void load_past_l1(float4& value, const float4* address, bool loads) {
    asm volatile("{.reg .pred loads; setp.ne.b32 loads, %5, 0; @loads ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];}"
                 : "+f"(value.x), "+f"(value.y), "+f"(value.z), "+f"(value.w)
                 : "l"(address), "r"(static_cast<int>(loads)));
}

// *address = value, if `stores`: by a predicate, too.
__device__ inline void store_global(int* address, int value, bool stores) {
    asm volatile("{.reg .pred stores; setp.ne.b32 stores, %2, 0; @stores st.global.u32 [%0], %1;}" ::"l"(address),
                 "r"(value), "r"(static_cast<int>(stores))
                 : "memory");
}
__device__ inline void store_global(float* address, float value, bool stores) {
    asm volatile("{.reg .pred stores; setp.ne.b32 stores, %2, 0; @stores st.global.f32 [%0], %1;}" ::"l"(address),
                 "f"(value), "r"(static_cast<int>(stores))
                 : "memory");
}
// The same past L1, where the grid's other thread blocks look for it.
__device__ inline void store_past_l1(bool* address, bool value, bool stores) {
    asm volatile("{.reg .pred stores; setp.ne.b32 stores, %2, 0; @stores st.global.cg.u8 [%0], %1;}" ::"l"(address),
                 "r"(static_cast<int>(value)), "r"(static_cast<int>(stores))
                 : "memory");
}

// Loads stay on their side of it: otherwise ptxas moves them to where their results are used, however long they take.
__device__ inline void keep_order() { __syncwarp(); }

// ---- registers

// The value, computed here and nowhere else: ptxas computes what it finds cheap again wherever it is used, to have a
// register free in between.
__device__ inline int in_register(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ---- shared memory

// The thread block's dynamic shared memory, 16-byte aligned; there is no other kind in this project.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
}

// A plain load or store. The simulated GPU counts how often a warp's lanes meet a bank.
template <typename T>
__device__ T load_shared(const T* from) {
    return *from;
}
template <typename T>
__device__ void store_shared(T* to, const T& value) {
    *to = value;
}

__device__ inline unsigned shared_address(const void* in_shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(in_shared));
}

// ---- cp.async: global to shared memory past the registers, 16 bytes aligned to 16

// With `filled` 0 nothing is read and zeros land. It is not a bool: of one bit among others that would take two
// instructions more.
__device__ inline void cp_async16(void* to_shared, const void* from, unsigned filled = 1) {
    asm volatile("{.reg .pred empty; setp.eq.b32 empty, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, empty;}" ::"r"(
                     shared_address(to_shared)),
                 "l"(from), "r"(filled)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for the calling thread's groups but the `pending` newest; other threads see them after a barrier.
template <int pending>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- tensor cores; fragment layouts are the PTX ISA's

// 8x8 matrices of 16-bit values: lane 8 j + r gives the address of row r of matrix j, and gets of each matrix the
// elements 2 (lane % 4) and + 1 of row lane / 4. Or 8x4 ones of 32-bit values, of which it gets element lane % 4.
__device__ inline void ldmatrix_x4(const void* row, unsigned (&matrices)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// d[16 x 8] += a[16 x 16] b[16 x 8], summed in float32.
template <typename Element>
__device__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ inline void mma_m16n8k16<Half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma_m16n8k16<Bfloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d[16 x 8] += a[16 x 8] b[8 x 8] of values that have been rounded to TF32, summed in float32.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- dependent launches (compute capability 9.0 and above; elsewhere a grid begins when the one before it has ended)

#if __CUDA_ARCH__ >= 900
// The next grid of the stream, if it is launched as a dependent one, may begin once all thread blocks have said so or
// have ended.
__device__ inline void let_next_grid() { asm volatile("griddepcontrol.launch_dependents;"); }
// Until the grid before has ended and its stores are seen. Every thread calls it before it reads or writes what other
// grids do; every grid does, so that the end of one is the end of all before it.
__device__ inline void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Brings bytes of global memory into L2, in multiples of 16, aligned to 16.
__device__ inline void prefetch_to_l2(const void* from, unsigned bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes));
}
#else
__device__ inline void let_next_grid() {}
__device__ inline void wait_for_previous_grid() {}
__device__ inline void prefetch_to_l2(const void*, unsigned) {}
#endif

// ---- clusters of thread blocks (compute capability 9.0 and above; elsewhere a thread block is alone)

#if __CUDA_ARCH__ >= 900
__device__ inline int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// All threads of the cluster.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// By one thread, before the thread's fence and a barrier of the cluster.
__device__ inline void begin_counting(StoreCounter* counter) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(counter)) : "memory");
}
__device__ inline void fence_counters() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// By one thread in each phase: how many bytes come.
__device__ inline void expect_stores(StoreCounter* counter, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(counter)), "r"(bytes)
                 : "memory");
}
// Until a phase has ended; what has been counted in it is then seen. Not with the scope of a cluster: ptxas would empty
// L1 each time, where the weights are and what has come is not.
__device__ inline void wait_for_stores(StoreCounter* counter, bool odd) {
    asm volatile(
        "{.reg .pred ended; again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1; @!ended bra again;}" ::"r"(
            shared_address(counter)),
        "r"(static_cast<unsigned>(odd))
        : "memory");
}
// If `stores`, by a predicate: *place = value in the shared memory of the cluster's thread block `rank`, some time
// later, counted there with 4 bytes.
__device__ inline void store_async(void* place, unsigned value, StoreCounter* counter, int rank, bool stores) {
    unsigned to, counted;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(place)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(shared_address(counter)), "r"(rank));
    asm volatile(
        "{.reg .pred stores; setp.ne.b32 stores, %3, 0;"
        " @stores st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];}" ::"r"(to),
        "r"(value), "r"(counted), "r"(static_cast<int>(stores)));
}
#else
__device__ inline int cluster_rank() { return 0; }
__device__ inline int cluster_size() { return 1; }
__device__ inline void cluster_arrive() { __syncthreads(); }
__device__ inline void cluster_wait() {}
__device__ inline void begin_counting(StoreCounter*) {}
__device__ inline void fence_counters() {}
__device__ inline void expect_stores(StoreCounter*, int) {}
__device__ inline void wait_for_stores(StoreCounter*, bool) {}
__device__ inline void store_async(void*, unsigned, StoreCounter*, int, bool) {}
#endif

}  // namespace skipnet::cuda

#endif
