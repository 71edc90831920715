// CUDA's own functions, by their names.
#pragma once

#include <cstdint>
#include <cstring>

#include "atomics.h"
#include "barriers.h"
#include "warp.h"

inline void __syncthreads(simt::Site site = simt::Site::here()) {
    if (!simt::removal.covers(site)) simt::syncthreads(site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
    return simt::syncthreads(site, predicate != 0);
}
inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::here()) {
    char slot;
    if (!simt::removal.covers(site)) simt::collective(mask, "__syncwarp", &slot, site, [](void* const*) {});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, simt::Site site = simt::Site::here()) {
    return simt::shuffle(mask, value, lane & 31, "__shfl_sync", site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt::Site site = simt::Site::here()) {
    return simt::shuffle(mask, value, simt::machine.current->lane() ^ lanes, "__shfl_xor_sync", site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, simt::Site site = simt::Site::here()) {
    const int lane = simt::machine.current->lane();
    return simt::shuffle(mask, value, lane < delta ? lane : lane - delta, "__shfl_up_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot(mask, predicate, "__ballot_sync", site);
}
template <typename T>
T atomicAdd(T* address, T value) {
    return simt::atomic(address, [=](T before) { return before + value; });
}
template <typename T>
T atomicExch(T* address, T value) {
    return simt::atomic(address, [=](T) { return value; });
}
inline void __threadfence(simt::Site site = simt::Site::here()) {
    if (simt::removal.covers(site)) return;
    simt::weak_memory.fence(*simt::machine.current);
    simt::machine.perhaps_yield();
}
template <typename T>
void __stcg(T* to, const T& value, simt::Site site = simt::Site::here()) {
    if (reinterpret_cast<std::uintptr_t>(to) % sizeof value)
        simt::machine.fail("__stcg: the place is not aligned", site);
    simt::weak_memory.store(*simt::machine.current, to, value);
}
template <typename T>
T __ldcg(const T* from) {
    return simt::weak_memory.load(*simt::machine.current, from);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
