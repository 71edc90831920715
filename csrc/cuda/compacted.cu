#include "compacted.h"

#include <algorithm>

#include "../check.h"
#include "../gate.h"
#include "compaction.cuh"
#include "gate_step.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kPointwiseThreads = 256;
constexpr int kGroup = 8;  // channels that a thread of a pointwise kernel takes together

__device__ std::int64_t global_thread() {
    return static_cast<std::int64_t>(blockIdx.x) * kPointwiseThreads + threadIdx.x;
}

Grid pointwise_grid(std::int64_t threads) {
    return {static_cast<unsigned>((threads + kPointwiseThreads - 1) / kPointwiseThreads), kPointwiseThreads};
}

// What a call begins with: images [batch, in, pixels] to channels-last [batch, pixels, padded], zeros for the channels
// that there are not; and zeros where the gates need them.
template <typename Element>
__global__ void begin_kernel(const Element* x, int batch, const int* present, int in, int pixels, int padded,
                             Element* y, float* hidden, float* cell, int units, int* arrivals, int* partial_arrivals) {
    const std::int64_t place = global_thread(), images = images_of(present, batch);
    if (place == 0) *arrivals = 0;
    static_assert(kPartialTiles <= kPointwiseThreads, "the smallest grid reaches them all");
    if (place < kPartialTiles) partial_arrivals[place] = 0;
    if (place < images * units) hidden[place] = cell[place] = 0.0f;
    if (place >= images * pixels) return;
    const Element* from = x + place / pixels * in * pixels + place % pixels;
    for (int channel = 0; channel < padded; ++channel)
        y[place * padded + channel] = channel < in ? from[static_cast<std::int64_t>(channel) * pixels]
                                                   : from_float<Element>(0.0f);
}

// A window that slides over an activation.
struct Window {
    int side, stride, padding;

    int out(int size) const { return (size + 2 * padding - side) / stride + 1; }
};

struct Image {
    int height, width, channels;

    SKIPNET_HD std::int64_t pixels() const { return static_cast<std::int64_t>(height) * width; }
    SKIPNET_HD std::int64_t size() const { return pixels() * channels; }
};

// Max pool, channels-last; NaN wins. With a window of one pixel it only converts.
template <typename From, typename To>
__global__ void max_pool_kernel(const From* x, int batch, const int* present, Image from, Window window, Image to,
                                To* y) {
    const std::int64_t place = global_thread();
    const int groups = to.channels / kGroup;
    if (place >= images_of(present, batch) * to.pixels() * groups) return;
    const int channel = static_cast<int>(place % groups) * kGroup;
    const std::int64_t pixel = place / groups;
    const int top = static_cast<int>(pixel % to.pixels()) / to.width * window.stride - window.padding;
    const int left = static_cast<int>(pixel % to.width) * window.stride - window.padding;
    x += pixel / to.pixels() * from.size() + channel;
    float most[kGroup] = {};
    bool first = true;
    for (int row = max(top, 0); row < min(top + window.side, from.height); ++row)
        for (int column = max(left, 0); column < min(left + window.side, from.width); ++column) {
            const From* values = x + (static_cast<std::int64_t>(row) * from.width + column) * from.channels;
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                const float value = to_float(values[i]);
                if (first || value > most[i] || value != value) most[i] = value;
            }
            first = false;
        }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) y[place * kGroup + i] = from_float<To>(most[i]);
}

// pooled[batch, channels] = the sums [batch, tiles, channels] over an image's tiles, divided by its pixels. Zeros where
// there is no image: the classifier takes all places, as the pixels of one.
__global__ void finish_pool_kernel(PooledSums pooled, int batch, const int* present, int channels, float* features) {
    const std::int64_t place = global_thread(), image = place / channels;
    if (image >= batch) return;
    const float* sums = pooled.sums + image * pooled.tiles * channels + place % channels;
    float sum = 0.0f;
    if (image < images_of(present, batch))
        for (int tile = 0; tile < pooled.tiles; ++tile) sum += sums[static_cast<std::int64_t>(tile) * channels];
    features[place] = sum / static_cast<float>(pooled.pixels);
}

Image convolved(const Convolution& layer, const Image& image) {
    return {layer.out_side(image.height), layer.out_side(image.width), layer.out};
}

constexpr Window kStemWindow{3, 2, 1}, kGateWindow{2, 2, 0}, kNoWindow{1, 1, 0};

Image pooled(const Window& window, const Image& image) {
    return {window.out(image.height), window.out(image.width), image.channels};
}

// How much of each part of the workspace an image needs, in bytes.
struct Sizes {
    std::int64_t activation = 0, inner = 0, sums = 0, features = 0, partial = 0;

    void see_activation(std::int64_t bytes) { activation = std::max(activation, bytes); }
    void see_inner(std::int64_t bytes) { inner = std::max(inner, bytes); }
    void see_sums(const Convolution& layer, const Image& from) {
        sums = std::max<std::int64_t>(sums, 4ll * pooled_tiles(layer, from.height, from.width) * layer.out);
    }
    void see_partial(ElementType type, const Convolution& layer, const Image& from) {
        partial = std::max<std::int64_t>(partial, 4ll * partial_sums(type, layer, 1, from.height, from.width));
    }
};

Sizes sizes_of(const CompactedNetwork& network) {
    const int bytes = element_bytes(network.element);
    Sizes sizes;
    Image x{network.height, network.width, network.stem.in};
    sizes.see_inner(x.size() * bytes);
    sizes.see_partial(network.element, network.stem, x);
    x = convolved(network.stem, x);
    sizes.see_activation(x.size() * bytes);
    if (network.stem_pools) x = pooled(kStemWindow, x);
    for (std::size_t index = 0; index < network.blocks.size(); ++index) {
        const std::vector<Convolution>& layers = network.blocks[index].convolutions;
        for (const Convolution& layer : network.blocks[index].projection) sizes.see_partial(network.element, layer, x);
        for (std::size_t i = 0; i + 1 < layers.size(); ++i) {
            sizes.see_partial(network.element, layers[i], x);
            x = convolved(layers[i], x);
            sizes.see_inner(x.size() * bytes);
        }
        sizes.see_sums(layers.back(), x);
        sizes.see_partial(network.element, layers.back(), x);
        x = convolved(layers.back(), x);
        sizes.see_activation(x.size() * bytes);
        if (network.gates.empty()) continue;
        Image seen = network.gates_pool ? pooled(kGateWindow, x) : x;
        sizes.see_inner(seen.size() * 4);
        for (const Convolution& layer : network.gates[index].convolutions) {
            sizes.see_sums(layer, seen);
            sizes.see_partial(ElementType::float32, layer, seen);
            seen = convolved(layer, seen);
            sizes.see_inner(seen.size() * 4);
        }
    }
    sizes.features = 4ll * x.channels;
    sizes.see_partial(ElementType::float32, network.head, {1, 1, x.channels});
    return sizes;
}

// Hands out pieces of the workspace; without one it only counts.
class Pieces {
public:
    explicit Pieces(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

    template <typename T>
    T* take(std::int64_t bytes) {
        T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
        used_ += (static_cast<std::size_t>(bytes) + 255) / 256 * 256;
        return piece;
    }
    std::size_t used() const { return used_; }

private:
    unsigned char* memory_;
    std::size_t used_ = 0;
};

// The workspace of a batch.
struct Workspace {
    void *x, *next;                // activations: the current one, and the next group's
    void *inner, *other;           // inside of a block or a gate
    float *sums, *gate_sums;       // pooled sums of x, of a feed-forward gate's last convolution
    float* features;               // [batch, channels]
    RowList list;
    int* arrivals;
    PartialSums partial;           // of whichever convolution runs

    Workspace(const CompactedNetwork& network, int batch, Pieces& pieces) {
        const Sizes sizes = sizes_of(network);
        x = pieces.take<void>(batch * sizes.activation);
        next = pieces.take<void>(batch * sizes.activation);
        inner = pieces.take<void>(batch * sizes.inner);
        other = pieces.take<void>(batch * sizes.inner);
        sums = pieces.take<float>(batch * sizes.sums);
        gate_sums = pieces.take<float>(network.gates.empty() ? 0 : batch * sizes.sums);
        features = pieces.take<float>(batch * sizes.features);
        list.rows = pieces.take<int>(batch * 4ll);
        list.count = pieces.take<int>(4);
        arrivals = pieces.take<int>(4);
        partial.sums = pieces.take<float>(std::min<std::int64_t>(batch * sizes.partial, 4ll * kPartialSums));
        partial.arrivals = pieces.take<int>(4ll * kPartialTiles);
    }
};

template <typename Element>
class Walk {
public:
    Walk(const CompactedNetwork& network, const CompactedCall& call, Pieces pieces, Stream stream)
        : network_(network), call_(call), work_(network, call.batch, pieces), stream_(stream) {}

    void run() {
        stem();
        run_block(0, nullptr);
        const int blocks = static_cast<int>(network_.blocks.size());
        for (int index = 1; index < blocks; ++index) {
            if (call_.steps > 0) gate_step(index - 1);  // which compacts, too
            run_block(index, call_.steps > 0 ? &work_.list : nullptr);
        }
        if (call_.steps == blocks) gate_step(blocks - 1);
        head();
    }

private:
    void stem() {
        const Image images{network_.height, network_.width, network_.stem.in};
        const std::int64_t batch = call_.batch, units = network_.lstm.hidden;
        launch("begin", begin_kernel<Element>, pointwise_grid(batch * std::max(images.pixels(), units)), stream_,
               static_cast<const Element*>(call_.images), call_.batch, call_.present, network_.in,
               static_cast<int>(images.pixels()), images.channels, static_cast<Element*>(work_.inner), call_.hidden,
               call_.cell, static_cast<int>(units), work_.arrivals, work_.partial.arrivals);
        shape_ = convolved(network_.stem, images);
        void* y = network_.stem_pools ? work_.next : work_.x;
        convolve(network_.stem, images, {.relu = true, .x = work_.inner, .y = y});
        if (network_.stem_pools) shape_ = max_pool<Element, Element>(kStemWindow, shape_, y, work_.x);
    }

    void gate_step(int index) {
        const std::int64_t row = static_cast<std::int64_t>(index) * call_.batch;
        const bool decides = index < static_cast<int>(network_.blocks.size()) - 1;
        const Decision decision{call_.gate_logits + row, call_.probabilities + row, call_.executed + row,
                                call_.forced && decides ? call_.forced + row : nullptr};
        if (!network_.embeddings.empty())
            return cuda::gate_step(network_.embeddings[index], network_.lstm, call_.batch, call_.present, sums_,
                                   call_.hidden, call_.cell, decision, work_.list, work_.arrivals, stream_);
        const CompactedGate& gate = network_.gates[index];
        Image seen = max_pool<Element, float>(network_.gates_pool ? kGateWindow : kNoWindow, shape_, work_.x, work_.inner);
        PooledSums sums{};
        void *from = work_.inner, *to = work_.other;
        for (const Convolution& layer : gate.convolutions) {
            sums = convolve(layer, seen, {.relu = true, .x = from, .y = to, .sums = work_.gate_sums}, ElementType::float32);
            seen = convolved(layer, seen);
            std::swap(from, to);
        }
        cuda::gate_step(gate.tail, call_.batch, call_.present, sums, decision, work_.list, work_.arrivals, stream_);
    }

    // For the images of the list, in place; without one for all that are present. Where the block projects, the others
    // take its shortcut.
    void run_block(int index, const RowList* list) {
        const CompactedBlock& block = network_.blocks[index];
        void *from = work_.x, *to = work_.inner;
        Image shape = shape_;
        if (!block.projection.empty()) {
            convolve(block.projection[0], shape_, {.x = work_.x, .y = work_.next, .sums = work_.sums});
            std::swap(work_.x, work_.next);
        }
        const std::size_t last = block.convolutions.size() - 1;
        for (std::size_t i = 0; i < last; ++i) {
            convolve(block.convolutions[i], shape,
                     {.list = list, .gathers = i == 0, .relu = true, .x = from, .y = to});
            shape = convolved(block.convolutions[i], shape);
            from = to;
            to = to == work_.inner ? work_.other : work_.inner;
        }
        sums_ = convolve(block.convolutions[last], shape,
                         {.list = list, .scatters = true, .relu = true, .x = from, .residual = work_.x, .y = work_.x,
                          .sums = work_.sums});
        shape_ = convolved(block.convolutions[last], shape);
    }

    void head() {
        launch("finish_pool", finish_pool_kernel,
               pointwise_grid(static_cast<std::int64_t>(call_.batch) * shape_.channels), stream_, sums_, call_.batch,
               call_.present, shape_.channels, work_.features);
        // The batch is the pixels of one image: a matrix product.
        GatheredConv classify{};
        classify.batch = 1;
        classify.height = 1;
        classify.width = call_.batch;
        classify.x = work_.features;
        classify.y = call_.logits;
        classify.partial = work_.partial;
        classify.pixels_are_images = true;
        gathered_conv(ElementType::float32, network_.head, classify, stream_);
    }

    // What a convolution of the walk says beyond its layer.
    struct Asked {
        const RowList* list = nullptr;
        bool gathers = false, scatters = false, relu = false;
        const void *x = nullptr, *residual = nullptr;
        void* y = nullptr;
        float* sums = nullptr;
    };

    PooledSums convolve(const Convolution& layer, const Image& from, const Asked& asked, ElementType type) {
        const RowList present{nullptr, call_.present};
        const RowList* all = call_.present ? &present : nullptr;
        gathered_conv(type, layer,
                      {call_.batch, from.height, from.width, asked.list ? asked.list : all, asked.gathers,
                       asked.scatters, asked.relu, asked.x, asked.residual, asked.y, asked.sums, work_.partial, false},
                      stream_);
        return {asked.sums, pooled_tiles(layer, from.height, from.width),
                static_cast<int>(convolved(layer, from).pixels())};
    }
    PooledSums convolve(const Convolution& layer, const Image& from, const Asked& asked) {
        return convolve(layer, from, asked, network_.element);
    }

    template <typename From, typename To>
    Image max_pool(const Window& window, const Image& from, const void* x, void* y) {
        const Image to = pooled(window, from);
        launch("max_pool", max_pool_kernel<From, To>, pointwise_grid(call_.batch * to.size() / kGroup), stream_,
               static_cast<const From*>(x), call_.batch, call_.present, from, window, to, static_cast<To*>(y));
        return to;
    }

    const CompactedNetwork& network_;
    const CompactedCall& call_;
    Workspace work_;
    Stream stream_;
    Image shape_{};      // of x
    PooledSums sums_{};  // of x
};

}  // namespace

CompactedWeights lay_out(CompactedNetwork& network, const void* elements, const float* floats) {
    const auto* bytes = static_cast<const unsigned char*>(elements);
    CompactedWeights used{};
    const auto take = [&](std::size_t count) {
        const float* piece = floats + used.floats;
        used.floats += (count + 7) / 8 * 8;
        return piece;
    };
    const auto place = [&](Convolution& layer, bool in_floats) {
        const std::size_t size = static_cast<std::size_t>(layer.out) * layer.kernel * layer.kernel * layer.in;
        if (in_floats) {
            layer.weight = take(size);
        } else {
            layer.weight = bytes + used.elements * element_bytes(network.element);
            used.elements += size;
        }
        layer.bias = take(layer.out);
    };
    place(network.stem, false);
    for (CompactedBlock& block : network.blocks) {
        for (Convolution& layer : block.convolutions) place(layer, false);
        for (Convolution& layer : block.projection) place(layer, false);
    }
    place(network.head, true);
    for (Embedding& embedding : network.embeddings) {
        embedding.weight = take(static_cast<std::size_t>(network.lstm.embed) * embedding.channels);
        embedding.bias = take(network.lstm.embed);
    }
    if (!network.embeddings.empty()) {
        Lstm& lstm = network.lstm;
        lstm.input_weight = take(4 * lstm.hidden * lstm.embed);
        lstm.hidden_weight = take(4 * lstm.hidden * lstm.hidden);
        lstm.bias = take(4 * lstm.hidden);
        lstm.projection_weight = take(lstm.hidden);
    }
    for (CompactedGate& gate : network.gates) {
        for (Convolution& layer : gate.convolutions) place(layer, true);
        gate.tail.weight = take(gate.tail.channels);
    }
    return used;
}

std::size_t workspace_bytes(const CompactedNetwork& network, int batch) {
    Pieces pieces(nullptr);
    Workspace(network, batch, pieces);
    return pieces.used();
}

void run_compacted(const CompactedNetwork& network, const CompactedCall& call, Stream stream) {
    const int blocks = static_cast<int>(network.blocks.size());
    check(call.steps == 0 || call.steps == blocks - 1 || call.steps == blocks, "steps: expected ", blocks - 1, " or ",
          blocks, ", got ", call.steps);
    if (call.batch == 0) return;
    const Pieces pieces(call.workspace);
    switch (network.element) {
        case ElementType::float32:
        case ElementType::tf32: return Walk<float>(network, call, pieces, stream).run();
        case ElementType::float16: return Walk<Half>(network, call, pieces, stream).run();
        case ElementType::bfloat16: return Walk<Bfloat16>(network, call, pieces, stream).run();
    }
}

}  // namespace skipnet::cuda
