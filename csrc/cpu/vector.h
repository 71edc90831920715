// One vector type for every instruction set: the compiler's own, as wide as SKIPNET_WIDTH floats.
//
// Included only by sources that are compiled once for each instruction set. Everything is in an unnamed namespace:
// a function compiled for one instruction set must never be linked in the place of another's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace skipnet::cpu {
namespace {

constexpr int kWidth = SKIPNET_WIDTH;                 // floats in a vector
constexpr int kAccumulators = kWidth == 16 ? 16 : 8;  // vectors that a kernel keeps in registers
constexpr int kMaxColumns = kWidth == 16 ? 4 : 2;     // of these, vectors along the output channels

typedef float Vector __attribute__((vector_size(4 * SKIPNET_WIDTH)));
typedef int IntVector __attribute__((vector_size(4 * SKIPNET_WIDTH)));

inline Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline Vector broadcast(float value) { return value - Vector{}; }

// x * y + z, for what is computed in two places and must come out alike: whether a compiler fuses x * y + z depends on
// what else it needs x * y for.
inline Vector fused(Vector x, Vector y, Vector z) {
#ifdef __AVX512F__
    return Vector(_mm512_fmadd_ps(__m512(x), __m512(y), __m512(z)));
#else
    return x * y + z;
#endif
}

// Keeps NaN, as PyTorch's does: the comparison is false for it.
inline Vector relu(Vector x) { return x < Vector{} ? Vector{} : x; }

// e^x to about one unit in the last place; arguments beyond +-87 are clamped, NaN stays NaN.
inline Vector exp(Vector x) {
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

inline Vector sigmoid(Vector x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(-x)); }

inline Vector tanh(Vector x) { return broadcast(2.0f) * sigmoid(x + x) - broadcast(1.0f); }

constexpr int vectors(int floats) { return (floats + kWidth - 1) / kWidth; }

constexpr int padded(int floats) { return vectors(floats) * kWidth; }

// What the products of a convolution are formed from; sums are float32 always. Of kPack input channels, a product is
// formed and summed at once: their weights lie side by side.
struct Float32 {
    using Element = float;
    using Pack = Vector;  // kWidth outputs' weights
    static constexpr int kPack = 1;

    static Element rounded(float value) { return value; }
    static Vector widen(const Element* from) { return load(from); }
    static void narrow(Element* to, Vector value) { store(to, value); }
    static void pack(Element* to, const Vector (&weights)[kPack]) { store(to, weights[0]); }
    static Pack load_pack(const Element* from) { return load(from); }
    static Pack broadcast_pack(const Element* from) { return broadcast(*from); }
    static Vector multiply_add(Pack x, Pack weight, Vector sum) { return x * weight + sum; }
};

#ifdef __AVX512BF16__
// Rounds to nearest even; subnormal operands count as zero.
struct BFloat16 {
    using Element = std::uint16_t;
    using Pack = __m512bh;
    static constexpr int kPack = 2;

    static Element rounded(float value) {
        Element to[kWidth];
        narrow(to, broadcast(value));
        return to[0];
    }
    static Vector widen(const Element* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return Vector(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
    }
    static void narrow(Element* to, Vector value) {
        const __m256bh half = _mm512_cvtneps_pbh(__m512(value));
        std::memcpy(to, &half, sizeof half);
    }
    static void pack(Element* to, const Vector (&weights)[kPack]) {
        alignas(64) static constexpr std::uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512bh both = _mm512_cvtne2ps_pbh(__m512(weights[1]), __m512(weights[0]));
        __m512i bits;
        std::memcpy(&bits, &both, sizeof bits);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), bits));
    }
    static Pack load_pack(const Element* from) {
        Pack value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    static Pack broadcast_pack(const Element* from) {
        int both;
        std::memcpy(&both, from, sizeof both);
        const __m512i bits = _mm512_set1_epi32(both);
        Pack value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    static Vector multiply_add(Pack x, Pack weight, Vector sum) {
        return Vector(_mm512_dpbf16_ps(__m512(sum), x, weight));
    }
};
#endif

// What this variant's networks form products from.
#if defined(__AMX_BF16__)
struct AmxBFloat16;  // amx.h
using VariantOperand = AmxBFloat16;
#elif defined(__AVX512BF16__)
using VariantOperand = BFloat16;
#else
using VariantOperand = Float32;
#endif

// Zeroed elements on a cache line, owned.
template <typename Element>
class BufferOf {
public:
    BufferOf() = default;
    explicit BufferOf(std::size_t size) {
        const std::size_t bytes = (size * sizeof(Element) + 63) / 64 * 64;
        data_ = static_cast<Element*>(std::aligned_alloc(64, bytes ? bytes : 64));
        if (!data_) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
    }
    BufferOf(BufferOf&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    BufferOf& operator=(BufferOf&& other) noexcept {
        Element* mine = data_;
        data_ = other.data_;
        other.data_ = mine;
        return *this;
    }
    ~BufferOf() { std::free(data_); }
    Element* get() { return data_; }
    const Element* get() const { return data_; }

private:
    Element* data_ = nullptr;
};

using Buffer = BufferOf<float>;

}  // namespace
}  // namespace skipnet::cpu
