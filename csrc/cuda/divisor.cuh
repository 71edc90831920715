// Division by a number that the host knows: a multiplication.
#pragma once

namespace skipnet::cuda {

// Of dividends from 0 up to 2^31.
class Divisor {
public:
    Divisor() = default;
    explicit Divisor(int value) : value_(value) {
        while (value > 1ll << (shift_ - 31)) ++shift_;
        multiplier_ = static_cast<unsigned>(((1ull << shift_) + value - 1) / value);
    }

    __host__ __device__ int value() const { return value_; }
    // dividend / value, which leaves the remainder.
    __device__ int divide(int& dividend) const {
        const int quotient = static_cast<int>(static_cast<unsigned long long>(dividend) * multiplier_ >> shift_);
        dividend -= quotient * value_;
        return quotient;
    }

private:
    int value_ = 1, shift_ = 31;
    unsigned multiplier_ = 1u << 31;  // 2^shift / value, rounded up
};

}  // namespace skipnet::cuda
