// Convolutions over channel-blocked planes as products of strips of pixels with panels of output channels, for one
// instruction set; see vector.h.
//
// A block of output pixels and channels stays in registers while the sum runs over all of its inputs, in one fixed
// order: the batch, the blocking and the threads decide only who computes a block, never how.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "../blocking.h"
#include "../engine.h"
#include "../thread_team.h"
#include "../vector.h"

namespace skipnet::cpu {
namespace {

constexpr int kPanel = 2;                       // vectors of output channels that a panel of weights is wide
constexpr int kStrip = kWidth == 16 ? 14 : 6;   // pixels of a strip, at most: their sums fill the registers
constexpr std::size_t kPassBytes = 512 * 1024;  // of panels that pass over the strips together; they stay in L2

// A map of an image in memory: [channels / kWidth, rows, pixels, kWidth]. Where convolutions of 3x3 read it, a border
// of zeros that nobody writes is around it: one pixel, and as much more below and to the right as makes the inside
// whole tiles. Without a border, where a row is whole strips: [rows, channels / kWidth, pixels, kWidth]. Then what a
// strip's outputs are made of lies together, and the processor foresees what is read next.
struct Plane {
    int height, width, channels;  // channels as they lie in memory
    int border;                   // 0 or 1
    int tile;                     // 1 where nobody asks for tiles

    int tiles_down() const { return (height + tile - 1) / tile; }
    int tiles_across() const { return (width + tile - 1) / tile; }
    int blocks() const { return channels / kWidth; }
    int pixels() const { return height * width; }
    bool by_rows() const { return border == 0 && tile == 1 && width % kStrip == 0; }
    int all_rows() const { return tiles_down() * tile + 2 * border; }
    int run() const { return (tiles_across() * tile + 2 * border) * kWidth; }  // elements of a block's row
    int row() const { return by_rows() ? blocks() * run() : run(); }           // from a row to the next
    int block() const { return by_rows() ? run() : all_rows() * run(); }       // from a block to the next
    std::size_t size() const { return static_cast<std::size_t>(blocks()) * all_rows() * run(); }
    int at(int y, int x) const { return (y + border) * row() + (x + border) * kWidth; }  // -1 is the border

    bool operator==(const Plane& other) const {
        return height == other.height && width == other.width && channels == other.channels && border == other.border &&
               tile == other.tile;
    }
};

// Where a run of inputs begins, in elements from a strip's first.
struct Run {
    std::ptrdiff_t from;
};

constexpr int kLine = 64;  // bytes of a line of the cache

// Where a convolution's weights lie.
struct Bytes {
    const char* begin;
    std::size_t size;
};

// The weights that a thread will read, in a network's order. It asks for those of the next convolutions while it
// multiplies: the processor does not know of them, and at batch 1 they take longer to come than the products to
// compute.
class Ahead {
public:
    // layers: all convolutions' weights.
    void start(const std::vector<Bytes>& layers, const ThreadGroup& group) {
        layers_ = layers.data();
        pieces_ = kUnits * static_cast<int>(layers.size());
        rank_ = group.rank(), size_ = group.size();
        piece_ = limit_ = 0;
        next_ = end_ = nullptr;
    }

    // Convolution `layer` begins.
    void begin(int layer) {
        if (piece_ <= kUnits * layer) piece_ = kUnits * (layer + 1), next_ = end_;  // too late for this one
        limit_ = kUnits * (layer + 1 + kLayers) < pieces_ ? kUnits * (layer + 1 + kLayers) : pieces_;
    }

    // Sees to it that there is something to ask for.
    void refill() {
        if (next_ < end_ || piece_ >= limit_) return;
        const Bytes& layer = layers_[piece_ / kUnits];
        const int number = piece_ % kUnits, all = kUnits * size_;
        // In a thread's order of units (thread_team.h): odd ranks go down from where their share ends.
        const int unit = kUnits * rank_ + (rank_ % 2 == 0 ? number : kUnits - 1 - number);
        next_ = layer.begin + layer.size * unit / all;
        end_ = layer.begin + layer.size * (unit + 1) / all;
        ++piece_;
    }

    template <int Lines>
    inline __attribute__((always_inline)) void ask() {
        if (next_ >= end_) return;
#pragma GCC unroll 16
        for (int i = 0; i < Lines; ++i) __builtin_prefetch(next_ + i * kLine, 0, 2);
        next_ += Lines * kLine;
    }

private:
    static constexpr int kLayers = 2;  // ahead
    static constexpr int kUnits = 2;   // of each thread, as it shares work

    const Bytes* layers_ = nullptr;
    int pieces_ = 0, rank_ = 0, size_ = 1;         // kUnits of each layer for each thread
    int piece_ = 0, limit_ = 0;                    // the next one, and the first that is too early
    const char *next_ = nullptr, *end_ = nullptr;  // of the one that is being asked for
};

// sums[t][k] += sum over runs r and i < Depth of x[runs[r].from + t * Step + i] * weight[r, i, k], in this order.
template <typename Operand, int Step, int Depth, int T, int K>
inline __attribute__((always_inline)) void multiply(
    Vector (&sums)[T][K], const typename Operand::Element* x, const Run* runs, int count,
    const typename Operand::Element* weight /* [count, Depth / kPack, K * kWidth, kPack] */, Ahead& ahead) {
    constexpr int kPack = Operand::kPack;
    static_assert(Depth % kPack == 0, "a run is whole packs");
    for (int r = 0; r < count; ++r) {
        const typename Operand::Element* from = x + runs[r].from;
        if constexpr (Depth == kWidth) {  // runs are far apart, in no order that the processor foresees
            constexpr int kApart = Step * sizeof(*x) < kLine ? kLine / (Step * sizeof(*x)) : 1;
            const typename Operand::Element* later = x + runs[r + 2 < count ? r + 2 : r].from;
#pragma GCC unroll 16
            for (int t = 0; t < T; t += kApart) __builtin_prefetch(later + t * Step);
            ahead.ask<T>();
        }
#pragma GCC unroll 1
        for (int i = 0; i < Depth; i += kPack, weight += K * kWidth * kPack) {
            typename Operand::Pack w[K];
            for (int k = 0; k < K; ++k) w[k] = Operand::load_pack(weight + k * kWidth * kPack);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                const typename Operand::Pack value = Operand::broadcast_pack(from + t * Step + i);
                for (int k = 0; k < K; ++k) sums[t][k] = Operand::multiply_add(value, w[k], sums[t][k]);
            }
        }
    }
}

// Calls function(Number<T>, Number<K>) for a strip of `pixels` and a panel of `columns` vectors.
template <typename Function>
inline void with_block(int pixels, int columns, const Function& function) {
    if (columns == kPanel)
        with_rows<kPanel, kStrip>(pixels, function);
    else
        with_rows<1, kStrip>(pixels, function);
}

// Output channels in panels: all are kPanel vectors wide but, where their number is odd, the last.
struct Panels {
    int columns;  // vectors of output channels

    int count() const { return (columns + kPanel - 1) / kPanel; }
    int width(int panel) const { return panel * kPanel + kPanel <= columns ? kPanel : columns - panel * kPanel; }
    // Where the weight of input `i` of `depth` and of an output channel lies; `pack` inputs lie side by side.
    std::size_t at(int channel, std::size_t i, std::size_t depth, int pack) const {
        const int panel = channel / (kPanel * kWidth), lane = channel % (kPanel * kWidth);
        return begin(panel, depth) + (i / pack * width(panel) * kWidth + lane) * pack + i % pack;
    }
    std::size_t begin(int panel, std::size_t depth) const { return panel * depth * kPanel * kWidth; }
};

// Images that go through a convolution together. In, Out: operands (vector.h) whose elements the planes hold.
template <typename In, typename Out>
struct LayerImages {
    const typename In::Element* const* inputs;
    typename Out::Element* const* outputs;
    float* const* sums;  // [parts, channels] each: sums over parts of the output; null where nobody asks
    int count;
};

enum class Finish { none, relu, add_relu };  // what follows the bias; add: to what the output holds

template <typename Out>
inline __attribute__((always_inline)) Vector finished(Vector value, const typename Out::Element* output,
                                                      Finish finish) {
    if (finish == Finish::add_relu) value += Out::widen(output);
    return finish == Finish::none ? value : relu(value);
}

// What the threads of a group work in.
template <typename In>
struct Memory {
    typename In::Element* shared;  // [largest shared()] of all layers
    float* own;                    // [largest own()] of all layers, this thread's
    Run* runs;                     // [largest number of channel blocks], this thread's
    Ahead* ahead;                  // this thread's
};

// A convolution between two planes.
template <typename In, typename Out>
class Layer {
public:
    virtual ~Layer() = default;
    // The group shares the work; when this returns, all of it is done.
    virtual void run(const LayerImages<In, Out>& images, Finish finish, const ThreadGroup& group,
                     const Memory<In>& memory) const = 0;
    virtual int parts() const = 0;  // that sums are taken over
    virtual std::size_t shared() const { return 0; }
    virtual std::size_t own() const { return 0; }
    virtual Bytes weights() const = 0;
};

// Strips of output pixels, one after another through an image.
struct Strips {
    int rows, width;  // of output pixels

    int across() const { return (width + kStrip - 1) / kStrip; }
    int count() const { return rows * across(); }
    int begin(int i) const { return width * i / across(); }
};

// A convolution whose inputs lie in runs of Depth, Step apart from one output pixel to the next.
template <typename In, typename Out, int Step, int Depth>
class Direct final : public Layer<In, Out> {
    using Element = typename In::Element;

public:
    // first: where an output pixel's inputs begin, as row * first_row + column * Step.
    Direct(Strips strips, int first_row, std::vector<Run> runs, const Plane& out, BufferOf<Element> weight, Buffer bias)
        : strips_(strips), first_row_(first_row), out_(out), panels_{out.blocks()}, runs_(std::move(runs)),
          weight_(std::move(weight)), bias_(std::move(bias)) {
        for (int y = 0; y < out.height; ++y)
            for (int x = 0; x < out.width; ++x) places_.push_back({out.at(y, x)});
        const std::size_t bytes = panels_.begin(1, depth()) * sizeof(Element);
        const int most = bytes < kPassBytes ? static_cast<int>(kPassBytes / bytes) : 1;
        const int passes = (panels_.count() + most - 1) / most;
        panels_per_pass_ = (panels_.count() + passes - 1) / passes;  // about as much work in each
    }

    void run(const LayerImages<In, Out>& images, Finish finish, const ThreadGroup& group,
             const Memory<In>& memory) const override {
        const int spots = images.count * strips_.count(),
                  passes = (panels_.count() + panels_per_pass_ - 1) / panels_per_pass_;
        group.share(passes * spots, [&](int begin, int end) {
            for (int unit = begin; unit < end; ++unit) {
                const int first = unit / spots * panels_per_pass_, spot = unit % spots;
                const int last =
                    first + panels_per_pass_ < panels_.count() ? first + panels_per_pass_ : panels_.count();
                for (int panel = first; panel < last; ++panel)
                    strip(images, spot / strips_.count(), spot % strips_.count(), panel, finish, *memory.ahead);
            }
        });
    }

    // `count` rows of an output, from its row `to` on, of the input's outputs from row `from` on: by this thread alone.
    void rows(const Element* input, int from, typename Out::Element* output, int to, int count, Finish finish,
              Ahead& ahead) const {
        const int across = strips_.across();
        for (int i = 0; i < count * across; ++i)
            for (int panel = 0; panel < panels_.count(); ++panel)
                strip(input, from * across + i, output, to * across + i, nullptr, panel, finish, ahead);
    }

    int parts() const override { return strips_.count(); }
    Bytes weights() const override {
        return {reinterpret_cast<const char*>(weight_.get()), depth() * out_.channels * sizeof(Element)};
    }

private:
    std::size_t depth() const { return runs_.size() * Depth; }

    void strip(const LayerImages<In, Out>& images, int image, int number, int panel, Finish finish,
               Ahead& ahead) const {
        strip(images.inputs[image], number, images.outputs[image], number,
              images.sums ? images.sums[image] + number * out_.channels : nullptr, panel, finish, ahead);
    }

    // From strip number `from` of an input to number `number` of an output.
    void strip(const Element* input, int from, typename Out::Element* y, int number, float* sum, int panel,
               Finish finish, Ahead& ahead) const {
        const int across = strips_.across(), begin = strips_.begin(number % across);
        const int pixels = strips_.begin(number % across + 1) - begin;
        const Element* x = input + static_cast<std::ptrdiff_t>(from / across) * first_row_ + begin * Step;
        ahead.refill();
        const Run* places = places_.data() + number / across * strips_.width + begin;
        with_block(pixels, panels_.width(panel), [&](auto t, auto k) {
            constexpr int T = decltype(t)::value, K = decltype(k)::value;
            for (int j = 0; j < K; ++j)
#pragma GCC unroll 16
                for (int i = 0; i < T; ++i)  // for the end: where it is written to is in no near cache
                    __builtin_prefetch(
                        y + static_cast<std::ptrdiff_t>(panel * kPanel + j) * out_.block() + places[i].from, 1);
            Vector sums[T][K];
            for (int j = 0; j < K; ++j) {
                const Vector bias = load(bias_.get() + (panel * kPanel + j) * kWidth);
                for (int i = 0; i < T; ++i) sums[i][j] = bias;
            }
            multiply<In, Step, Depth, T, K>(sums, x, runs_.data(), static_cast<int>(runs_.size()),
                                            weight_.get() + panels_.begin(panel, depth()), ahead);
            for (int j = 0; j < K; ++j) {
                const int column = panel * kPanel + j;
                typename Out::Element* to = y + static_cast<std::ptrdiff_t>(column) * out_.block();
                Vector total = {};
#pragma GCC unroll 16
                for (int i = 0; i < T; ++i) {
                    const Vector value = finished<Out>(sums[i][j], to + places[i].from, finish);
                    Out::narrow(to + places[i].from, value);
                    total += value;
                }
                if (sum) store(sum + column * kWidth, total);
            }
        });
    }

    Strips strips_;
    int first_row_;
    Plane out_;
    Panels panels_;
    int panels_per_pass_;  // panels that pass over the strips together
    std::vector<Run> runs_;
    std::vector<Run> places_;   // of the output pixels
    BufferOf<Element> weight_;  // [panels, runs, Depth, panel's channels]
    Buffer bias_;               // [out channels]
};

inline Buffer packed_bias(const ConvolutionWeights& layer) {
    Buffer bias(padded(layer.out));
    for (int o = 0; o < layer.out; ++o) bias.get()[o] = layer.bias[o];
    return bias;
}

// Any convolution of stride 1 or 2 between planes, the input with a border where the kernel needs one.
template <typename In, typename Out>
std::unique_ptr<Layer<In, Out>> make_direct(const ConvolutionWeights& layer, const Plane& in, const Plane& out) {
    const int kernel = layer.kernel, taps = kernel * kernel;
    const Panels panels{out.blocks()};
    const std::size_t depth = static_cast<std::size_t>(in.blocks()) * taps * kWidth;
    BufferOf<typename In::Element> weight(depth * out.channels);
    std::vector<Run> runs;
    for (int block = 0; block < in.blocks(); ++block)
        for (int tap = 0; tap < taps; ++tap) {
            const int place = in.at(tap / kernel - kernel / 2, tap % kernel - kernel / 2);
            const std::size_t first = runs.size() * kWidth;
            runs.push_back({static_cast<std::ptrdiff_t>(block) * in.block() + place});
            for (int o = 0; o < layer.out; ++o)
                for (int lane = 0; lane < kWidth && block * kWidth + lane < layer.in; ++lane)
                    weight.get()[panels.at(o, first + lane, depth, In::kPack)] = In::rounded(
                        layer.weight[(static_cast<std::size_t>(o) * layer.in + block * kWidth + lane) * taps + tap]);
        }
    if (layer.stride == 2)
        return std::make_unique<Direct<In, Out, 2 * kWidth, kWidth>>(
            Strips{out.height, out.width}, 2 * in.row(), std::move(runs), out, std::move(weight), packed_bias(layer));
    // Where no row has an end that a strip would have to stop at, the plane is one long row.
    const bool flat = kernel == 1 && in.border == 0 && in.tile == 1 && !in.by_rows();
    return std::make_unique<Direct<In, Out, kWidth, kWidth>>(
        flat ? Strips{1, out.pixels()} : Strips{out.height, out.width}, in.row(), std::move(runs), out,
        std::move(weight), packed_bias(layer));
}

// What the first convolution reads: an image of few channels, with its border, as packs of Operand::kPack neighbouring
// pixels, [channels, rows, phases, columns, kPack]. A strip's packs of one tap are one apart.
template <typename Operand>
struct FirstPlane {
    using Element = typename Operand::Element;
    static constexpr int kPack = Operand::kPack;

    int height, width, channels;  // of the image
    int kernel, stride;           // of the convolution

    int rows() const { return height + 2 * (kernel / 2); }
    int taps() const { return (kernel + kPack - 1) / kPack; }  // packs of a row of the kernel
    int phases() const { return stride > kPack ? stride / kPack : 1; }
    int columns() const { return (width + stride - 1) / stride + (taps() - 1) * kPack / stride; }
    int row() const { return phases() * columns() * kPack; }  // elements
    std::size_t size() const { return static_cast<std::size_t>(channels) * rows() * row(); }

    // What tap number `tap` of the kernel's row y multiplies for the first output pixel.
    int at(int channel, int y, int tap) const {
        const int x = tap * kPack;
        return (channel * rows() + y) * row() + (x % stride / kPack * columns() + x / stride) * kPack;
    }

    // Writes row y of the image, pixel(x); the border is zeros that nobody writes.
    template <typename Pixel>
    void set_row(Element* image, int channel, int y, const Pixel& pixel) const {
        for (int phase = 0; phase < phases(); ++phase)
            for (int k = 0; k < kPack; ++k) {
                const int first = phase * kPack + k - kernel / 2;  // column 0's pixel
                const int begin = first < 0 ? (stride - 1 - first) / stride : 0;
                Element* to = image + (channel * rows() + y + kernel / 2) * row() + phase * columns() * kPack + k;
                for (int i = begin, x = begin * stride + first; i < columns() && x < width; ++i, x += stride)
                    to[i * kPack] = Operand::rounded(pixel(x));
            }
    }
};

template <typename Operand>
using First = Direct<Operand, Operand, Operand::kPack, Operand::kPack>;

template <typename Operand>
std::unique_ptr<First<Operand>> make_first(const ConvolutionWeights& layer, const FirstPlane<Operand>& in,
                                           const Plane& out) {
    constexpr int kPack = Operand::kPack;
    const int kernel = layer.kernel;
    const Panels panels{out.blocks()};
    const std::size_t depth = static_cast<std::size_t>(layer.in) * kernel * in.taps() * kPack;
    BufferOf<typename Operand::Element> weight(depth * out.channels);
    std::vector<Run> runs;
    for (int c = 0; c < layer.in; ++c)
        for (int y = 0; y < kernel; ++y)
            for (int x = 0; x < in.taps() * kPack; ++x) {
                if (x % kPack == 0) runs.push_back({in.at(c, y, x / kPack)});
                for (int o = 0; x < kernel && o < layer.out; ++o)
                    weight.get()[panels.at(o, (runs.size() - 1) * kPack + x % kPack, depth, kPack)] = Operand::rounded(
                        layer.weight[((static_cast<std::size_t>(o) * layer.in + c) * kernel + y) * kernel + x]);
            }
    return std::make_unique<First<Operand>>(Strips{out.height, out.width}, in.stride * in.row(), std::move(runs), out,
                                            std::move(weight), packed_bias(layer));
}

}  // namespace
}  // namespace skipnet::cpu
