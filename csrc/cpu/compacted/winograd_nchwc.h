// 3x3 convolutions of stride 1 over channel-blocked planes by Winograd's F(kOut x kOut, 3x3) (Lavin & Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016); for one instruction set.
#pragma once

#include "../winograd_points.h"
#include "conv_nchwc.h"

namespace skipnet::cpu {
namespace {

// The transforms' one dimension. Each reads and writes every step-th vector.
template <int kOut>
struct Transform;

template <>
struct Transform<2> {
    static constexpr double weight[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};  // G

    template <int Step>
    static inline __attribute__((always_inline)) void input(const Vector* d, Vector* to) {  // B^T d
        to[0] = d[0] - d[2 * Step];
        to[Step] = d[Step] + d[2 * Step];
        to[2 * Step] = d[2 * Step] - d[Step];
        to[3 * Step] = d[Step] - d[3 * Step];
    }
    template <int Step, int ToStep>
    static inline __attribute__((always_inline)) void output(const Vector* m, Vector* to) {  // A^T m
        to[0] = m[0] + m[Step] + m[2 * Step];
        to[ToStep] = m[Step] - m[2 * Step] - m[3 * Step];
    }
};

template <>
struct Transform<4> {
    static constexpr double inner = 1 / (2.0 * kA2 * (kA2 - kB2)), outer = 1 / (2.0 * kB2 * (kB2 - kA2));
    static constexpr double weight[6][3] = {{1 / (static_cast<double>(kA2) * kB2), 0, 0},
                                            {inner, inner * kA, inner * kA2},
                                            {inner, -inner * kA, inner * kA2},
                                            {outer, outer * kB, outer * kB2},
                                            {outer, -outer * kB, outer * kB2},
                                            {0, 0, 1}};

    template <int Step>
    static inline __attribute__((always_inline)) void input(const Vector* d, Vector* to) {
        const Vector d0 = d[0], d1 = d[Step], d2 = d[2 * Step], d3 = d[3 * Step], d4 = d[4 * Step], d5 = d[5 * Step];
        const Vector p = d4 - kB2 * d2, q = kA * (d3 - kB2 * d1), r = d4 - kA2 * d2, s = kB * (d3 - kA2 * d1);
        to[0] = d4 - (kA2 + kB2) * d2 + (kA2 * kB2) * d0;
        to[Step] = p + q;
        to[2 * Step] = p - q;
        to[3 * Step] = r + s;
        to[4 * Step] = r - s;
        to[5 * Step] = d5 - (kA2 + kB2) * d3 + (kA2 * kB2) * d1;
    }
    template <int Step, int ToStep>
    static inline __attribute__((always_inline)) void output(const Vector* m, Vector* to) {
        const Vector a = m[Step] + m[2 * Step], b = kA * (m[Step] - m[2 * Step]);
        const Vector c = m[3 * Step] + m[4 * Step], d = kB * (m[3 * Step] - m[4 * Step]);
        to[0] = m[0] + a + c;
        to[ToStep] = b + d;
        to[2 * ToStep] = kA2 * a + kB2 * c;
        to[3 * ToStep] = kA2 * b + kB2 * d + m[5 * Step];
    }
};

// One point's products of a row of tiles with a panel: to[tile, width * kWidth] = x[tile] weight. Not inlined: it is
// compiled once for both sizes of tiles.
template <typename Operand>
__attribute__((noinline)) void multiply_panel(const Strips& strips, int width, const typename Operand::Element* x,
                                              const Run* runs, int count, const typename Operand::Element* weight,
                                              float* products, Ahead& ahead) {
    ahead.refill();
    for (int i = 0; i < strips.count(); ++i)
        with_block(strips.begin(i + 1) - strips.begin(i), width, [&](auto t, auto k) {
            constexpr int T = decltype(t)::value, K = decltype(k)::value;
            Vector sums[T][K] = {};
            multiply<Operand, kWidth, kWidth, T, K>(sums, x + strips.begin(i) * kWidth, runs, count, weight, ahead);
            float* to = products + strips.begin(i) * K * kWidth;
#pragma GCC unroll 16
            for (int row = 0; row < T; ++row)
                for (int j = 0; j < K; ++j) store(to + (row * K + j) * kWidth, sums[row][j]);
        });
}

template <typename Operand, int kOut>
class Winograd final : public Layer<Operand, Operand> {
    using Element = typename Operand::Element;
    using Images = LayerImages<Operand, Operand>;
    using Memory = cpu::Memory<Operand>;

    static constexpr int kIn = kOut + 2;
    static constexpr int kPoints = kIn * kIn;                           // products of a tile, for each pair of channels
    static constexpr int kChunk = kOut == 2 ? 8 * kStrip : 6 * kStrip;  // tiles whose products wait in L2 together
    static constexpr int kProducts = kChunk * kPanel * kWidth + kWidth;  // floats from a point's to the next
    static constexpr std::size_t kShared = 2 << 20;  // elements of transformed inputs that the threads share, about

public:
    Winograd(const ConvolutionWeights& layer, const Plane& in, const Plane& out)
        : in_(in), out_(out), panels_{out.blocks()}, bias_(packed_bias(layer)),
          weight_(static_cast<std::size_t>(kPoints) * in.channels * out.channels) {
        const std::size_t depth = static_cast<std::size_t>(kPoints) * in.channels;
        for (int o = 0; o < layer.out; ++o)
            for (int c = 0; c < layer.in; ++c) {
                const float* kernel = layer.weight + (static_cast<std::size_t>(o) * layer.in + c) * 9;
                for (int i = 0; i < kIn; ++i)
                    for (int j = 0; j < kIn; ++j) {
                        double sum = 0;
                        for (int y = 0; y < 3; ++y)
                            for (int x = 0; x < 3; ++x)
                                sum +=
                                    Transform<kOut>::weight[i][y] * kernel[3 * y + x] * Transform<kOut>::weight[j][x];
                        const std::size_t place = static_cast<std::size_t>(i * kIn + j) * in.channels + c;
                        weight_.get()[panels_.at(o, place, depth, Operand::kPack)] =
                            Operand::rounded(static_cast<float>(sum));
                    }
            }
        const std::size_t per_image = transformed(tiles());
        images_per_pass_ = per_image < kShared ? static_cast<int>(kShared / per_image) : 1;
    }

    // Images whose transformed inputs fit go together: all inputs are transformed; then every panel is multiplied with
    // chunks of tiles, point by point, and a chunk's products are transformed while they are in the cache.
    void run(const Images& images, Finish finish, const ThreadGroup& group, const Memory& memory) const override {
        for (int first = 0; first < images.count; first += images_per_pass_) {
            const int count = images.count - first < images_per_pass_ ? images.count - first : images_per_pass_;
            const Images some{images.inputs + first, images.outputs + first,
                              images.sums ? images.sums + first : nullptr, count};
            transform_inputs(some, group, memory.shared);
            multiply_all(some, finish, group, memory);
        }
    }

    int parts() const override { return tiles(); }
    Bytes weights() const override {
        return {reinterpret_cast<const char*>(weight_.get()),
                static_cast<std::size_t>(kPoints) * in_.channels * out_.channels * sizeof(Element)};
    }
    std::size_t shared() const override { return transformed(images_per_pass_ * tiles()); }
    std::size_t own() const override { return static_cast<std::size_t>(kPoints) * kProducts; }

private:
    int tiles_down() const { return (out_.height + kOut - 1) / kOut; }
    int tiles_across() const { return (out_.width + kOut - 1) / kOut; }
    int tiles() const { return tiles_down() * tiles_across(); }

    // Elements from a point's transformed inputs to the next's; a line more than needed, for whole powers of two would
    // send all points' lines to the same places of the cache.
    std::size_t point(int tiles) const { return static_cast<std::size_t>(tiles) * in_.channels + kWidth; }
    std::size_t transformed(int tiles) const { return kPoints * point(tiles); }

    void transform_inputs(const Images& images, const ThreadGroup& group, Element* transformed) const {
        const int rows = tiles_down(), across = tiles_across(), all = images.count * tiles();
        const std::size_t step = point(all);
        group.share(images.count * in_.blocks() * rows, [&](int begin, int end) {
            for (int unit = begin; unit < end; ++unit) {
                const int row = unit % rows, block = unit / rows % in_.blocks(), image = unit / rows / in_.blocks();
                const Element* from = images.inputs[image] + static_cast<std::ptrdiff_t>(block) * in_.block() +
                                      in_.at(row * kOut - 1, -1);
                Element* to =
                    transformed + (static_cast<std::size_t>(block) * all + image * tiles() + row * across) * kWidth;
                for (int tile = 0; tile < across; ++tile, from += kOut * kWidth, to += kWidth)
                    transform_input(from, to, step);
            }
        });
    }

    void transform_input(const Element* from, Element* to, std::size_t step) const {
#pragma GCC unroll 36
        for (int p = 0; p < kPoints; ++p)  // for the tile after next: no prefetcher follows so many rows
            __builtin_prefetch(to + p * step + 2 * kWidth, 1);
        Vector columns[kPoints];
        for (int j = 0; j < kIn; ++j) {
            Vector patch[kPoints];
            for (int i = 0; i < kIn; ++i) patch[i * kIn] = Operand::widen(from + i * in_.row() + j * kWidth);
            Transform<kOut>::template input<kIn>(patch, columns + j);
        }
        for (int i = 0; i < kIn; ++i) {
            Vector row[kIn];
            Transform<kOut>::template input<1>(columns + i * kIn, row);
            for (int j = 0; j < kIn; ++j) Operand::narrow(to + (i * kIn + j) * step, row[j]);
        }
    }

    void multiply_all(const Images& images, Finish finish, const ThreadGroup& group, const Memory& memory) const {
        const int all = images.count * tiles(), chunks = (all + kChunk - 1) / kChunk;
        for (int block = 0; block < in_.blocks(); ++block)
            memory.runs[block].from = static_cast<std::ptrdiff_t>(block) * all * kWidth;
        group.share(panels_.count() * chunks, [&](int first, int last) {
            for (int unit = first; unit < last; ++unit)
                multiply_chunk(images, unit / chunks, all * (unit % chunks) / chunks,
                               all * (unit % chunks + 1) / chunks, finish, memory);
        });
    }

    // Tiles begin .. end - 1 with a panel.
    void multiply_chunk(const Images& images, int panel, int begin, int end, Finish finish,
                        const Memory& memory) const {
        const int all = images.count * tiles(), width = panels_.width(panel);
        const Strips strips{1, end - begin};
        const Element* weight = weight_.get() + panels_.begin(panel, static_cast<std::size_t>(kPoints) * in_.channels);
        for (int p = 0; p < kPoints; ++p, weight += static_cast<std::size_t>(in_.channels) * width * kWidth) {
            const Element* x = memory.shared + p * point(all) + static_cast<std::size_t>(begin) * kWidth;
            float* products = memory.own + p * kProducts;
            multiply_panel<Operand>(strips, width, x, memory.runs, in_.blocks(), weight, products, *memory.ahead);
        }
        for (int tile = begin; tile < end; ++tile) {
            const int image = tile / tiles(), place = tile % tiles();
            for (int j = 0; j < width; ++j)
                transform_output(memory.own + ((tile - begin) * width + j) * kWidth, panel * kPanel + j, place,
                                 images.outputs[image], images.sums ? images.sums[image] : nullptr, finish);
        }
    }

    void transform_output(const float* products, int column, int place, Element* output, float* sums,
                          Finish finish) const {
        const int y = place / tiles_across() * kOut, x = place % tiles_across() * kOut;
        Element* corner = output + static_cast<std::ptrdiff_t>(column) * out_.block() + out_.at(y, x);
        for (int i = 0; i < kOut; ++i)
            for (int j = 0; j < kOut; ++j) __builtin_prefetch(corner + i * out_.row() + j * kWidth, 1);
        Vector half[kOut * kIn], result[kOut * kOut];
        for (int j = 0; j < kIn; ++j) {
            Vector m[kPoints];
            for (int i = 0; i < kIn; ++i) m[i * kIn] = load(products + (i * kIn + j) * kProducts);
            Transform<kOut>::template output<kIn, kIn>(m, half + j);
        }
        for (int i = 0; i < kOut; ++i) Transform<kOut>::template output<1, 1>(half + i * kIn, result + i * kOut);
        const Vector bias = load(bias_.get() + column * kWidth);
        Vector total = {};
        const auto write = [&](int rows, int pixels) __attribute__((always_inline)) {
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < pixels; ++j) {
                    Element* to = corner + i * out_.row() + j * kWidth;
                    const Vector value = finished<Operand>(result[i * kOut + j] + bias, to, finish);
                    Operand::narrow(to, value);
                    total += value;
                }
        };
        const int down = out_.height - y, across = out_.width - x;
        if (down >= kOut && across >= kOut)
            write(kOut, kOut);  // with constants the result stays in registers
        else
            write(down < kOut ? down : kOut, across < kOut ? across : kOut);
        if (sums) store(sums + place * out_.channels + column * kWidth, total);
    }

    Plane in_, out_;  // the input's inside is whole tiles
    Panels panels_;
    Buffer bias_;               // [out]
    BufferOf<Element> weight_;  // [panels, kPoints, in, panel's channels], transformed
    int images_per_pass_;       // images whose transformed inputs are in shared memory at once
};

// The Winograd variant for a map. Small maps have few tiles for many channels: there the transformed weights, 16/9 or
// 36/9 of the weights, take longer to read than the products to compute.
inline int winograd_tile(int height, int width) { return height * width < 100 ? 2 : 4; }

// What a convolution of 3x3 and this stride reads.
inline Plane bordered(int height, int width, int channels, int stride) {
    return {height, width, padded(channels), 1, stride == 1 ? winograd_tile(height, width) : 1};
}

inline Plane unbordered(int height, int width, int channels) { return {height, width, padded(channels), 0, 1}; }

// A convolution of stride 1 by the Winograd variant that its input plane is made for; everything else directly.
template <typename Operand>
std::unique_ptr<Layer<Operand, Operand>> make_layer(const ConvolutionWeights& layer, const Plane& in,
                                                    const Plane& out) {
    if (layer.kernel != 3 || layer.stride != 1) return make_direct<Operand, Operand>(layer, in, out);
    if (in.tile == 2) return std::make_unique<Winograd<Operand, 2>>(layer, in, out);
    return std::make_unique<Winograd<Operand, 4>>(layer, in, out);
}

}  // namespace
}  // namespace skipnet::cpu
