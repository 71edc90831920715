// The compacted strategy: the kernels around the convolutions, the workspace, and the forward pass.
#include "compacted.h"

#include <algorithm>
#include <type_traits>

#include "../check.h"
#include "../gate.h"
#include "channels.cuh"
#include "compaction.cuh"
#include "divisor.cuh"
#include "gate_step.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kPointwiseThreads = 256;
constexpr int kPlacesPerThread = 2;  // where images are brought in: their loads overlap

__device__ std::int64_t global_thread() {
    return static_cast<std::int64_t>(blockIdx.x) * kPointwiseThreads + threadIdx.x;
}

Grid pointwise_grid(std::int64_t threads) {
    return {static_cast<unsigned>((threads + kPointwiseThreads - 1) / kPointwiseThreads), kPointwiseThreads};
}
// Of a kernel that follows another one of this file or of a convolution.
Grid dependent(Grid grid) {
    grid.dependent = true;
    return grid;
}
// With an image's threads along x. Images go along y, of which there is a limit; so a thread may take several.
Grid pointwise_grid(std::int64_t threads, int batch) {
    Grid grid = pointwise_grid(threads);
    grid.blocks.y = static_cast<unsigned>(std::min(batch, 65535));
    return grid;
}

// A call's images, and what the gates need zeros in.
struct Loaded {
    const void* images;     // [batch, in, height, width]
    void* y;                // [batch, places, padded]; a place is a pixel or a pair of them
    float *hidden, *cell;   // [batch, units]
    int* arrivals;          // [batch + 1]
    int* partial_arrivals;  // [kPartialTiles]
    int in, padded, pixels, width, places, units;
    Divisor columns;  // places in a row
};

// What a call begins with: images to channels-last, zeros for the channels that there are not; and zeros where the
// gates need them. In pairs of pixels each has four channels.
template <typename Element, bool kPairs>
__global__ void __launch_bounds__(kPointwiseThreads) load_images_kernel(Loaded loaded, int batch, const int* present) {
    let_next_grid();
    const int thread = threadIdx.x, first = blockIdx.x * kPointwiseThreads * kPlacesPerThread + thread;
    const int images = images_of(present, batch), places = loaded.places;
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        static_assert(kPartialTiles <= kPointwiseThreads, "a thread block reaches them all");
        if (thread == 0) loaded.arrivals[batch] = 0;
        if (thread < kPartialTiles) loaded.partial_arrivals[thread] = 0;
    }
    for (std::int64_t image = blockIdx.y; image < images; image += gridDim.y) {
        if (blockIdx.x == 0 && thread == 0) loaded.arrivals[image] = 0;
        for (int i = blockIdx.x * kPointwiseThreads + thread; i < loaded.units; i += gridDim.x * kPointwiseThreads)
            loaded.hidden[image * loaded.units + i] = loaded.cell[image * loaded.units + i] = 0.0f;
        const Element* from = static_cast<const Element*>(loaded.images) + image * loaded.in * loaded.pixels;
        Element* to = static_cast<Element*>(loaded.y) + (image * places + first) * loaded.padded;
        for (int start = 0; start < loaded.padded; start += kChannels, to += kChannels) {
            Element values[kPlacesPerThread][kChannels];
#pragma unroll
            for (int c = 0; c < kChannels; ++c)
#pragma unroll
                for (int i = 0; i < kPlacesPerThread; ++i) {
                    const int place = first + i * kPointwiseThreads;
                    int channel = start + c, pixel = place;
                    bool there = place < places;
                    if constexpr (kPairs) {
                        int column = place;
                        const int row = loaded.columns.divide(column);
                        channel = c % 4;
                        column = 2 * column + c / 4;
                        pixel = row * loaded.width + column;
                        there = there && column < loaded.width;
                    }
                    there = there && channel < loaded.in;
                    values[i][c] = there ? from[channel * loaded.pixels + pixel] : from_float<Element>(0.0f);
                }
#pragma unroll
            for (int i = 0; i < kPlacesPerThread; ++i)
                if (first + i * kPointwiseThreads < places)
                    Channels<Element>(values[i]).store(to + i * kPointwiseThreads * loaded.padded);
        }
    }
}

// A window that slides over an activation.
struct Window {
    int side, stride, padding;

    int out(int size) const { return (size + 2 * padding - side) / stride + 1; }
};

struct Shape {
    int height, width, channels;

    SKIPNET_HD std::int64_t pixels() const { return static_cast<std::int64_t>(height) * width; }
    SKIPNET_HD std::int64_t size() const { return pixels() * channels; }
};

// Max pool, channels-last; NaN wins. With a window of one pixel it only converts. What lies outside of an image is its
// nearest pixel, which is in the window as well: so all loads are issued, and wait for nothing. That ptxas has the
// registers for them is what the minimum of thread blocks is for: without one it takes fewer, and loads twice in turn.
template <typename From, typename To, int kSide>
__global__ void __launch_bounds__(kPointwiseThreads, sizeof(From) == 2 ? 4 : 2)
    max_pool_kernel(const From* x, int batch, const int* present, Shape from, int stride, int padding, Shape to,
                    To* y) {
    let_next_grid();
    wait_for_previous_grid();
    const int place = blockIdx.x * kPointwiseThreads + threadIdx.x, vectors = to.channels / kChannels;
    const int images = images_of(present, batch), pixel = place / vectors;
    if (pixel >= to.pixels()) return;
    const int top = pixel / to.width * stride - padding, left = pixel % to.width * stride - padding;
    x += place % vectors * kChannels;
    y += place * kChannels;
    for (std::int64_t image = blockIdx.y; image < images; image += gridDim.y) {
        Channels<From> values[kSide][kSide];
#pragma unroll
        for (int row = 0; row < kSide; ++row)
#pragma unroll
            for (int column = 0; column < kSide; ++column) {
                const int line = min(max(top + row, 0), from.height - 1);
                const int nearest = line * from.width + min(max(left + column, 0), from.width - 1);
                values[row][column].load(x + image * from.size() + nearest * from.channels);
            }
        Channels<From>& most = values[0][0];
#pragma unroll
        for (int i = 1; i < kSide * kSide; ++i)
#pragma unroll
            for (int word = 0; word < Channels<From>::kWords; ++word)
                most.words[word] = greater<From>(most.words[word], values[i / kSide][i % kSide].words[word]);
        if constexpr (std::is_same_v<From, To>) {
            most.store(y + image * to.size());
        } else {
            static_assert(std::is_same_v<To, float>);
            float result[kChannels];
            most.floats(result);
            Channels<To>(result).store(y + image * to.size());
        }
    }
}

// pooled[batch, channels] = the sums [batch, tiles, channels] over an image's tiles, divided by its pixels. Zeros where
// there is no image: the classifier takes all places, as the pixels of one.
__global__ void finish_pool_kernel(PooledSums pooled, int batch, const int* present, int channels, float* features) {
    let_next_grid();
    wait_for_previous_grid();
    const std::int64_t place = global_thread(), image = place / channels;
    if (image >= batch) return;
    const float* sums = pooled.sums + image * pooled.tiles * channels + place % channels;
    float sum = 0.0f;
    if (image < images_of(present, batch))
        for (int tile = 0; tile < pooled.tiles; ++tile) sum += sums[static_cast<std::int64_t>(tile) * channels];
    features[place] = sum / static_cast<float>(pooled.pixels);
}

Shape convolved(const Convolution& layer, const Shape& image) {
    return {layer.out_side(image.height), layer.out_side(image.width), layer.out};
}

constexpr Window kStemWindow{3, 2, 1}, kGateWindow{2, 2, 0}, kNoWindow{1, 1, 0};

Shape pooled(const Window& window, const Shape& image) {
    return {window.out(image.height), window.out(image.width), image.channels};
}

// What the stem finds: the image's pixels, or pairs of them.
Shape taken_in(const CompactedNetwork& network) {
    return {network.height, network.stem.pairs ? (network.width + 1) / 2 : network.width, network.stem.in};
}

// How much of each part of the workspace an image needs, in bytes.
struct ImageBytes {
    std::int64_t activation = 0, inner = 0, sums = 0, features = 0;
    std::int64_t partial = 0;  // of all images

    void fit_activation(std::int64_t bytes) { activation = std::max(activation, bytes); }
    void fit_inner(std::int64_t bytes) { inner = std::max(inner, bytes); }
    void fit_sums(const Convolution& layer, const Shape& from) {
        sums = std::max<std::int64_t>(sums, 4ll * pooled_tiles(layer, from.height, from.width) * layer.out);
    }
    void fit_partial(ElementType type, const Convolution& layer, int batch, const Shape& from) {
        partial = std::max<std::int64_t>(partial, 4ll * partial_sums(type, layer, batch, from.height, from.width));
    }
};

ImageBytes bytes_per_image(const CompactedNetwork& network, int batch) {
    const int bytes = element_bytes(network.element);
    ImageBytes per_image;
    per_image.fit_inner(taken_in(network).size() * bytes);
    Shape x{network.height, network.width, network.stem.in};
    per_image.fit_partial(network.element, network.stem, batch, x);
    x = convolved(network.stem, x);
    per_image.fit_activation(x.size() * bytes);
    if (network.stem_pools) x = pooled(kStemWindow, x);
    for (std::size_t index = 0; index < network.blocks.size(); ++index) {
        const std::vector<Convolution>& layers = network.blocks[index].convolutions;
        for (const Convolution& layer : network.blocks[index].projection)
            per_image.fit_partial(network.element, layer, batch, x);
        for (std::size_t i = 0; i + 1 < layers.size(); ++i) {
            per_image.fit_partial(network.element, layers[i], batch, x);
            x = convolved(layers[i], x);
            per_image.fit_inner(x.size() * bytes);
        }
        per_image.fit_sums(layers.back(), x);
        per_image.fit_partial(network.element, layers.back(), batch, x);
        x = convolved(layers.back(), x);
        per_image.fit_activation(x.size() * bytes);
        if (network.gates.empty()) continue;
        Shape seen = network.gates_pool ? pooled(kGateWindow, x) : x;
        per_image.fit_inner(seen.size() * 4);
        for (const Convolution& layer : network.gates[index].convolutions) {
            per_image.fit_sums(layer, seen);
            per_image.fit_partial(ElementType::float32, layer, batch, seen);
            seen = convolved(layer, seen);
            per_image.fit_inner(seen.size() * 4);
        }
    }
    per_image.features = 4ll * x.channels;
    per_image.fit_partial(ElementType::float32, network.head, batch, {1, 1, x.channels});
    return per_image;
}

// Hands out pieces of the workspace; without one it only counts.
class Arena {
public:
    explicit Arena(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

    template <typename T>
    T* allocate(std::int64_t bytes) {
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
    void *x, *next;           // activations: the current one, and the next stage's
    void *inner, *other;      // inside of a block or a gate
    float *sums, *gate_sums;  // pooled sums of x, of a feed-forward gate's last convolution
    float* features;          // [batch, channels]
    RowList lists[2];         // who executes a block, and who the next one, in turn
    int* arrivals;            // [batch + 1]
    PartialSums partial;      // of whichever convolution runs

    Workspace(const CompactedNetwork& network, int batch, Arena& arena) {
        const ImageBytes per_image = bytes_per_image(network, batch);
        x = arena.allocate<void>(batch * per_image.activation);
        next = arena.allocate<void>(batch * per_image.activation);
        inner = arena.allocate<void>(batch * per_image.inner);
        other = arena.allocate<void>(batch * per_image.inner);
        sums = arena.allocate<float>(batch * per_image.sums);
        gate_sums = arena.allocate<float>(network.gates.empty() ? 0 : batch * per_image.sums);
        features = arena.allocate<float>(batch * per_image.features);
        for (RowList& list : lists) {
            list.rows = arena.allocate<int>(batch * 4ll);
            list.count = arena.allocate<int>(4);
        }
        arrivals = arena.allocate<int>((batch + 1) * 4ll);
        partial.sums = arena.allocate<float>(per_image.partial);
        partial.arrivals = arena.allocate<int>(4ll * kPartialTiles);
    }
};

template <typename Element>
class ForwardPass {
public:
    ForwardPass(const CompactedNetwork& network, const CompactedCall& call, Arena arena, Stream stream)
        : network_(network), call_(call), workspace_(network, call.batch, arena), stream_(stream) {}

    void run() {
        stem();
        for (int index = 0; index < static_cast<int>(network_.blocks.size()); ++index) {
            run_block(index);
            if (index < call_.num_gates && !network_.gates.empty()) gate_step(index);
        }
        head();
    }

private:
    void stem() {
        const Shape images{network_.height, network_.width, network_.stem.in};
        const Shape places = taken_in(network_);
        const Loaded loaded{call_.images,
                            workspace_.inner,
                            call_.hidden,
                            call_.cell,
                            workspace_.arrivals,
                            workspace_.partial.arrivals,
                            network_.in,
                            places.channels,
                            images.height * images.width,
                            images.width,
                            places.height * places.width,
                            network_.lstm.hidden,
                            Divisor(places.width)};
        const auto kernel =
            network_.stem.pairs ? load_images_kernel<Element, true> : load_images_kernel<Element, false>;
        launch("load_images", kernel,
               pointwise_grid((loaded.places + kPlacesPerThread - 1) / kPlacesPerThread, call_.batch), stream_, loaded,
               call_.batch, call_.present);
        shape_ = convolved(network_.stem, images);
        void* y = network_.stem_pools ? workspace_.next : workspace_.x;
        convolve(network_.stem, images, {.relu = true, .x = workspace_.inner, .y = y});
        if (network_.stem_pools) shape_ = max_pool<Element, Element, kStemWindow>(shape_, y, workspace_.x);
    }

    Decision decision(int gate) const {
        const std::int64_t row = static_cast<std::int64_t>(gate) * call_.batch;
        const bool decides = gate < static_cast<int>(network_.blocks.size()) - 1;
        return {call_.gate_logits + row, call_.probabilities + row, call_.executed + row,
                call_.forced && decides ? call_.forced + row : nullptr};
    }

    // Who executes a block; null: everybody.
    const RowList* list(int block) const {
        return block > 0 && call_.num_gates > 0 ? &workspace_.lists[block % 2] : nullptr;
    }

    // RNNGate, which the block's last convolution evaluates in its tail; it compacts, too.
    GateTail gate_tail(int index) const {
        return {network_.embeddings[index],
                network_.lstm,
                call_.present,
                call_.hidden,
                call_.cell,
                decision(index),
                list(index) ? decision(index - 1).executed : nullptr,
                workspace_.lists[(index + 1) % 2],
                workspace_.arrivals};
    }

    // A feed-forward gate, in launches of its own.
    void gate_step(int index) {
        const CompactedGate& gate = network_.gates[index];
        Shape seen = network_.gates_pool ? max_pool<Element, float, kGateWindow>(shape_, workspace_.x, workspace_.inner)
                                         : max_pool<Element, float, kNoWindow>(shape_, workspace_.x, workspace_.inner);
        PooledSums sums{};
        void *from = workspace_.inner, *to = workspace_.other;
        for (const Convolution& layer : gate.convolutions) {
            sums = convolve(layer, seen, {.relu = true, .x = from, .y = to, .sums = workspace_.gate_sums},
                            ElementType::float32);
            seen = convolved(layer, seen);
            std::swap(from, to);
        }
        cuda::gate_step(gate.tail, call_.batch, call_.present, sums, decision(index), workspace_.lists[(index + 1) % 2],
                        workspace_.arrivals + call_.batch, true, stream_);
    }

    // For the images that execute it, in place. Where the block projects, the others
    // take its shortcut.
    void run_block(int index) {
        const CompactedBlock& block = network_.blocks[index];
        const RowList* executing = list(index);
        void *from = workspace_.x, *to = workspace_.inner;
        Shape shape = shape_;
        if (!block.projection.empty()) {
            convolve(block.projection[0], shape_, {.x = workspace_.x, .y = workspace_.next, .sums = workspace_.sums});
            std::swap(workspace_.x, workspace_.next);
        }
        const std::size_t last = block.convolutions.size() - 1;
        for (std::size_t i = 0; i < last; ++i) {
            convolve(block.convolutions[i], shape,
                     {.list = executing, .gathers = i == 0, .relu = true, .x = from, .y = to});
            shape = convolved(block.convolutions[i], shape);
            from = to;
            to = to == workspace_.inner ? workspace_.other : workspace_.inner;
        }
        GateTail gate{};
        const bool gates = index < call_.num_gates && network_.gates.empty();
        if (gates) gate = gate_tail(index);
        sums_ = convolve(block.convolutions[last], shape,
                         {.list = executing,
                          .scatters = true,
                          .relu = true,
                          .x = from,
                          .residual = workspace_.x,
                          .y = workspace_.x,
                          .sums = workspace_.sums,
                          .gate = gates ? &gate : nullptr});
        shape_ = convolved(block.convolutions[last], shape);
    }

    void head() {
        launch("finish_pool", finish_pool_kernel,
               dependent(pointwise_grid(static_cast<std::int64_t>(call_.batch) * shape_.channels)), stream_, sums_,
               call_.batch, call_.present, shape_.channels, workspace_.features);
        // The batch is the pixels of one image: a matrix product.
        GatheredConv classify{};
        classify.batch = 1;
        classify.height = 1;
        classify.width = call_.batch;
        classify.x = workspace_.features;
        classify.y = call_.logits;
        classify.partial = workspace_.partial;
        classify.pixels_are_images = classify.dependent = true;
        gathered_conv(ElementType::float32, network_.head, classify, stream_);
    }

    // What a convolution is told beyond its layer.
    struct ConvolutionOptions {
        const RowList* list = nullptr;
        bool gathers = false, scatters = false, relu = false;
        const void *x = nullptr, *residual = nullptr;
        void* y = nullptr;
        float* sums = nullptr;
        const GateTail* gate = nullptr;
    };

    PooledSums convolve(const Convolution& layer, const Shape& from, const ConvolutionOptions& options,
                        ElementType type) {
        const RowList present{nullptr, call_.present};
        const RowList* all = call_.present ? &present : nullptr;
        gathered_conv(type, layer,
                      {call_.batch, from.height, from.width, options.list ? options.list : all, options.gathers,
                       options.scatters, options.relu, options.x, options.residual, options.y, options.sums,
                       workspace_.partial, false, options.gate, true},
                      stream_);
        return {options.sums, pooled_tiles(layer, from.height, from.width),
                static_cast<int>(convolved(layer, from).pixels())};
    }
    PooledSums convolve(const Convolution& layer, const Shape& from, const ConvolutionOptions& options) {
        return convolve(layer, from, options, network_.element);
    }

    template <typename From, typename To, const Window& window>
    Shape max_pool(const Shape& from, const void* x, void* y) {
        const Shape to = pooled(window, from);
        launch("max_pool", max_pool_kernel<From, To, window.side>,
               dependent(pointwise_grid(to.size() / kChannels, call_.batch)), stream_, static_cast<const From*>(x),
               call_.batch, call_.present, from, window.stride, window.padding, to, static_cast<To*>(y));
        return to;
    }

    const CompactedNetwork& network_;
    const CompactedCall& call_;
    Workspace workspace_;
    Stream stream_;
    Shape shape_{};      // of x
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
        const std::size_t size = static_cast<std::size_t>(layer.out) * layer.depth();
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
    Arena arena(nullptr);
    Workspace(network, batch, arena);
    return arena.used();
}

void run_compacted(const CompactedNetwork& network, const CompactedCall& call, Stream stream) {
    const int blocks = static_cast<int>(network.blocks.size());
    check(call.num_gates == 0 || call.num_gates == blocks - 1 || call.num_gates == blocks, "num_gates: expected ",
          blocks - 1, " or ", blocks, ", got ", call.num_gates);
    if (call.batch == 0) return;
    const Arena arena(call.workspace);
    switch (network.element) {
        case ElementType::float32:
        case ElementType::tf32:
            return ForwardPass<float>(network, call, arena, stream).run();
        case ElementType::float16:
            return ForwardPass<Half>(network, call, arena, stream).run();
        case ElementType::bfloat16:
            return ForwardPass<Bfloat16>(network, call, arena, stream).run();
    }
}

}  // namespace skipnet::cuda
