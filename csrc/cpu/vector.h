// One vector type for every instruction set: the compiler's own, as wide as SKIPNET_WIDTH floats.
//
// Included only by sources that are compiled once for each instruction set. Everything is in an unnamed namespace:
// a function compiled for one instruction set must never be linked in the place of another's.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

namespace skipnet::cpu {
namespace {

constexpr int kWidth = SKIPNET_WIDTH;                  // floats in a vector
constexpr int kAccumulators = kWidth == 16 ? 16 : 8;   // vectors that a kernel keeps in registers
constexpr int kMostColumns = kWidth == 16 ? 4 : 2;     // of these, vectors along the output channels

typedef float Vector __attribute__((vector_size(4 * SKIPNET_WIDTH)));
typedef int IntVector __attribute__((vector_size(4 * SKIPNET_WIDTH)));

inline Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline Vector broadcast(float value) { return value - Vector{}; }

// Keeps NaN, as PyTorch's does: the comparison is false for it.
inline Vector relu(Vector x) { return x < Vector{} ? Vector{} : x; }

// e^x to about one unit in the last place; arguments beyond +-87 are clamped, NaN stays NaN.
inline Vector exponential(Vector x) {
    const Vector limit = broadcast(87.0f);
    x = x > limit ? limit : x;
    x = x < -limit ? -limit : x;
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector n = (x * broadcast(1.44269504f) + magic) - magic;
    const Vector r = (x - n * broadcast(0.693145752f)) - n * broadcast(1.42860677e-6f);  // ln 2 in two parts
    Vector p = broadcast(1.0f / 720);
    for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + broadcast(coefficient);
    const IntVector power = (__builtin_convertvector(n, IntVector) + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

inline Vector sigmoid(Vector x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)); }

inline Vector hyperbolic_tangent(Vector x) { return broadcast(2.0f) * sigmoid(x + x) - broadcast(1.0f); }

constexpr int vectors(int floats) { return (floats + kWidth - 1) / kWidth; }

constexpr int padded(int floats) { return vectors(floats) * kWidth; }

// Zeroed floats on a cache line, owned.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(std::size_t size) {
        const std::size_t bytes = (size * sizeof(float) + 63) / 64 * 64;
        data_ = static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64));
        if (!data_) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
    }
    Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer& operator=(Buffer&& other) noexcept {
        float* mine = data_;
        data_ = other.data_;
        other.data_ = mine;
        return *this;
    }
    ~Buffer() { std::free(data_); }
    float* get() { return data_; }
    const float* get() const { return data_; }

private:
    float* data_ = nullptr;
};

}  // namespace
}  // namespace skipnet::cpu
