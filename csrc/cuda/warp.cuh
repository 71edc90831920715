// What the lanes of a warp do together.
#pragma once

namespace skipnet::cuda {

// The thread's warp; the compiler knows that it is the same for all lanes.
__device__ inline int own_warp() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0); }

// The sum over all lanes, for every lane, in an order that is always the same.
__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// Which lane `spread_sums` leaves value `number` in (all whose lower bits, those below kLast, differ have it).
template <int kFirst, int kLast, int kCount>
__device__ constexpr int holder(int number) {
    constexpr int kKept = (kCount + 1) / 2;
    const int upper = number >= kKept;
    if constexpr (kFirst == kLast)
        return upper * kFirst;
    else
        return upper * kFirst + holder<kFirst / 2, kLast, kKept>(number - upper * kKept);
}

// Which value `spread_sums` leaves a lane; kCount or more if none.
template <int kFirst, int kLast, int kCount>
__device__ constexpr int held(int lane) {
    constexpr int kKept = (kCount + 1) / 2;
    const int upper = kCount > 1 && lane & kFirst ? kKept : 0;
    if constexpr (kFirst == kLast)
        return upper;
    else
        return upper + held<kFirst / 2, kLast, kKept>(lane);
}

// The sums of kCount values, each over all lanes that differ in the bits from kFirst down to kLast, each in a lane of
// its own, `holder`'s: every step halves the values that a lane has, so that 10 sums over a warp take 12 shuffles, not
// 50. The order is always the same.
template <int kFirst, int kLast, int kCount>
__device__ inline float spread_sums(const float (&values)[kCount], int lane) {
    constexpr int kKept = (kCount + 1) / 2;
    const bool upper = kCount > 1 && lane & kFirst;
    float kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const float low = values[i], high = kCount == 1 ? low : i + kKept < kCount ? values[i + kKept] : 0.0f;
        kept[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kFirst);
    }
    static_assert(kFirst > kLast || kKept == 1);
    if constexpr (kFirst == kLast)
        return kept[0];
    else
        return spread_sums<kFirst / 2, kLast>(kept, lane);
}

}  // namespace skipnet::cuda
