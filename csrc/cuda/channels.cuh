// Eight neighbouring channels of a pixel, which a thread takes together: in memory 16 or 32 bytes.
#pragma once

#include "ptx.cuh"

namespace skipnet::cuda {

constexpr int kChannels = 8;

// As they lie in memory, moved 16 bytes at a time.
template <typename Element>
struct Channels {
    static constexpr int kWords = kChannels * sizeof(Element) / 4;
    unsigned words[kWords];

    Channels() = default;
    __device__ static Channels at(const Element* from) {
        Channels result;
        result.load(from);
        return result;
    }
    __device__ explicit Channels(const Element (&values)[kChannels]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(Element) == 4)
                words[i] = __float_as_uint(values[i]);
            else
                words[i] = values[2 * i].bits | static_cast<unsigned>(values[2 * i + 1].bits) << 16;
        }
    }
    __device__ static Channels rounded(const float (&values)[kChannels]) {
        if constexpr (sizeof(Element) == 4) {
            return Channels(values);
        } else {
            Channels result;
#pragma unroll
            for (int i = 0; i < kWords; ++i) result.words[i] = pack<Element>(values[2 * i], values[2 * i + 1]);
            return result;
        }
    }

    __device__ void load(const Element* from) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            const uint4 piece = reinterpret_cast<const uint4*>(from)[i / 4];
            words[i] = piece.x, words[i + 1] = piece.y, words[i + 2] = piece.z, words[i + 3] = piece.w;
        }
    }
    __device__ void store(Element* to) const {
#pragma unroll
        for (int i = 0; i < kWords; i += 4)
            reinterpret_cast<uint4*>(to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
    __device__ static Channels from_shared(const Element* from) {
        Channels result;
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            const uint4 piece = load_shared(reinterpret_cast<const uint4*>(from) + i / 4);
            result.words[i] = piece.x, result.words[i + 1] = piece.y;
            result.words[i + 2] = piece.z, result.words[i + 3] = piece.w;
        }
        return result;
    }
    __device__ void to_shared(Element* to) const {
#pragma unroll
        for (int i = 0; i < kWords; i += 4)
            store_shared(reinterpret_cast<uint4*>(to) + i / 4,
                         make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    }
    __device__ void floats(float (&values)[kChannels]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(Element) == 4)
                values[i] = __uint_as_float(words[i]);
            else
                unpack<Element>(words[i], values[2 * i], values[2 * i + 1]);
        }
    }

    // No channel stays below `least`; NaN stays NaN.
    __device__ void raise_to(float least) {
        unsigned both;
        if constexpr (sizeof(Element) == 4)
            both = __float_as_uint(least);
        else
            both = pack<Element>(least, least);
#pragma unroll
        for (unsigned& word : words) word = greater<Element>(word, both);
    }
};

}  // namespace skipnet::cuda
