// Convolutions over channels-last planes, for one instruction set; see vector.h.
//
// 3x3 with stride 1 runs as Winograd F(4x4, 3x3) (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016): 36 products for 16 outputs instead of 144. Everything else runs directly. In both, an output element is
// a sum in one fixed order: it does not depend on the batch, on the blocking or on the threads.
#pragma once

#include "blocking.h"
#include "engine.h"
#include "threads.h"
#include "vector.h"

namespace skipnet::cpu {
namespace {

constexpr int kTile = 4;                   // outputs of a Winograd tile, each way
constexpr int kPatch = kTile + 2;          // inputs of a tile, each way
constexpr int kPoints = kPatch * kPatch;   // products of a tile, for each pair of channels
constexpr int kTileBlock = 8;              // tiles that are transformed together

// An image's activation: channels last, channels padded to whole vectors, with a border of zeros that nobody writes:
// one pixel all around, and as much more below and to the right as makes the inside whole tiles.
struct Plane {
    int height, width, channels;  // channels as they lie in memory

    int tiles_down() const { return (height + kTile - 1) / kTile; }
    int tiles_across() const { return (width + kTile - 1) / kTile; }
    int tiles() const { return tiles_down() * tiles_across(); }
    int row() const { return (tiles_across() * kTile + 2) * channels; }           // floats from a row to the next
    int size() const { return (tiles_down() * kTile + 2) * row(); }               // floats in all
    int at(int y, int x) const { return (y + 1) * row() + (x + 1) * channels; }  // -1 is the border
};

// accumulators[t][k] += sum over c of x[t * step + c] * weight[c * columns + k * kWidth ...], in ascending c.
template <int T, int K>
inline __attribute__((always_inline)) void accumulate(Vector (&accumulators)[T][K], const float* x, int step,
                                                      const float* weight, int depth, int columns) {
    for (int c = 0; c < depth; ++c, weight += columns) {
        Vector w[K];
        for (int k = 0; k < K; ++k) w[k] = load(weight + k * kWidth);
        for (int t = 0; t < T; ++t) {
            const Vector value = broadcast(x[t * step + c]);
            for (int k = 0; k < K; ++k) accumulators[t][k] += value * w[k];
        }
    }
}

// Covers rows x columns (in vectors) with register blocks: function(T, K, first row, first column).
template <int K = kMostColumns, typename Function>
inline void for_blocks(int rows, int first_column, int last_column, const Function& function) {
    constexpr int most = kAccumulators / K < kTileBlock ? kAccumulators / K : kTileBlock;
    int column = first_column;
    for (; column + K <= last_column; column += K)
        for (int row = 0; row < rows; row += most)
            with_rows<K, most>(rows - row < most ? rows - row : most,
                               [&](auto t, auto k) { function(t, k, row, column); });
    if constexpr (K > 1)
        if (column < last_column) for_blocks<K / 2>(rows, column, last_column, function);
}

// Where a thread works. One a thread.
struct Scratch {
    Buffer inputs;    // [kPoints, kTileBlock, most channels in]
    Buffer products;  // [kPoints, kTileBlock, most channels out]

    Scratch(int most_channels)
        : inputs(static_cast<std::size_t>(kPoints) * kTileBlock * most_channels),
          products(static_cast<std::size_t>(kPoints) * kTileBlock * most_channels) {}
};

// 3x3, stride 1, padding 1.
class Winograd {
public:
    Winograd(const ConvolutionWeights& layer, int in_channels)
        : in_(in_channels), out_(padded(layer.out)), weight_(static_cast<std::size_t>(kPoints) * in_ * out_),
          bias_(out_) {
        static const double g[kPatch][3] = {{1.0 / 4, 0, 0},
                                            {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                            {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                            {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                            {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                            {0, 0, 1}};
        for (int o = 0; o < layer.out; ++o) {
            bias_.get()[o] = layer.bias[o];
            for (int c = 0; c < layer.in; ++c) {
                const float* kernel = layer.weight + (static_cast<std::size_t>(o) * layer.in + c) * 9;
                for (int i = 0; i < kPatch; ++i)
                    for (int j = 0; j < kPatch; ++j) {
                        double sum = 0;
                        for (int y = 0; y < 3; ++y)
                            for (int x = 0; x < 3; ++x) sum += g[i][y] * kernel[3 * y + x] * g[j][x];
                        weight_.get()[(static_cast<std::size_t>(i * kPatch + j) * in_ + c) * out_ + o] =
                            static_cast<float>(sum);
                    }
            }
        }
    }

    // outputs = relu(convolution(inputs) + bias [+ outputs]); tile_sums, where given, gets the sum of each tile's
    // outputs. The team shares the work: whole tiles, or channels where there are too few tiles.
    void run(const Plane& in, const float* const* inputs /* [images] of `in` */, float* const* outputs /* [images] */,
             bool add_outputs, float* const* tile_sums /* [images] of [tiles, out], or null */, int images,
             const Team& team, Scratch& scratch) const {
        const Plane out{in.height, in.width, out_};
        const int per_image = in.tiles(), tiles = images * per_image;
        const int blocks = (tiles + kTileBlock - 1) / kTileBlock;
        const bool by_tiles = blocks >= team.size;
        const Team alone{0, 1, nullptr};
        const Share mine(blocks, by_tiles ? team : alone), columns(out_ / kWidth, by_tiles ? alone : team);
        for (int block = mine.begin; block < mine.end; ++block) {
            const int first = block * kTileBlock;
            const int count = tiles - first < kTileBlock ? tiles - first : kTileBlock;
            for (int t = 0; t < count; ++t) {
                const int image = (first + t) / per_image, tile = (first + t) % per_image;
                transform_input(in, inputs[image], tile, t, scratch.inputs.get());
            }
            multiply(count, columns, scratch);
            for (int t = 0; t < count; ++t) {
                const int image = (first + t) / per_image, tile = (first + t) % per_image;
                for (int column = columns.begin; column < columns.end; ++column)
                    transform_output(out, outputs[image], tile, t, column, add_outputs,
                                     tile_sums ? tile_sums[image] : nullptr, scratch.products.get());
            }
        }
    }

    int out_channels() const { return out_; }

private:
    // One dimension of B^T d: six values to six, of which outer() gives rows 0, 1, 2 and 5, inner() 3 and 4.
    struct Six {
        Vector d0, d1, d2, d3, d4, d5;

        Six(const float* d, int step)
            : d0(load(d)), d1(load(d + step)), d2(load(d + 2 * step)), d3(load(d + 3 * step)),
              d4(load(d + 4 * step)), d5(load(d + 5 * step)) {}
        Six(const Vector (&d)[kPatch]) : d0(d[0]), d1(d[1]), d2(d[2]), d3(d[3]), d4(d[4]), d5(d[5]) {}

        void outer(Vector& row0, Vector& row1, Vector& row2, Vector& row5) const {
            const Vector p = d4 - 4.0f * d2, q = d3 - 4.0f * d1;
            row0 = d4 - 5.0f * d2 + 4.0f * d0;
            row1 = p + q;
            row2 = p - q;
            row5 = d5 - 5.0f * d3 + 4.0f * d1;
        }
        void inner(Vector& row3, Vector& row4) const {
            const Vector r = d4 - d2, s = d3 - d1;
            row3 = r + 2.0f * s;
            row4 = r - 2.0f * s;
        }
    };

    void transform_input(const Plane& plane, const float* image, int tile, int place, float* to) const {
        const int y = tile / plane.tiles_across() * kTile, x = tile % plane.tiles_across() * kTile;
        for (int c = 0; c < in_; c += kWidth) {
            const float* corner = image + plane.at(y - 1, x - 1) + c;
            const auto finish = [&](int row, const Vector (&half)[kPatch]) {
                Vector result[kPatch];
                const Six six(half);
                six.outer(result[0], result[1], result[2], result[5]);
                six.inner(result[3], result[4]);
                for (int j = 0; j < kPatch; ++j)
                    store(to + ((row * kPatch + j) * kTileBlock + place) * in_ + c, result[j]);
            };
            // Columns first, in two passes over the patch: all six rows at once do not fit the registers.
            Vector row0[kPatch], row1[kPatch], row2[kPatch], row5[kPatch];
            for (int j = 0; j < kPatch; ++j)
                Six(corner + j * plane.channels, plane.row()).outer(row0[j], row1[j], row2[j], row5[j]);
            finish(0, row0);
            finish(1, row1);
            finish(2, row2);
            finish(5, row5);
            Vector row3[kPatch], row4[kPatch];
            for (int j = 0; j < kPatch; ++j) Six(corner + j * plane.channels, plane.row()).inner(row3[j], row4[j]);
            finish(3, row3);
            finish(4, row4);
        }
    }

    void multiply(int count, const Share& columns, Scratch& scratch) const {
        for (int point = 0; point < kPoints; ++point) {
            const float* x = scratch.inputs.get() + point * kTileBlock * in_;
            const float* weight = weight_.get() + static_cast<std::size_t>(point) * in_ * out_;
            float* products = scratch.products.get() + point * kTileBlock * out_;
            for_blocks(count, columns.begin, columns.end, [&](auto t, auto k, int row, int column) {
                constexpr int T = decltype(t)::value, K = decltype(k)::value;
                Vector sums[T][K] = {};
                accumulate<T, K>(sums, x + row * in_, in_, weight + column * kWidth, in_, out_);
                for (int i = 0; i < T; ++i)
                    for (int j = 0; j < K; ++j)
                        store(products + (row + i) * out_ + (column + j) * kWidth, sums[i][j]);
            });
        }
    }

    // One dimension of A^T m: six values to four.
    static inline void transform_four(const Vector* m, int step, Vector* to, int to_step) {
        const Vector a = m[step] + m[2 * step], b = m[step] - m[2 * step];
        const Vector c = m[3 * step] + m[4 * step], d = m[3 * step] - m[4 * step];
        to[0] = m[0] + a + c;
        to[to_step] = b + 2.0f * d;
        to[2 * to_step] = a + 4.0f * c;
        to[3 * to_step] = b + 8.0f * d + m[5 * step];
    }

    void transform_output(const Plane& plane, float* image, int tile, int place, int column, bool add_outputs,
                          float* tile_sums, const float* products) const {
        const int y = tile / plane.tiles_across() * kTile, x = tile % plane.tiles_across() * kTile;
        Vector m[kPoints], half[kTile * kPatch], result[kTile * kTile];
        for (int point = 0; point < kPoints; ++point)
            m[point] = load(products + (point * kTileBlock + place) * out_ + column * kWidth);
        for (int j = 0; j < kPatch; ++j) transform_four(m + j, kPatch, half + j, kPatch);
        for (int i = 0; i < kTile; ++i) transform_four(half + i * kPatch, 1, result + i * kTile, 1);
        const Vector bias = load(bias_.get() + column * kWidth);
        Vector sum = {};
        const auto finish = [&](int rows, int pixels) __attribute__((always_inline)) {
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < pixels; ++j) {
                    float* to = image + plane.at(y + i, x + j) + column * kWidth;
                    Vector value = result[i * kTile + j] + bias;
                    if (add_outputs) value += load(to);
                    value = relu(value);
                    store(to, value);
                    sum += value;
                }
        };
        const int down = plane.height - y, across = plane.width - x;
        if (down >= kTile && across >= kTile)
            finish(kTile, kTile);  // with constants the result stays in registers
        else
            finish(down < kTile ? down : kTile, across < kTile ? across : kTile);
        if (tile_sums) store(tile_sums + tile * out_ + column * kWidth, sum);
    }

    int in_, out_;   // channels as they lie in memory
    Buffer weight_;  // [kPoints, in, out], transformed
    Buffer bias_;    // [out]
};

// Any kernel of 1x1 or 3x3 with any stride.
class Direct {
public:
    // in_channels: as they lie in memory.
    Direct(const ConvolutionWeights& layer, int in_channels)
        : in_(in_channels), out_(padded(layer.out)), kernel_(layer.kernel), stride_(layer.stride),
          weight_(static_cast<std::size_t>(kernel_) * kernel_ * in_ * out_), bias_(out_) {
        for (int o = 0; o < layer.out; ++o) {
            bias_.get()[o] = layer.bias[o];
            for (int c = 0; c < layer.in; ++c)
                for (int tap = 0; tap < kernel_ * kernel_; ++tap)
                    weight_.get()[(static_cast<std::size_t>(tap) * in_ + c) * out_ + o] =
                        layer.weight[(static_cast<std::size_t>(o) * layer.in + c) * kernel_ * kernel_ + tap];
        }
    }

    Plane out(const Plane& in) const {
        return {(in.height - 1) / stride_ + 1, (in.width - 1) / stride_ + 1, out_};
    }

    // outputs = convolution(inputs) + bias, with ReLU or without. The team shares the rows of all images.
    void run(const Plane& in, const float* const* inputs /* [images] */, float* const* outputs /* [images] */,
             bool with_relu, int images, const Team& team) const {
        const Plane to = out(in);
        const Share mine(images * to.height, team);
        for (int row = mine.begin; row < mine.end; ++row) {
            const int image = row / to.height, y = row % to.height;
            const float* corner = inputs[image] + in.at(y * stride_ - kernel_ / 2, -(kernel_ / 2));
            for (int x = 0; x < to.width; x += kTileBlock) {
                const int count = to.width - x < kTileBlock ? to.width - x : kTileBlock;
                pixels(in, corner + x * stride_ * in_, outputs[image] + to.at(y, x), count, with_relu);
            }
        }
    }

private:
    void pixels(const Plane& in, const float* corner, float* to, int count, bool with_relu) const {
        for_blocks(count, 0, out_ / kWidth, [&](auto t, auto k, int pixel, int column) {
            constexpr int T = decltype(t)::value, K = decltype(k)::value;
            Vector sums[T][K];
            for (int i = 0; i < T; ++i)
                for (int j = 0; j < K; ++j) sums[i][j] = load(bias_.get() + (column + j) * kWidth);
            for (int i = 0; i < kernel_; ++i)  // a kernel row's pixels and channels lie in one run of memory
                accumulate<T, K>(sums, corner + i * in.row() + pixel * stride_ * in_, stride_ * in_,
                                 weight_.get() + static_cast<std::size_t>(i) * kernel_ * in_ * out_ + column * kWidth,
                                 kernel_ * in_, out_);
            for (int i = 0; i < T; ++i)
                for (int j = 0; j < K; ++j)
                    store(to + (pixel + i) * out_ + (column + j) * kWidth, with_relu ? relu(sums[i][j]) : sums[i][j]);
        });
    }

    int in_, out_, kernel_, stride_;
    Buffer weight_;  // [kernel, kernel, in, out]
    Buffer bias_;    // [out]
};

}  // namespace
}  // namespace skipnet::cpu
