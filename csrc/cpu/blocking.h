// How a convolution is divided into blocks that stay in registers.
#pragma once

namespace skipnet::cpu {
namespace {

// Calls function(integral constant T, integral constant K) with the given numbers, T <= kAccumulators / K.
template <int N>
struct Number {
    static constexpr int value = N;
};

template <int K, int T, typename Function>
inline void with_rows(int rows, const Function& function) {
    if (rows == T)
        function(Number<T>{}, Number<K>{});
    else if constexpr (T > 1)
        with_rows<K, T - 1>(rows, function);
}

}  // namespace
}  // namespace skipnet::cpu
