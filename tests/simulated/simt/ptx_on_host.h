// The functions of csrc/cuda/ptx.cuh on the CPU; what they mean is said there.
#pragma once

#include "simt.h"

namespace skipnet::cuda {

// ---- conversions

inline float to_float(float x) { return x; }
inline float to_float(Tf32 x) { return x.value; }
inline float to_float(Half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float size;
    if (exponent == 31)
        size = fraction ? NAN : INFINITY;
    else
        size = exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                        : std::ldexp(static_cast<float>(fraction), -24);
    return x.bits & 0x8000 ? -size : size;
}
inline float to_float(Bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <typename Element>
Element from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline Tf32 from_float<Tf32>(float x) {
    return {x};
}
template <>
inline Half from_float<Half>(float x) {
    const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (std::isnan(x)) return {0x7fff};
    if (size == 0) return {sign};
    if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    int exponent;
    std::frexp(size, &exponent);  // size = f 2^exponent with f in [0.5, 1)
    exponent = std::max(exponent, -13);
    // In units of the last place; nearbyint rounds to even. A carry moves into the exponent by itself.
    const int places = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    return {static_cast<std::uint16_t>(sign | (((exponent + 13) << 10) + places))};
}
template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
    if (std::isnan(x)) return {0x7fff};
    const unsigned bits = __float_as_uint(x);
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename Element>
unsigned pack(float low, float high) {
    return from_float<Element>(low).bits | static_cast<unsigned>(from_float<Element>(high).bits) << 16;
}
template <typename Element>
void unpack(unsigned both, float& low, float& high) {
    low = to_float(Element{static_cast<std::uint16_t>(both)});
    high = to_float(Element{static_cast<std::uint16_t>(both >> 16)});
}

inline float greater(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return NAN;
    return a > b || (a == b && std::signbit(b)) ? a : b;
}
template <typename Element>
unsigned greater(unsigned a, unsigned b) {
    if constexpr (sizeof(Element) == 4) {
        return __float_as_uint(greater(__uint_as_float(a), __uint_as_float(b)));
    } else {
        const auto value = [](unsigned bits) { return to_float(Element{static_cast<std::uint16_t>(bits)}); };
        return pack<Element>(greater(value(a), value(b)), greater(value(a >> 16), value(b >> 16)));
    }
}

inline unsigned round_to_tf32(unsigned x) {
    if (std::isnan(__uint_as_float(x))) return 0x7fffe000;
    return (x + 0x1000) & ~0x1fffu;  // the fraction's carry moves into the exponent by itself; infinities stay
}

template <typename Element>
unsigned pack_relu(float low, float high) {
    const auto relu = [](float x) { return x > 0.0f || std::isnan(x) ? x : 0.0f; };
    return pack<Element>(relu(low), relu(high));
}

// ---- functions in a few instructions

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

// ---- global memory

template <typename T>
void load_global(T& value, const T* address, bool loads = true) {
    if (loads) value = *address;
}

inline void load_past_l1(float4& value, const float4* address, bool loads) {
    if (loads) value = __ldcg(address);
}
template <typename T>
void store_global(T* address, T value, bool stores) {
    if (stores) *address = value;
}
inline void store_past_l1(bool* address, bool value, bool stores) {
    if (stores) __stcg(reinterpret_cast<unsigned char*>(address), static_cast<unsigned char>(value));
}

inline void keep_order() {}

// ---- registers

inline int in_register(int value) { return value; }

// ---- shared memory

inline unsigned char* shared_memory() { return simt::shared_memory(); }
template <typename T>
T load_shared(const T* from, simt::Site site = simt::Site::here()) {
    return simt::load_shared(from, site);
}
template <typename T>
void store_shared(T* to, const T& value, simt::Site site = simt::Site::here()) {
    simt::store_shared(to, value, site);
}

// ---- cp.async

inline void cp_async16(void* to_shared, const void* from, unsigned filled = 1, simt::Site site = simt::Site::here()) {
    simt::cp_async(to_shared, from, 16, filled, site);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int pending>
void cp_async_wait(simt::Site site = simt::Site::here()) {
    if (!simt::removal.covers(site)) simt::cp_async_wait(pending);
}

// ---- tensor cores

inline void ldmatrix_x4(const void* row, unsigned (&matrices)[4], simt::Site site = simt::Site::here()) {
    simt::ldmatrix_x4(row, matrices, site);
}
// Every 16-bit value as a float: the conversion is most of an mma's time otherwise.
template <typename Element>
const float* floats() {
    static const std::vector<float> table = [] {
        std::vector<float> values(1 << 16);
        for (int bits = 0; bits < 1 << 16; ++bits) values[bits] = to_float(Element{static_cast<std::uint16_t>(bits)});
        return values;
    }();
    return table.data();
}
template <typename Element>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], simt::Site site = simt::Site::here()) {
    const float* table = floats<Element>();
    simt::mma_m16n8k16(d, a, b, [=](std::uint16_t bits) { return table[bits]; }, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             simt::Site site = simt::Site::here()) {
    simt::mma_m16n8k8_tf32(d, a, b, site);
}

// ---- dependent launches

inline void let_next_grid() { simt::machine.let_next_grid(); }
inline void wait_for_previous_grid(simt::Site site = simt::Site::here()) {
    if (!simt::removal.covers(site)) simt::machine.wait_for_previous_grid(site);
}
inline void prefetch_to_l2(const void* from, unsigned bytes) {
    for (unsigned byte : {0u, bytes - 1}) (void)static_cast<const volatile unsigned char*>(from)[byte];
}

// ---- clusters

inline int cluster_rank() { return simt::cluster_rank(); }
inline int cluster_size() { return simt::cluster_size(); }
inline void cluster_arrive(simt::Site site = simt::Site::here()) {
    if (!simt::removal.covers(site)) simt::cluster_arrive(site);
}
inline void cluster_wait(simt::Site site = simt::Site::here()) {
    if (!simt::removal.covers(site)) simt::cluster_wait(site);
}
inline void begin_counting(StoreCounter* counter, simt::Site site = simt::Site::here()) {
    simt::begin_counting(counter, site);
}
inline void fence_counters(simt::Site site = simt::Site::here()) {
    if (!simt::removal.covers(site)) simt::fence_counters();
}
inline void expect_stores(StoreCounter* counter, int bytes, simt::Site site = simt::Site::here()) {
    simt::expect_stores(counter, bytes, site);
}
inline void wait_for_stores(StoreCounter* counter, bool odd, simt::Site site = simt::Site::here()) {
    if (!simt::removal.covers(site)) simt::wait_for_stores(counter, odd, site);
}
inline void store_async(void* place, unsigned value, StoreCounter* counter, int rank, bool stores,
                        simt::Site site = simt::Site::here()) {
    if (stores) simt::store_async(place, value, counter, rank, site);
}

}  // namespace skipnet::cuda
