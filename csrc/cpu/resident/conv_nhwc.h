// Convolutions over channels-last planes, for one instruction set; see vector.h.
//
// 3x3 with stride 1 runs as Winograd F(4x4, 3x3) (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016): 36 products for 16 outputs instead of 144. Everything else runs directly. In both, an output element is
// a sum in one fixed order: it does not depend on the batch, on the blocking or on the threads.
#pragma once

#include <type_traits>
#include <vector>

#ifdef __AMX_BF16__
#include "../amx.h"
#endif
#include "../blocking.h"
#include "../engine.h"
#include "../thread_team.h"
#include "../vector.h"
#include "../winograd_points.h"

namespace skipnet::cpu {
namespace {

constexpr int kTile = 4;                  // outputs of a Winograd tile, each way
constexpr int kPatch = kTile + 2;         // inputs of a tile, each way
constexpr int kPoints = kPatch * kPatch;  // products of a tile, for each pair of channels
constexpr int kFewTiles = 4;              // whose products and kernels' transform fit the registers
constexpr int kPixels = 8;                // outputs of a direct convolution that are computed together

// Winograd tiles that are transformed together.
template <typename Operand>
constexpr int kTileBlock = 8;
#ifdef __AMX_BF16__
template <>
constexpr int kTileBlock<AmxBFloat16> = kTileRows;
#endif

// Of a tile's `in` channels, those that lie together when it is transformed; then come the block's other tiles.
template <typename Operand>
constexpr int run_of([[maybe_unused]] int in) {
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<Operand, AmxBFloat16>) return in;
#endif
    return kWidth;  // a constant: its multiples need no registers
}

// An image's activation: channels last, channels padded to whole vectors, with a border of zeros that nobody writes:
// one pixel all around, and as much more below and to the right as makes the inside whole tiles.
struct Plane {
    int height, width, channels;  // channels as they lie in memory

    int tiles_down() const { return (height + kTile - 1) / kTile; }
    int tiles_across() const { return (width + kTile - 1) / kTile; }
    int tiles() const { return tiles_down() * tiles_across(); }
    int row() const { return (tiles_across() * kTile + 2) * channels; }          // floats from a row to the next
    int size() const { return (tiles_down() * kTile + 2) * row(); }              // floats in all
    int at(int y, int x) const { return (y + 1) * row() + (x + 1) * channels; }  // -1 is the border
};

// sums[t][k] += sum over c < depth of x[t * step + c] * weight[c, k], in ascending c. It is `packs` from a pack of
// weights to the next, `columns` to the next column's.
template <typename Operand, int T, int K>
inline __attribute__((always_inline)) void accumulate(Vector (&sums)[T][K], const typename Operand::Element* x,
                                                      std::ptrdiff_t step, const typename Operand::Element* weight,
                                                      int depth, std::ptrdiff_t packs, std::ptrdiff_t columns) {
    constexpr int kPack = Operand::kPack;
#pragma GCC unroll 1
    for (std::ptrdiff_t c = 0; c < depth; c += kPack, weight += packs) {
        typename Operand::Pack w[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) w[k] = Operand::load_pack(weight + k * columns);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            const typename Operand::Pack value = Operand::broadcast_pack(x + t * step + c);
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) sums[t][k] = Operand::multiply_add(value, w[k], sums[t][k]);
        }
    }
}

// Covers rows x columns (in vectors) with register blocks: function(T, K, first row, first column).
template <int K = kMaxColumns, typename Function>
inline void for_blocks(int rows, int first_column, int last_column, const Function& function) {
    constexpr int most = kAccumulators / K < kPixels ? kAccumulators / K : kPixels;
    int column = first_column;
    for (; column + K <= last_column; column += K)
        for (int row = 0; row < rows; row += most)
            with_rows<K, most>(rows - row < most ? rows - row : most,
                               [&](auto t, auto k) { function(t, k, row, column); });
    if constexpr (K > 1)
        if (column < last_column) for_blocks<K / 2>(rows, column, last_column, function);
}

// Columns, the output channels' vectors: begin .. end - 1.
struct Columns {
    int begin, end;
};

// How many of the output channels' vectors are worked on at a time. Their transformed kernels are written to the same
// memory for every convolution and must not leave the second cache on the way. One alone would leave the sums of a map
// of four tiles waiting for each other.
template <typename Operand>
constexpr int max_columns(int in) {
    constexpr int kBytes = 160000;  // measured: docs/cpu.md
    const int bytes = kPoints * in * kWidth * static_cast<int>(sizeof(typename Operand::Element));
    return 2 * bytes < kBytes ? kBytes / bytes : 2;
}

// Whether so few tiles that transforming their kernels would take longer than multiplying by them.
template <typename Operand>
constexpr bool transforms_in_registers(int tiles) {
    return std::is_same_v<Operand, Float32> && kWidth == 16 && tiles <= kFewTiles;
}

// Elements from a point's `size` to the next point's: a line of the cache more. All points of a tile, or of a pair of
// channels, are written together, and a power of two apart they would meet in a few sets of the cache.
template <typename Element>
constexpr std::ptrdiff_t padded_stride(int size) {
    return size + 64 / static_cast<int>(sizeof(Element));
}

// Elements from a column's transformed weights to the next column's.
template <typename Operand>
constexpr std::ptrdiff_t weights_stride(int in) {
    return kPoints * padded_stride<typename Operand::Element>(in * kWidth);
}

// Elements from a point's transformed inputs to the next point's: as far as from its products to the next point's.
template <typename Operand>
constexpr std::ptrdiff_t inputs_step(int in) {
    return padded_stride<float>(kTileBlock<Operand> * in) * sizeof(float) / sizeof(typename Operand::Element);
}

// Elements from a block's transformed inputs to the next block's.
template <typename Operand>
constexpr std::ptrdiff_t inputs_stride(int in) {
    return kPoints * inputs_step<Operand>(in);
}

// Kernels that a thread will read in its next convolution, asked for while it multiplies in this one: between calls
// they have left the caches, and their transform would wait for each line.
class ReadAhead {
public:
    void begin(const void* from, std::size_t bytes) {
        next_ = static_cast<const char*>(from);
        end_ = next_ + bytes;
        part_ = (bytes / kPoints + kStep - 1) / kStep * kStep;
    }

    // Asks for one part of kPoints: all of it together would be in the way of what is being read.
    void next_part() {
        if (next_ == end_) return;
        const char* const end = end_ - next_ < part_ ? end_ : next_ + part_;
        for (; next_ < end; next_ += kStep)
            for (int line = 0; line < kStep; line += kLine) __builtin_prefetch(next_ + line);
        next_ = end;
    }

private:
    static constexpr int kLine = 64, kStep = 4 * kLine;
    const char *next_ = nullptr, *end_ = nullptr;
    std::ptrdiff_t part_ = 0;
};

// Where a thread works. One per thread.
template <typename Operand>
struct Scratch {
    using Element = typename Operand::Element;
    static constexpr int kBlock = kTileBlock<Operand>;

    BufferOf<Element> weights;  // [columns, kPoints, stride] of [channels in / kPack, kWidth, kPack]
    BufferOf<Element> inputs;   // [blocks of tiles, kPoints, stride] of [channels in / run_of, kBlock, run_of]
    BufferOf<bool> ready;       // [blocks of tiles]: inputs are there
    Buffer products;            // [kPoints, stride] of [kBlock, channels out]
    BufferOf<Element> rows;     // three rows of a plane, for a direct convolution
    ReadAhead ahead;

    // For convolutions of `images` images from any of `planes` to as many channels or fewer.
    Scratch(const std::vector<Plane>& planes, int images) {
        std::size_t max_weights = 0, max_inputs = 0, max_products = 0, max_rows = 0, max_blocks = 0;
        const auto raise = [](std::size_t& most, std::size_t size) { most = most < size ? size : most; };
        for (const Plane& plane : planes) {
            const int channels = plane.channels, most = max_columns<Operand>(channels) * kWidth;
            const bool at_once = channels <= most;
            // Where a pass has all kernels, there is a second one only if there are fewer blocks than threads.
            const int blocks = (images * plane.tiles() + kBlock - 1) / kBlock,
                      kept = at_once && blocks > SharedWork::kMaxUnits ? SharedWork::kMaxUnits : blocks;
            raise(max_weights, (at_once ? channels : most) / kWidth * weights_stride<Operand>(channels));
            raise(max_inputs, kept * inputs_stride<Operand>(channels));
            raise(max_blocks, blocks);
            raise(max_products, kPoints * padded_stride<float>(kBlock * channels));
            raise(max_rows, 3 * plane.row());
        }
        weights = BufferOf<Element>(max_weights);
        inputs = BufferOf<Element>(max_inputs);
        ready = BufferOf<bool>(max_blocks);
        products = Buffer(max_products);
        rows = BufferOf<Element>(max_rows);
    }
};

// 3x3, stride 1, padding 1. The kernels are kept as they are and transformed anew in every pass: they come from memory
// with a quarter of the bytes, and the arithmetic costs less than the bytes would.
template <typename Operand>
class Winograd {
    using Element = typename Operand::Element;
    static constexpr int kBlock = kTileBlock<Operand>;
    static constexpr bool kPairsPoints = 2 * kBlock <= kAccumulators;  // there are registers for two points of a block

public:
    Winograd(const ConvolutionWeights& layer, int in_channels)
        : in_(in_channels), out_(padded(layer.out)), kernels_(static_cast<std::size_t>(kTaps) * in_ * out_),
          bias_(out_) {
        for (int o = 0; o < layer.out; ++o) {
            bias_.get()[o] = layer.bias[o];
            for (int c = 0; c < layer.in; ++c)
                for (int tap = 0; tap < kTaps; ++tap)
                    kernels_
                        .get()[((static_cast<std::size_t>(o / kWidth) * in_ + c) * kTaps + tap) * kWidth + o % kWidth] =
                        Operand::rounded(layer.weight[(static_cast<std::size_t>(o) * layer.in + c) * kTaps + tap]);
        }
    }

    // outputs = relu(convolution(inputs) + bias [+ outputs]); tile_sums, where given, gets the sum of each tile's
    // outputs. The group shares blocks of tiles, and channels where there are too few of them.
    void run(const Plane& in, const float* const* inputs /* [images] of `in` */, float* const* outputs /* [images] */,
             bool add_outputs, float* const* tile_sums /* [images] of [tiles, out], or null */, int images,
             const ThreadGroup& group, Scratch<Operand>& scratch) const {
        if (images == 0) return;
        const Plane out{in.height, in.width, out_};
        const int per_image = in.tiles(), tiles = images * per_image, blocks = (tiles + kBlock - 1) / kBlock;
        const bool in_registers = transforms_in_registers<Operand>(tiles);
        const int columns = out_ / kWidth, most = in_registers ? 1 : max_columns<Operand>(in_);
        // Columns of a pass, whose kernels are transformed together: fewer where there are more threads than blocks.
        const int threads = group.size() < SharedWork::kMaxUnits ? group.size() : SharedWork::kMaxUnits;
        const int each = (columns * blocks + threads - 1) / threads;
        const int width = blocks < threads && each < most ? each : most;
        const int passes = (columns + width - 1) / width;
        // A point's products take the place of its inputs where one register block has read them all: that leaves more
        // of the first cache.
        const bool in_place = passes == 1 && in_ == out_ && columns * kBlock <= kAccumulators;
        int pass = -1;  // whose kernels this thread has transformed
        std::memset(scratch.ready.get(), 0, blocks);
        group.share(passes * blocks, [&](int begin, int end) {
            for (int unit = begin; unit < end; ++unit) {
                const int block = unit % blocks, first = unit / blocks * width, first_tile = block * kBlock;
                const Columns some{first, first + width < columns ? first + width : columns};
                const int count = tiles - first_tile < kBlock ? tiles - first_tile : kBlock;
                if (pass != unit / blocks && !in_registers) transform_kernels(some, scratch);
                pass = unit / blocks;
                Element* transformed = scratch.inputs.get();
                if (passes > 1) transformed += block * inputs_stride<Operand>(in_);
                if (passes == 1 || !scratch.ready.get()[block])
                    for (int t = 0; t < count; ++t) {
                        const int image = (first_tile + t) / per_image, tile = (first_tile + t) % per_image;
                        transform_input(in, inputs[image], tile, t, transformed);
                    }
                scratch.ready.get()[block] = true;
                float* products = in_place ? reinterpret_cast<float*>(transformed) : scratch.products.get();
                if (in_registers)
                    transform_and_multiply(some, transformed, products, scratch.ahead);
                else if (kPairsPoints && some.end - some.begin == 1)
                    multiply_column(count, first, transformed, products, scratch);
                else
                    multiply(count, some, transformed, products, scratch);
                for (int t = 0; t < count; ++t) {
                    const int image = (first_tile + t) / per_image, tile = (first_tile + t) % per_image;
                    for (int column = some.begin; column < some.end; ++column)
                        transform_output(out, outputs[image], tile, t, column, add_outputs,
                                         tile_sums ? tile_sums[image] : nullptr, products);
                }
            }
        });
    }

    // Says that this convolution may be the next of so many images from `in`: its kernels, or the thread's share of
    // them, are read ahead. Not in bfloat16, where that was measured to bring nothing.
    void announce(const Plane& in, int images, const ThreadGroup& group, Scratch<Operand>& scratch) const {
        if constexpr (std::is_same_v<Operand, Float32>) {
            const int blocks = (images * in.tiles() + kBlock - 1) / kBlock;
            const bool divided = blocks < group.size() && out_ / kWidth % group.size() == 0;
            const std::size_t share = static_cast<std::size_t>(kTaps) * in_ * out_ / (divided ? group.size() : 1);
            scratch.ahead.begin(kernels_.get() + (divided ? group.rank() * share : 0), share * sizeof(Element));
        }
    }

    int out_channels() const { return out_; }

private:
    static constexpr int kTaps = 9;

    // The denominators of G's rows, left out there: they and a power of kA wait until the outputs are finished.
    static constexpr float kZero = kA2 * kB2, kInner = 2 * kA2 * (kA2 - kB2), kOuter = 2 * kB2 * (kB2 - kA2);
    static constexpr float kFactors[kTile] = {1 / kZero, kA / kInner, kA2 / kInner, 1};

    // One dimension of G g but for its denominators: three values to six.
    static inline void transform_three(Vector g0, Vector g1, Vector g2, Vector (&to)[kPatch]) {
        const Vector a = broadcast(kA), b = broadcast(kB);
        const Vector p = fused(broadcast(kA2), g2, g0), r = fused(broadcast(kB2), g2, g0);
        to[0] = g0;
        to[1] = fused(a, g1, p);
        to[2] = fused(-a, g1, p);
        to[3] = fused(b, g1, r);
        to[4] = fused(-b, g1, r);
        to[5] = g2;
    }

    // The four steps are never inlined: where they are called must not change how they round. They keep members in
    // variables: for all the compiler knows, storing a vector could change a member. Distances are as wide as pointers:
    // Python's own compiler flags let an int wrap around.

    __attribute__((noinline)) void transform_kernels(const Columns& columns, Scratch<Operand>& scratch) const {
        constexpr int kPack = Operand::kPack, kKernel = kTaps * kWidth;
        const int in = in_;
        const std::ptrdiff_t step = padded_stride<Element>(in * kWidth);
        const Element* kernel = kernels_.get() + static_cast<std::size_t>(columns.begin) * in * kKernel;
        for (int column = columns.begin; column < columns.end; ++column) {
            Element* to = scratch.weights.get() + (column - columns.begin) * weights_stride<Operand>(in);
            for (int c = 0; c < in; c += kPack, kernel += kPack * kKernel, to += kPack * kWidth) {
                Vector half[kPack][3][kPatch];  // rows along the kernel's columns
                for (int i = 0; i < kPack; ++i)
                    for (int x = 0; x < 3; ++x) {
                        const Element* top = kernel + i * kKernel + x * kWidth;
                        transform_three(Operand::widen(top), Operand::widen(top + 3 * kWidth),
                                        Operand::widen(top + 6 * kWidth), half[i][x]);
                    }
                for (int row = 0; row < kPatch; ++row) {
                    Vector whole[kPack][kPatch];
                    for (int i = 0; i < kPack; ++i)
                        transform_three(half[i][0][row], half[i][1][row], half[i][2][row], whole[i]);
                    for (int j = 0; j < kPatch; ++j) {
                        Vector weights[kPack];
                        for (int i = 0; i < kPack; ++i) weights[i] = whole[i][j];
                        Operand::pack(to + (row * kPatch + j) * step, weights);
                    }
                }
            }
        }
    }

    // One dimension of B^T d: six values to six, of which outer() gives rows 0, 1, 2 and 5, inner() 3 and 4.
    struct Six {
        Vector d0, d1, d2, d3, d4, d5;

        Six(const float* d, std::ptrdiff_t step)
            : d0(load(d)), d1(load(d + step)), d2(load(d + 2 * step)), d3(load(d + 3 * step)), d4(load(d + 4 * step)),
              d5(load(d + 5 * step)) {}
        Six(const Vector (&d)[kPatch]) : d0(d[0]), d1(d[1]), d2(d[2]), d3(d[3]), d4(d[4]), d5(d[5]) {}

        void outer(Vector& row0, Vector& row1, Vector& row2, Vector& row5) const {
            const Vector p = d4 - kB2 * d2, q = d3 - kB2 * d1;
            row0 = d4 - (kA2 + kB2) * d2 + (kA2 * kB2) * d0;
            row1 = p + kA * q;
            row2 = p - kA * q;
            row5 = d5 - (kA2 + kB2) * d3 + (kA2 * kB2) * d1;
        }
        void inner(Vector& row3, Vector& row4) const {
            const Vector r = d4 - kA2 * d2, s = d3 - kA2 * d1;
            row3 = r + kB * s;
            row4 = r - kB * s;
        }
    };

    __attribute__((noinline)) void transform_input(const Plane& plane, const float* image, int tile, int place,
                                                   Element* to) const {
        const int y = tile / plane.tiles_across() * kTile, x = tile % plane.tiles_across() * kTile;
        const std::ptrdiff_t in = in_, row_step = plane.row(), step = inputs_step<Operand>(in_);
        const float* corner = image + plane.at(y - 1, x - 1);
        const int run = run_of<Operand>(in_), next = run == in ? kWidth : kBlock * kWidth;
        to += place * run;
        for (int c = 0; c < in; c += kWidth, corner += kWidth, to += next) {
            const auto finish = [&](int row, const Vector(&half)[kPatch]) __attribute__((always_inline)) {
                Vector result[kPatch];
                const Six six(half);
                six.outer(result[0], result[1], result[2], result[5]);
                six.inner(result[3], result[4]);
                Element* point = to + row * kPatch * step;
                for (int j = 0; j < kPatch; ++j, point += step) Operand::narrow(point, result[j]);
            };
            // Columns first, in two passes over the patch: all six rows at once do not fit the registers.
            Vector row0[kPatch], row1[kPatch], row2[kPatch], row5[kPatch];
            for (int j = 0; j < kPatch; ++j) Six(corner + j * in, row_step).outer(row0[j], row1[j], row2[j], row5[j]);
            finish(0, row0);
            finish(1, row1);
            finish(2, row2);
            finish(5, row5);
            Vector row3[kPatch], row4[kPatch];
            for (int j = 0; j < kPatch; ++j) Six(corner + j * in, row_step).inner(row3[j], row4[j]);
            finish(3, row3);
            finish(4, row4);
        }
    }

    __attribute__((noinline)) void multiply(int count, const Columns& columns, const Element* inputs, float* products,
                                            Scratch<Operand>& scratch) const {
        constexpr int kPacked = kWidth * Operand::kPack;
        const int in = in_;
        const std::ptrdiff_t out = out_, next = weights_stride<Operand>(in),
                             weight_step = padded_stride<Element>(in * kWidth);
        const std::ptrdiff_t x_step = inputs_step<Operand>(in), step = padded_stride<float>(kBlock * out_);
        const Element* weights = scratch.weights.get();
        products += columns.begin * kWidth;
#ifdef __AMX_BF16__
        if constexpr (std::is_same_v<Operand, AmxBFloat16>) {
            const Tiles tiles(in);
            for (int point = 0; point < kPoints; ++point)
                for (int column = 0; column < columns.end - columns.begin; ++column)
                    tiles.multiply(inputs + point * x_step, in, weights + column * next + point * weight_step, kPacked,
                                   in, products + point * step + column * kWidth, out);
            return;
        }
#endif
        for (int point = 0; point < kPoints; ++point) {
            scratch.ahead.next_part();
            const Element *const x = inputs + point * x_step, *const weight = weights + point * weight_step;
            float* const to = products + point * step;
            for_blocks(count, 0, columns.end - columns.begin, [=](auto t, auto k, int row, int column) {
                constexpr int T = decltype(t)::value, K = decltype(k)::value;
                Vector sums[T][K] = {};
                for (std::ptrdiff_t c = 0; c < in; c += kWidth)
                    accumulate<Operand, T, K>(sums, x + c * kBlock + row * kWidth, kWidth,
                                              weight + c * kWidth + column * next, kWidth, kPacked, next);
#pragma GCC unroll 16
                for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < K; ++j) store(to + (row + i) * out + (column + j) * kWidth, sums[i][j]);
            });
        }
    }

    // The same for one column, two points at a time: the sums of one alone would wait for each other.
    __attribute__((noinline)) void multiply_column(int count, int column, const Element* inputs, float* products,
                                                   Scratch<Operand>& scratch) const {
        constexpr int kPack = Operand::kPack;
        const std::ptrdiff_t in = in_, out = out_, weight_step = padded_stride<Element>(in_ * kWidth),
                             x_step = inputs_step<Operand>(in_), step = padded_stride<float>(kBlock * out_);
        for (int point = 0; point < kPoints; point += 2) {
            scratch.ahead.next_part();
            scratch.ahead.next_part();
            const Element* const x = inputs + point * x_step;
            const Element* const weight = scratch.weights.get() + point * weight_step;
            float* const to = products + column * kWidth + point * step;
            with_rows<2, kPixels>(count, [=](auto t, auto) {
                constexpr int T = decltype(t)::value;
                Vector sums[2][T] = {};
                const Element *x0 = x, *x1 = x + x_step, *weight0 = weight, *weight1 = weight + weight_step;
                for (std::ptrdiff_t c = 0; c < in; c += kWidth) {
#pragma GCC unroll 1
                    for (int i = 0; i < kWidth; i += kPack) {
                        const typename Operand::Pack w0 = Operand::load_pack(weight0), w1 = Operand::load_pack(weight1);
#pragma GCC unroll 8
                        for (int place = 0; place < T; ++place) {
                            const auto add = [=](const Element* value, typename Operand::Pack w, Vector& sum) {
                                sum = Operand::multiply_add(Operand::broadcast_pack(value + place * kWidth), w, sum);
                            };
                            add(x0, w0, sums[0][place]);
                            add(x1, w1, sums[1][place]);
                        }
                        x0 += kPack, x1 += kPack, weight0 += kPack * kWidth, weight1 += kPack * kWidth;
                    }
                    x0 += (kBlock - 1) * kWidth, x1 += (kBlock - 1) * kWidth;  // the other tiles' channels
                }
#pragma GCC unroll 8
                for (int place = 0; place < T; ++place) {
                    store(to + place * out, sums[0][place]);
                    store(to + step + place * out, sums[1][place]);
                }
            });
        }
    }

    // The same for kFewTiles, with kernels as they are: what a row of points needs of them is transformed in registers,
    // rounded as transform_kernels() does. Written to memory and read again, they would take as long as the products.
    __attribute__((noinline)) void transform_and_multiply(const Columns& columns, const Element* inputs,
                                                          float* products, ReadAhead& ahead) const {
        if constexpr (transforms_in_registers<Operand>(kFewTiles)) {
            const std::ptrdiff_t x_step = padded_stride<float>(kBlock * in_),
                                 step = padded_stride<float>(kBlock * out_);
            for (int column = columns.begin; column < columns.end; ++column) {
                const float* kernel = kernels_.get() + static_cast<std::size_t>(column) * in_ * kTaps * kWidth;
                float* to = products + column * kWidth;
                for (int row = 0; row < kPatch; ++row, to += kPatch * step) {
                    for (int part = 0; part < kPatch / 2; ++part) ahead.next_part();
                    const float* x = inputs + row * kPatch * x_step;
                    if (row == 0 || row == kPatch - 1) {
                        const float* from = row == 0 ? kernel : kernel + 6 * kWidth;
                        multiply_row([](const float* g) { return load(g); }, from, x, to);
                    } else {
                        const Vector square = broadcast(row < 3 ? kA2 : kB2),
                                     at = broadcast((row < 3 ? kA : kB) * (row % 2 == 1 ? 1 : -1));
                        multiply_row(
                            [=](const float* g) {
                                return fused(at, load(g + 3 * kWidth), fused(square, load(g + 6 * kWidth), load(g)));
                            },
                            kernel, x, to);
                    }
                }
            }
        }
    }

    // A row of points for kFewTiles, from of_row(values of a kernel's column): that column of the row's
    // half-transformed kernel.
    template <typename OfRow>
    inline __attribute__((always_inline)) void multiply_row(const OfRow& of_row, const float* kernel, const float* x,
                                                            float* to) const {
        const std::ptrdiff_t in = in_, out = out_, x_step = padded_stride<float>(kBlock * in_),
                             step = padded_stride<float>(kBlock * out_);
        Vector sums[kPatch][kFewTiles] = {};
        const float* x_of[kPatch];  // one pointer for all of them would need more registers than there are
        for (int point = 0; point < kPatch; ++point) x_of[point] = x + point * x_step;
        for (std::ptrdiff_t c = 0; c < in; c += kWidth) {
#pragma GCC unroll 1
            for (int i = 0; i < kWidth; ++i, kernel += kTaps * kWidth) {
                Vector weights[kPatch];
                transform_three(of_row(kernel), of_row(kernel + kWidth), of_row(kernel + 2 * kWidth), weights);
#pragma GCC unroll 6
                for (int point = 0; point < kPatch; ++point) {
#pragma GCC unroll 4
                    for (int place = 0; place < kFewTiles; ++place)
                        sums[point][place] = Operand::multiply_add(broadcast(x_of[point][place * kWidth]),
                                                                   weights[point], sums[point][place]);
                    ++x_of[point];
                }
            }
#pragma GCC unroll 6
            for (int point = 0; point < kPatch; ++point) x_of[point] += (kBlock - 1) * kWidth;  // other tiles' channels
        }
#pragma GCC unroll 6
        for (int point = 0; point < kPatch; ++point)
#pragma GCC unroll 4
            for (int place = 0; place < kFewTiles; ++place) store(to + point * step + place * out, sums[point][place]);
    }

    // One dimension of A^T m but for kFactors: six values to four.
    static inline void transform_four(const Vector* m, int step, Vector* to, int to_step) {
        const Vector a = m[step] + m[2 * step], b = m[step] - m[2 * step];
        const Vector c = m[3 * step] + m[4 * step], d = m[3 * step] - m[4 * step];
        to[0] = m[0] + (kZero / kInner) * a + (kZero / kOuter) * c;
        to[to_step] = b - (kA / kB) * d;
        to[2 * to_step] = a - c;
        to[3 * to_step] = m[5 * step] + (kA * kA2 / kInner) * b + (kB * kB2 / kOuter) * d;
    }

    __attribute__((noinline)) void transform_output(const Plane& plane, float* image, int tile, int place, int column,
                                                    bool add_outputs, float* tile_sums, const float* products) const {
        const int y = tile / plane.tiles_across() * kTile, x = tile % plane.tiles_across() * kTile;
        const std::ptrdiff_t out = out_, row_step = plane.row(), step = padded_stride<float>(kBlock * out_);
        const float* from = products + place * out + column * kWidth;
        Vector half[kTile * kPatch], result[kTile * kTile];
        for (int j = 0; j < kPatch; ++j, from += step) {
            Vector m[kPatch];
            for (int i = 0; i < kPatch; ++i) m[i] = load(from + i * kPatch * step);
            transform_four(m, 1, half + j, kPatch);
        }
        for (int i = 0; i < kTile; ++i) transform_four(half + i * kPatch, 1, result + i * kTile, 1);
        const Vector bias = load(bias_.get() + column * kWidth);
        float* corner = image + plane.at(y, x) + column * kWidth;
        Vector sum = {};
        const auto finish = [&](int rows, int pixels) __attribute__((always_inline)) {
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < pixels; ++j) {
                    float* to = corner + i * row_step + j * out;
                    Vector value = (kFactors[i] * kFactors[j]) * result[i * kTile + j] + bias;
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
        if (tile_sums) store(tile_sums + tile * out + column * kWidth, sum);
    }

    int in_, out_;               // channels as they lie in memory
    BufferOf<Element> kernels_;  // [columns, in, kTaps, kWidth]
    Buffer bias_;                // [out]
};

// Any kernel of 1x1 or 3x3 with any stride.
template <typename Operand>
class Direct {
    using Element = typename Operand::Element;

public:
    // in_channels: as they lie in memory; a multiple of Operand::kPack.
    Direct(const ConvolutionWeights& layer, int in_channels)
        : in_(in_channels), out_(padded(layer.out)), kernel_(layer.kernel), stride_(layer.stride),
          weight_(static_cast<std::size_t>(kernel_) * kernel_ * in_ * out_), bias_(out_) {
        constexpr int kPack = Operand::kPack;
        for (int o = 0; o < layer.out; ++o) {
            bias_.get()[o] = layer.bias[o];
            for (int c = 0; c < layer.in; ++c)
                for (int tap = 0; tap < kernel_ * kernel_; ++tap)
                    weight_.get()[(static_cast<std::size_t>(tap) * in_ + c / kPack * kPack) * out_ + o * kPack +
                                  c % kPack] =
                        Operand::rounded(
                            layer.weight[(static_cast<std::size_t>(o) * layer.in + c) * kernel_ * kernel_ + tap]);
        }
    }

    Plane out(const Plane& in) const { return {(in.height - 1) / stride_ + 1, (in.width - 1) / stride_ + 1, out_}; }

    // outputs = convolution(inputs) + bias, with ReLU or without. The group shares the rows of all images.
    void run(const Plane& in, const float* const* inputs /* [images] */, float* const* outputs /* [images] */,
             bool with_relu, int images, const ThreadGroup& group, Scratch<Operand>& scratch) const {
        const int height = out(in).height;
        group.share(images * height, [&](int begin, int end) {
            for (int row = begin; row < end; ++row)
                run_row(in, inputs[row / height], outputs[row / height], with_relu, row % height, scratch);
        });
    }

    // Row y of one image's output.
    void run_row(const Plane& in, const float* input, float* output, bool with_relu, int y,
                 Scratch<Operand>& scratch) const {
        const Plane to = out(in);
        const Element* corner =
            elements(input + in.at(y * stride_ - kernel_ / 2, -1), in, scratch.rows) + (1 - kernel_ / 2) * in_;
        for (int x = 0; x < to.width; x += kPixels) {
            const int count = to.width - x < kPixels ? to.width - x : kPixels;
            pixels(in, corner + x * stride_ * in_, output + to.at(y, x), count, with_relu);
        }
    }

private:
    // The kernel's rows of a plane as elements.
    const Element* elements(const float* from, const Plane& plane, BufferOf<Element>& rows) const {
        if constexpr (std::is_same_v<Element, float>) return from;
        const int size = kernel_ * plane.row();
        for (int i = 0; i < size; i += kWidth) Operand::narrow(rows.get() + i, load(from + i));
        return rows.get();
    }

    void pixels(const Plane& in, const Element* corner, float* to, int count, bool with_relu) const {
        for_blocks(count, 0, out_ / kWidth, [&](auto t, auto k, int pixel, int column) {
            constexpr int T = decltype(t)::value, K = decltype(k)::value;
            Vector sums[T][K];
            for (int i = 0; i < T; ++i)
                for (int j = 0; j < K; ++j) sums[i][j] = load(bias_.get() + (column + j) * kWidth);
            for (int i = 0; i < kernel_; ++i)  // a kernel row's pixels and channels lie in one run of memory
                accumulate<Operand, T, K>(sums, corner + i * in.row() + pixel * stride_ * in_, stride_ * in_,
                                          weight_.get() + static_cast<std::size_t>(i) * kernel_ * in_ * out_ +
                                              column * kWidth * Operand::kPack,
                                          kernel_ * in_, out_ * Operand::kPack, kWidth * Operand::kPack);
            for (int i = 0; i < T; ++i)
                for (int j = 0; j < K; ++j)
                    store(to + (pixel + i) * out_ + (column + j) * kWidth, with_relu ? relu(sums[i][j]) : sums[i][j]);
        });
    }

    int in_, out_, kernel_, stride_;
    BufferOf<Element> weight_;  // [kernel, kernel, in, out]
    Buffer bias_;               // [out]
};

}  // namespace
}  // namespace skipnet::cpu
