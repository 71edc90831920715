// Matrix products of bfloat16 in the tile registers of AMX; included by sources compiled with -mamx-bf16.
//
// SKIPNET_SOFTWARE_AMX does the same in plain C++: the tests' build, so that the way through the tiles can be tested on
// a processor that has none.
#pragma once

#include "vector.h"

namespace skipnet::cpu {
namespace {

// BFloat16 whose products are formed for whole tiles of memory: 16 rows of x with 16 columns of weights.
struct AmxBFloat16 : BFloat16 {};

constexpr int kTileRows = 16;

// Claims the thread's tile registers for products over a depth that is a multiple of 16.
class Tiles {
public:
    explicit Tiles(int depth) : step_(depth % 32 == 0 ? 32 : 16) {
#ifndef SKIPNET_SOFTWARE_AMX
        alignas(64) Configuration configuration{};
        configuration.palette = 1;
        configuration.set(0, kTileRows, 64);         // sums
        configuration.set(1, kTileRows, step_ * 2);  // x
        configuration.set(2, step_ / 2, 64);         // weights
        _tile_loadconfig(&configuration);
#endif
    }
    ~Tiles() {
#ifndef SKIPNET_SOFTWARE_AMX
        _tile_release();
#endif
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // to[16, 16] = x[16, depth] weight[depth, 16]; of the weights, two channels lie side by side. The distances are in
    // elements: from a row to the next, of the weights from a pair of channels to the next.
    void multiply(const std::uint16_t* x, int x_stride, const std::uint16_t* weight, int weight_stride, int depth,
                  float* to, int to_stride) const {
#ifdef SKIPNET_SOFTWARE_AMX
        for (int row = 0; row < kTileRows; ++row) {
            Vector sum = {};
            for (int c = 0; c < depth; c += 2)
                sum = BFloat16::multiply_add(BFloat16::broadcast_pack(x + row * x_stride + c),
                                             BFloat16::load_pack(weight + c / 2 * weight_stride), sum);
            store(to + row * to_stride, sum);
        }
#else
        _tile_zero(0);
        for (int c = 0; c < depth; c += step_) {
            _tile_loadd(1, x + c, x_stride * 2);
            _tile_loadd(2, weight + c / 2 * weight_stride, weight_stride * 2);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, to, to_stride * 4);
#endif
    }

private:
    // As ldtilecfg reads it.
    struct Configuration {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t bytes[16];
        std::uint8_t rows[16];

        void set(int tile, int of_rows, int of_bytes) {
            rows[tile] = static_cast<std::uint8_t>(of_rows);
            bytes[tile] = static_cast<std::uint16_t>(of_bytes);
        }
    };

    int step_;  // channels of a tile
};

}  // namespace
}  // namespace skipnet::cpu
