// How a convolution is divided: among the threads of a group, and into blocks that stay in registers.
#pragma once

#include "thread_team.h"

namespace skipnet::cpu {
namespace {

// A share of `total` things for one of a group.
struct Share {
    int begin, end;
    Share(int begin, int end) : begin(begin), end(end) {}
    Share(int total, const ThreadGroup& group)
        : begin(total * group.rank / group.size), end(total * (group.rank + 1) / group.size) {}
};

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
