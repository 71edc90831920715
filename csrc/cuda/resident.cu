// The resident strategy: a whole CIFAR-scale SkipNet in one launch.
//
// A thread block takes one image, or a few, from stem to head. Activations stay in its shared memory and skipping
// is a branch. A convolution is an implicit GEMM on tensor cores: 16 pixels (two rows of eight) by 16 input channels
// times 16 by 8 output channels. A warp owns the same regions of every image's plane, and 16 output channels, for as
// long as a stage of the network lasts; it holds a convolution's weights for them in registers, uses them for every
// image that executes, and overwrites each with the next convolution's as soon as the last image is through with it. So
// weights stream from L2 without a stop, half a convolution or more ahead, past gates and barriers, without taking
// shared memory; where a block turns out to be skipped, what came for it is dropped. Why so: docs/cuda-design.md.
//
// Or a cluster of thread blocks takes an image (kClustered): each holds all of its planes and computes a part of the
// regions, whose results it writes to all of them; gates are computed by each. Not a bit differs. No plan chooses it.
//
// An output is the sum over channels (chunks of 16), columns and rows of the kernel, in this order, whatever the batch.
//
// The phases are those of every engine: stem, gate_step, compact, run_block, head.
#include "resident.h"

#include <cstdint>
#include <type_traits>

#include "../check.h"
#include "../gate.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxImages = 4;  // of a thread block; their decisions are a word
constexpr int kStrip = 8;      // columns of a region
constexpr int kChunk = 16;     // input channels that a tensor core sums over, and output channels of a warp
constexpr int kLine = 128;     // bytes: planes begin at multiples
constexpr int kZeros = 0;      // where in shared memory a line of zeros lies, for pixels outside of a plane
constexpr int kMostChannels = stage_channels(kMaxStages - 1);
constexpr int kEmbeddings = 4;            // for a gate, the next one, and two more on their way
constexpr int kProducts = kMaxUnits + 4;  // floats between two images' products: in different banks
constexpr unsigned kAllLanes = ~0u;

template <typename Element>
__device__ float low_of(unsigned pair) {
    return to_float(Element{static_cast<std::uint16_t>(pair)});
}
template <typename Element>
__device__ float high_of(unsigned pair) {
    return to_float(Element{static_cast<std::uint16_t>(pair >> 16)});
}

constexpr SKIPNET_HD int rounded_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr SKIPNET_HD int quotient_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

// Rows of a region. Such that the regions and channels of 32x32, 16x16 and 8x8 planes keep all warps busy.
constexpr SKIPNET_HD int region_rows(int channels) { return channels == 64 ? 4 : 8; }
constexpr SKIPNET_HD int regions_of(int channels, int height, int width) {
    return quotient_up(height, region_rows(channels)) * quotient_up(width, kStrip);
}

// Bytes of a plane, [height, width rounded up to 8, channels].
constexpr SKIPNET_HD int plane_bytes(int channels, int height, int width) {
    return height * rounded_up(width, kStrip) * channels * 2;
}

// Where things lie in shared memory, in bytes.
struct SharedLayout {
    int lstm;        // a copy of the network's
    int embeddings;  // kEmbeddings places, taken in turn
    int embedding;   // bytes of a place
    int features;    // [warps, kMostChannels]: pooled activations, a copy for each warp that computes with them
    int ahead;       // [2, kMaxImages, kMaxUnits] of float4: what the input adds to the next gate's four sums
    int products;    // [kMaxImages, kProducts]: whose sum is a logit
    int sums;        // [images, regions, channels]: of each region's pixels
    int sums_of;     // bytes of an image's
    int pooled;      // [images, channels], for the head
    int decisions;   // [gates, kMaxImages]: whether an image executes the block after a gate
    int logits;      // [gates, kMaxImages]
    int images;      // [images, image]: their planes
    int image;
    int total;
    int x[kMaxStages], inner[kMaxStages];  // planes of a stage, from the start of an image's memory
};

// At the start of shared memory.
struct Control {
    uint4 zeros[kLine / 16];
    int turn;   // that the thread block takes next
    int first;  // of its images
};

SKIPNET_HD int lstm_floats(const ResidentNetwork& network) {
    const int n = network.hidden;
    return n ? 4 * n * (network.embed + n) + 4 * n + n + 1 : 0;
}
SKIPNET_HD int embedding_floats(const ResidentNetwork& network, int stage) {
    return rounded_up(network.embed * stage_channels(stage) + network.embed, 4);
}

SharedLayout shared_layout(const ResidentNetwork& network, int images) {
    int planes[kMaxStages] = {}, most_sums = 0;
    for (int stage = 0; stage < network.stages; ++stage) {
        const ResidentStage& at = network.stage[stage];
        planes[stage] = plane_bytes(stage_channels(stage), at.height, at.width);
        const int sums = regions_of(stage_channels(stage), at.height, at.width) * stage_channels(stage);
        if (sums > most_sums) most_sums = sums;
    }
    SharedLayout layout{};
    int end = rounded_up(sizeof(Control), kLine);
    const auto place = [&](int bytes) {
        const int at = end;
        end = rounded_up(at + bytes, kLine);
        return at;
    };
    const int channels = stage_channels(network.stages - 1);
    layout.lstm = place(lstm_floats(network) * 4);
    layout.embedding = rounded_up(network.embed ? embedding_floats(network, network.stages - 1) * 4 : 0, kLine);
    layout.embeddings = place(kEmbeddings * layout.embedding);
    layout.features = place(network.embed ? kWarps * kMostChannels * 4 : 0);
    layout.ahead = place(network.embed ? 2 * kMaxImages * kMaxUnits * 16 : 0);
    layout.products = place(network.embed ? kMaxImages * kProducts * 4 : 0);
    layout.sums_of = rounded_up(most_sums * 4, kLine);
    layout.sums = place(images * layout.sums_of);
    layout.pooled = place(images * channels * 4);
    layout.decisions = place(network.embed ? network.blocks * kMaxImages : 0);
    layout.logits = place(network.embed ? network.blocks * kMaxImages * 4 : 0);
    // A stage's two planes never lie where the activation of the stage before lies. The second stage's x is last, so
    // that the third stage's planes, which are no larger, fit before it.
    const int second = planes[0] + 2 * planes[1], third = planes[1] + 2 * planes[2];
    layout.image = 2 * planes[0] > second ? 2 * planes[0] : second;
    layout.image = layout.image > third ? layout.image : third;
    layout.x[0] = 0, layout.inner[0] = planes[0];
    layout.x[1] = layout.image - planes[1], layout.inner[1] = planes[0];
    layout.x[2] = planes[2], layout.inner[2] = 0;
    layout.images = place(images * layout.image);
    layout.total = end;
    return layout;
}

// Of one tap of a convolution.
constexpr SKIPNET_HD int fragment_bytes(int in, int out) { return in * out * 2; }

// Where a lane's part of a convolution's weights lies; null if there is no convolution.
struct Source {
    const uint4* fragments;
    const float2* biases;
};

// A warp's weights of a convolution: for each chunk of input channels and each tap of the kernel the fragment of 16
// input by 16 output channels. In memory, `uint4 fragments[out / 16][in / 16][taps][32 lanes]`: a lane's B operands of
// two mma, in the PTX ISA's layout. And the biases of what a lane gets from each of the two.
template <int kIn, int kTaps>
struct Weights {
    static constexpr int kChunks = kIn / kChunk;
    uint4 of[kChunks][kTaps];
    float2 biases[2];

    // Of the 16 output channels `tile`.
    static __device__ Source at(const void* fragments, const float* biases, int tile, int lane) {
        return {static_cast<const uint4*>(fragments) + tile * kChunks * kTaps * 32 + lane,
                reinterpret_cast<const float2*>(biases) + tile * kChunk / 2 + lane % 4};
    }

    __device__ void load_biases(const Source& from, bool loads) {
        load_global(biases[0], from.biases, loads);
        load_global(biases[1], from.biases + 4, loads);
    }
    __device__ void load(const Source& from, int chunk, int tap, bool loads) {
        load_global(of[chunk][tap], from.fragments + (chunk * kTaps + tap) * 32, loads);
    }
    __device__ void load(const Source& from) {
        load_biases(from, true);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) load(from, chunk, tap, true);
    }
};

// What a convolution reads and writes: planes, from the start of an image's memory.
struct Planes {
    int from, from_height, from_width;
    int to;
    const ResidentStage& stage;  // of the output
};

// A byte of a plane: 8 channels, `eighth`, of a pixel. Pixels lie one after another; their eighths are swizzled so that
// those of eight pixels in a row, at any column, lie in different banks.
template <int kChannels>
__device__ inline int byte_of(int row, int column, int pitch, int eighth) {
    constexpr int kPixelsOfLine = kLine / (2 * kChannels);
    // Not / and then &: the columns left of a plane shall follow the same pattern.
    const int swizzled = eighth ^ (column & (kChannels / 8 - 1) * kPixelsOfLine) / kPixelsOfLine;
    return (row * pitch + column) * 2 * kChannels + swizzled * 16;
}

// Which images a worker, a thread block or a cluster, takes at a time. Rounds in which each has a turn take nearly the
// same number, so that the last one is not long for a few workers while the others have nothing left.
struct Turns {
    int workers;
    int least;   // images of a turn
    int larger;  // in so many rounds, the first ones, one more
};

Turns turns_of(int batch, const ResidentPlan& plan) {
    const int workers = plan.blocks / plan.cluster, each = quotient_up(batch, workers);
    const int rounds = quotient_up(each, plan.images);
    return {workers, each / rounds, each % rounds};
}

// A thread block on its way through the network.
template <typename Element, bool kClustered>
struct ForwardPass {
    const ResidentNetwork& network;
    const ResidentCall& call;
    const SharedLayout& layout;
    unsigned char* shared;
    int warp, lane;
    int count = 0;                     // of images, from control().first on
    unsigned executing = 0;            // a bit for each of them: it runs the next block
    int index = 0;                     // of the gate that is next
    float hidden = 0.0f, cell = 0.0f;  // warp i has image i's LSTM state, a unit a lane

    __device__ int blocks_of_image() const { return kClustered ? cluster_size() : 1; }
    __device__ int rank() const { return kClustered ? cluster_rank() : 0; }  // among them
    // To all thread blocks that share the image.
    template <typename T>
    __device__ void broadcast(T* place, T value) const {
        if (!kClustered) *place = value;
        for (int other = 0; kClustered && other < blocks_of_image(); ++other) *peer(place, other) = value;
    }
    // Until what has been written is there for all thread blocks that share the image.
    __device__ void barrier() const {
        if (!kClustered) return __syncthreads();
        cluster_arrive();
        cluster_wait();
    }
    __device__ unsigned all_images() const { return (1u << count) - 1; }
    __device__ Control& control() const { return *reinterpret_cast<Control*>(shared + kZeros); }
    __device__ unsigned char* image(int i) const { return shared + layout.images + i * layout.image; }
    __device__ float* sums(int i) const { return reinterpret_cast<float*>(shared + layout.sums + i * layout.sums_of); }
    __device__ bool* decisions(int gate) const {
        return reinterpret_cast<bool*>(shared + layout.decisions) + gate * kMaxImages;
    }
    __device__ float* logits(int gate) const {
        return reinterpret_cast<float*>(shared + layout.logits) + gate * kMaxImages;
    }
    __device__ bool is_forced(int gate) const { return gate < call.forced_count; }
    __device__ float* embedding_place(int gate) const {
        return reinterpret_cast<float*>(shared + layout.embeddings + gate % kEmbeddings * layout.embedding);
    }
    __device__ float* features() const {
        // Worked out where it is used: kept from the start it would be the one register too many.
        return reinterpret_cast<float*>(shared + in_register(layout.features)) + warp * kMostChannels;
    }
    __device__ float4* ahead(int i, int gate) const {
        return reinterpret_cast<float4*>(shared + layout.ahead) + (gate % 2 * kMaxImages + i) * kMaxUnits;
    }
    __device__ float* products(int i) const {
        return reinterpret_cast<float*>(shared + layout.products) + i * kProducts;
    }

    __device__ void run(const Turns& turns);
    __device__ bool take(int turn, const Turns& turns);
    __device__ void stem();
    template <int kStage>
    __device__ void run_stage();
    template <int kStage>
    __device__ void enter_stage();
    template <int kStage>
    __device__ void gate_step(int block);
    template <int kStage, int kSize>
    __device__ unsigned rnn_gate(int block);
    template <int kStage>
    __device__ void pool_features(int i) const;
    template <int kStage, int kSize>
    __device__ float embedded(int gate) const;
    __device__ unsigned compact(float logit) const;
    __device__ void stage_forced_decisions();
    __device__ void write_decisions() const;
    __device__ void head();

    template <int kStage>
    __device__ void fetch_embedding(int gate, int block);
    template <int kTogether>
    __device__ float pooled(int stage, int i, int channel, int begin = 0, int step = 1) const;
    template <int kIn, int kOut, int kStride, int kKernel>
    __device__ void convolve(Weights<kIn, kKernel * kKernel>& weights, const Source& next, unsigned images,
                             const Planes& planes, bool closes);
    template <int kOut, int kPairs, bool kProjects, bool kWhole, bool kCloses>
    __device__ void finish_region(const float (&sum)[kPairs][2][4], const float2 (&biases)[2], int i, int row0,
                                  int column0, int region, const Planes& planes);
};

// relu(convolution + bias) for the images of a mask, which has some. One that `closes` a block adds what stands in its
// output's plane; it and a projection, which has no ReLU, leave each region's sums. `next`, if there is one, replaces
// the weights.
template <typename Element, bool kClustered>
template <int kIn, int kOut, int kStride, int kKernel>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::convolve(Weights<kIn, kKernel * kKernel>& weights,
                                                                           const Source& next, unsigned images,
                                                                           const Planes& planes, bool closes) {
    constexpr bool kProjects = kKernel == 1;
    constexpr int kTiles = kOut / kChunk, kWorkers = kWarps / kTiles;  // warps that share 16 output channels
    constexpr int kRows = region_rows(kOut), kPairs = kRows / 2;
    constexpr int kStep = kProjects ? kStride : 1;  // between the input's rows that are read
    // Rows p and p + kPairs of the output are one product's; so are the rows that they come from, kApart from each
    // other.
    constexpr int kApart = kStride * kPairs, kNext = kProjects ? 1 : kStride;
    constexpr int kSources = kNext * (kPairs - 1) + kKernel;
    static_assert(kTiles * kWorkers == kWarps && kRows % 2 == 0 && (kKernel == 1 || kKernel == 3));

    const int worker = warp / kTiles * blocks_of_image() + rank(), workers = kWorkers * blocks_of_image();
    const int strips = planes.stage.strips, regions = planes.stage.regions;
    const int from_pitch = rounded_up(planes.from_width, kStrip), line = from_pitch * 2 * kIn;  // bytes of a row
    const bool whole = planes.stage.whole;
    const float2 biases[2] = {weights.biases[0], weights.biases[1]};

    unsigned left = images;
    int region = worker;
    if (region >= regions) return;  // none for this warp, in the whole stage: it has no need of the next weights
    do {
        const int i = __ffs(left) - 1;
        const int row = region * planes.stage.inverse >> 16;  // of regions
        const int row0 = row * kRows, column0 = (region - row * strips) * kStrip;
        // The regions of an image, then the next image's.
        const int region_after = region + workers;
        const bool image_done = region_after >= regions;
        const unsigned left_after = image_done ? left & (left - 1) : left;
        const bool refill = !left_after && next.fragments;

        float sum[kPairs][2][4] = {};  // of two rows and 8 output channels, as the tensor core leaves it
        const int from = layout.images + i * layout.image + planes.from;
        // ldmatrix: lanes 0-7 and 8-15 give eight pixels of a row and of its partner, the others their upper 8
        // channels. What comes is a product's operand as it is, in registers side by side.
        const int begin = kStride * row0 - kKernel / 2 + lane / 8 % 2 * kApart;
        const auto multiply = [&](auto whole_plane) {
            // A chunk of input channels and a column of the kernel make a step. Its operands come while the tensor
            // cores are busy with the step before, where registers are left for them.
            constexpr int kSteps = Weights<kIn, kKernel * kKernel>::kChunks * kKernel;
            constexpr int kBuffers = kClustered || kIn == 64 ? 1 : 2;
            unsigned operands[kBuffers][kSources][4];
            const auto load_operands = [&](int number) {
                const int chunk = number / kKernel, dx = number % kKernel;
                const int column = kStride * (column0 + lane % 8) + dx - kKernel / 2;
                const bool column_inside = static_cast<unsigned>(column) < static_cast<unsigned>(planes.from_width);
                const int byte = byte_of<kIn>(0, column, from_pitch, lane / 16) ^ chunk * 32;
                // Outside of the plane zeros, of the same banks: eight pixels still come from all of them.
                const int zeros = kZeros + (byte & (kLine - 16));
                const int place = column_inside ? from + begin * line + byte : zeros;
                const int step = column_inside ? kStep * line : 0;
#pragma unroll
                for (int s = 0; s < kSources; ++s) {
                    // In a whole plane a region's inner rows have rows on both sides.
                    const bool sure = whole_plane.value && kStride == 1 && 0 < s && s < kSources - 1;
                    const bool inside =
                        sure || static_cast<unsigned>(begin + s * kStep) < static_cast<unsigned>(planes.from_height);
                    ldmatrix_x4(shared + (inside ? place + s * step : zeros), operands[number % kBuffers][s]);
                }
            };
            if (kBuffers == 2) load_operands(0);
#pragma unroll
            for (int number = 0; number < kSteps; ++number) {
                const int chunk = number / kKernel, dx = number % kKernel;
                const int loaded = number + kBuffers - 1;
                if (loaded < kSteps) load_operands(loaded);
#pragma unroll
                for (int dy = 0; dy < kKernel; ++dy) {
                    const int tap = dy * kKernel + dx;
                    const uint4 weight = weights.of[chunk][tap];
                    const unsigned b[2][2] = {{weight.x, weight.y}, {weight.z, weight.w}};
#pragma unroll
                    for (int p = 0; p < kPairs; ++p) {
                        mma_m16n8k16<Element>(sum[p][0], operands[number % kBuffers][kNext * p + dy], b[0]);
                        mma_m16n8k16<Element>(sum[p][1], operands[number % kBuffers][kNext * p + dy], b[1]);
                    }
                    weights.load(next, chunk, tap, refill);
                }
                if (number + 1 == kSteps) weights.load_biases(next, refill);
                __syncwarp();  // keeps these loads here, among the products
            }
        };
        // Codes for each kind of plane and of end, so that none has a branch of its own.
        const auto finish = [&](auto whole_plane, auto closes_block) {
            finish_region<kOut, kPairs, kProjects, whole_plane.value, closes_block.value>(sum, biases, i, row0, column0,
                                                                                          region, planes);
        };
        using Yes = std::true_type;
        using No = std::false_type;
        const auto compute = [&](auto whole_plane) {
            multiply(whole_plane);
            if (kProjects || !closes)
                finish(whole_plane, No());
            else
                finish(whole_plane, Yes());
        };
        whole ? compute(Yes()) : compute(No());
        left = left_after;
        region = image_done ? worker : region_after;
    } while (left);
}

// What follows a region's products: bias, what stands in the place if it closes a block, ReLU but for a projection, and
// the region's sums where they are pooled. All that has to be loaded is loaded first.
template <typename Element, bool kClustered>
template <int kOut, int kPairs, bool kProjects, bool kWhole, bool kCloses>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::finish_region(const float (&sum)[kPairs][2][4],
                                                                                const float2 (&biases)[2], int i,
                                                                                int row0, int column0, int region,
                                                                                const Planes& planes) {
    constexpr int kRows = 2 * kPairs;
    const int tile = warp % (kOut / kChunk), pitch = planes.stage.strips * kStrip, line = pitch * 2 * kOut;
    const int column = column0 + lane / 4;
    const auto inside = [&](int row) {
        return kWhole || (row0 + row < planes.stage.height && column < planes.stage.width);
    };
    // Of 8 channels each.
    unsigned char* places[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
        places[n] = image(i) + planes.to + byte_of<kOut>(row0, column, pitch, tile * 2 + n) + lane % 4 * 4;
    const auto both = [&](int row, int n) { return reinterpret_cast<unsigned*>(places[n] + row * line); };

    unsigned before[kRows][2] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int n = 0; n < 2; ++n)
            if (kCloses && inside(row)) before[row][n] = *both(row, n);
    float totals[4] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            if (!inside(row)) continue;
            const float* products = sum[row % kPairs][n] + row / kPairs * 2;
            float low = products[0] + biases[n].x, high = products[1] + biases[n].y;
            if (kCloses) low += low_of<Element>(before[row][n]), high += high_of<Element>(before[row][n]);
            const unsigned rounded = kProjects ? pack<Element>(low, high) : pack_relu<Element>(low, high);
            broadcast(both(row, n), rounded);
            if (kProjects || kCloses) {
                totals[2 * n] += low_of<Element>(rounded);
                totals[2 * n + 1] += high_of<Element>(rounded);
            }
        }
    if (kProjects || kCloses) {
        static_assert(holder<16, 4, 4>(1) == 8 && holder<16, 4, 4>(2) == 16);
        const float total = spread_sums<16, 4>(totals, lane);
        const int channel = tile * kChunk + lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2;
        if (lane / 4 % 2 == 0) broadcast(sums(i) + region * kOut + channel, total);
    }
}

// The images into planes of 16 channels, and the first convolution.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::stem() {
    const int height = network.height, width = network.width, pixels = height * width;
    const int pitch = rounded_up(width, kStrip);
    const ResidentStage& stage = network.stage[0];
    Weights<16, 9> weights;
    weights.load(weights.at(network.stem, network.stem_bias, 0, lane));
    for (int at = threadIdx.x; at < count * pixels; at += kThreads) {
        const int i = at / pixels, pixel = at % pixels;
        const auto* from = static_cast<const Element*>(call.images) +
                           static_cast<std::size_t>(control().first + i) * network.in * pixels + pixel;
        unsigned char* to = image(i) + layout.inner[0];
#pragma unroll
        for (int eighth = 0; eighth < 2; ++eighth) {
            unsigned pairs[4] = {};
#pragma unroll
            for (int c = 0; c < 8; ++c)
                if (eighth * 8 + c < network.in)
                    pairs[c / 2] |= static_cast<unsigned>(from[(eighth * 8 + c) * pixels].bits) << c % 2 * 16;
            *reinterpret_cast<uint4*>(to + byte_of<16>(pixel / width, pixel % width, pitch, eighth)) =
                make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
    barrier();
    const Planes planes{layout.inner[0], height, width, layout.x[0], stage};
    convolve<16, 16, 1, 3>(weights, {}, all_images(), planes, false);
    barrier();
}

// A stage's first block where the activation changes its shape: its first convolution for the images that execute,
// and the projection for all.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::enter_stage() {
    constexpr int kOut = stage_channels(kStage), kIn = kOut / 2;
    const ResidentStage &before = network.stage[kStage - 1], &stage = network.stage[kStage];
    const int tile = warp % (kOut / kChunk);
    if (kClustered) barrier();  // others may still be reading the sums that the projection writes
    Planes planes{layout.x[kStage - 1], before.height, before.width, layout.inner[kStage], stage};
    if (executing) {
        Weights<kIn, 9> weights;
        weights.load(weights.at(stage.entry, stage.entry_bias, tile, lane));
        convolve<kIn, kOut, 2, 3>(weights, {}, executing, planes, false);
    }
    Weights<kIn, 1> weights;
    const auto* projection = static_cast<const unsigned char*>(stage.entry) + 9 * fragment_bytes(kIn, kOut);
    weights.load(weights.at(projection, stage.entry_bias + kOut, tile, lane));
    planes.to = layout.x[kStage];
    convolve<kIn, kOut, 2, 1>(weights, {}, all_images(), planes, false);
    barrier();
}

// run_block for all of a stage's residual blocks, each followed by its gate.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::run_stage() {
    constexpr int kChannels = stage_channels(kStage);
    constexpr int kEntry = kStage > 0;  // the first block's first convolution is not among `inner`
    using Inner = Weights<kChannels, 9>;
    const ResidentStage& stage = network.stage[kStage];
    const int convolutions = 2 * stage.blocks - kEntry;
    const auto source = [&](int number) {
        if (number >= convolutions) return Source{};
        return Inner::at(
            static_cast<const unsigned char*>(stage.inner) + number * 9 * fragment_bytes(kChannels, kChannels),
            stage.inner_bias + number * kChannels, warp % (kChannels / kChunk), lane);
    };

    Inner weights;
    if (kEntry) enter_stage<kStage == 0 ? 1 : kStage>();
    constexpr bool kEarly = !kClustered || kChannels < 64;  // a cluster's kernel has no registers left to hold them
    if (kEarly) weights.load(source(0));
    for (int block = 0; block < stage.blocks; ++block) {
        const int end = 2 * (block + 1) - kEntry;  // the next block's first convolution
        if (executing) {
            for (int number = block == 0 ? 0 : end - 2; number < end; ++number) {
                const bool closes = number == end - 1;
                const Planes planes{closes ? layout.inner[kStage] : layout.x[kStage], stage.height, stage.width,
                                    closes ? layout.x[kStage] : layout.inner[kStage], stage};
                if (!kEarly) weights.load(source(number));
                convolve<kChannels, kChannels, 1, 3>(weights, source(kEarly ? number + 1 : convolutions), executing,
                                                     planes, closes);
                if (!closes) barrier();
            }
        } else if (kEarly && end < convolutions) {
            weights.load(source(end));
        }
        gate_step<kStage>(block);
    }
}

// Brings the embedding of the gate after a block under way, by the warps that look ahead; every gate begins one copy,
// so that they can be counted. The block is counted from a stage's first one, and may lie in a later stage.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::fetch_embedding(int gate, int block) {
    const ResidentStage& stage = network.stage[kStage];
    if constexpr (kStage + 1 < kMaxStages)
        if (block >= stage.blocks) return fetch_embedding<kStage + 1>(gate, block - stage.blocks);
    if (kStage < network.stages && block < stage.blocks) {
        const int floats = embedding_floats(network, kStage);
        const float* from = stage.embeddings + static_cast<std::size_t>(block) * floats;
#pragma unroll 1
        for (int at = 4 * (threadIdx.x - 32 * kMaxImages); at < floats; at += 4 * (kThreads - 32 * kMaxImages))
            cp_async16(embedding_place(gate) + at, from + at);
    }
    cp_async_commit();
}

// Average over an image's pixels; or the share that some regions have in it. So many of their sums are loaded before
// anything waits for one.
template <typename Element, bool kClustered>
template <int kTogether>
__device__ __forceinline__ float ForwardPass<Element, kClustered>::pooled(int stage, int i, int channel, int begin,
                                                                          int step) const {
    const ResidentStage& at = network.stage[stage];
    const int channels = stage_channels(stage), regions = at.regions;
    const float* sum = sums(i) + channel;
    float parts[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
        const int region = begin + k * step;
        parts[k] = region < regions ? sum[region * channels] : 0.0f;
    }
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) total += parts[k];
#pragma unroll 1
    for (int region = begin + kTogether * step; region < regions; region += step) total += sum[region * channels];
    return total * at.share;
}

// The LSTM's functions without a branch. Their absolute error is that of a float32 near 1: no more than the state's
// own.
__device__ inline float fast_sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * x)); }
__device__ inline float fast_tanh(float x) { return 1.0f - 2.0f * fast_reciprocal(1.0f + fast_exp2(2.88539008f * x)); }

// Adds to an LSTM unit's four sums, a unit a lane, what inputs make of them, an input a lane. `weights` is that of the
// lane's unit and the first input.
template <int kUnroll>
__device__ inline void add_inputs(float4& sums, const float4* weights, float input, int inputs, int units) {
#pragma unroll kUnroll
    for (int k = 0; k < inputs; ++k) {
        const float4 weight = weights[k * units];
        const float x = __shfl_sync(kAllLanes, input, k);
        sums.x += weight.x * x;
        sums.y += weight.y * x;
        sums.z += weight.z * x;
        sums.w += weight.w * x;
    }
}

// Finishes an image's pool into this warp's features.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::pool_features(int i) const {
    constexpr int kChannels = stage_channels(kStage);
    constexpr int kLanes = kChannels < 32 ? kChannels : 32;  // that have a channel of their own; others share them
    constexpr int kTogether = 8 >> kStage;                   // a lane's part of what the published networks have
#pragma unroll
    for (int part = 0; part < kChannels; part += kLanes) {
        const int channel = part + lane % kLanes;
        float sum = pooled<kTogether>(kStage, i, channel, lane / kLanes, 32 / kLanes);
        if (kLanes < 32) sum += __shfl_xor_sync(kAllLanes, sum, kLanes);
        if (lane < kLanes) features()[channel] = sum;
    }
    __syncwarp();
}

// A lane's input to the LSTM: one of the outputs of a gate's embedding of this warp's features. `kSize` is embed and
// hidden where they are equal and known, so that lanes can share an output and no loop is left; 0 takes any.
template <typename Element, bool kClustered>
template <int kStage, int kSize>
__device__ __forceinline__ float ForwardPass<Element, kClustered>::embedded(int gate) const {
    constexpr int kChannels = stage_channels(kStage), kPieces = kChannels / 4;
    constexpr int kShare = kSize > 0 ? 32 / kSize : 1;
    const int embed = kSize ? kSize : network.embed;
    const int output = kSize ? lane % kSize : min(lane, embed - 1), share = kSize ? lane / kSize % kShare : 0;
    const float* weights = embedding_place(gate);
    const auto* weight = reinterpret_cast<const float4*>(weights + output * kChannels);
    const auto* feature = reinterpret_cast<const float4*>(features());
    float4 sums{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kPieces; k += kShare) {
        const bool last = k + kShare > kPieces && k + share >= kPieces;  // not every lane has one more
        const float4 w = weight[last ? 0 : k + share], x = feature[last ? 0 : k + share];
        sums.x += last ? 0.0f : w.x * x.x;
        sums.y += last ? 0.0f : w.y * x.y;
        sums.z += last ? 0.0f : w.z * x.z;
        sums.w += last ? 0.0f : w.w * x.w;
    }
    const float sum = (sums.x + sums.y) + (sums.z + sums.w);
    float all = weights[embed * kChannels + output];
#pragma unroll
    for (int other = 0; other < kShare; ++other)
        all += kShare > 1 ? __shfl_sync(kAllLanes, sum, output + other * kSize) : sum;
    return all;
}

// Pool-finish, embed, LSTM step, and who executes the next block. Warp i decides for image i, whose features are as
// they were unless its block has changed them. Then what they add to the LSTM's sums is known already: warp i +
// kMaxImages has computed it during the gate before, as it does now for the next one.
template <typename Element, bool kClustered>
template <int kStage, int kSize>
__device__ __forceinline__ unsigned ForwardPass<Element, kClustered>::rnn_gate(int block) {
    const int embed = kSize ? kSize : network.embed, units = kSize ? kSize : network.hidden;
    constexpr int kUnroll = kSize ? kSize : 1;
    const bool is_ahead = warp >= kMaxImages;
    const int unit = min(lane, units - 1), i = (is_ahead ? warp + 1 : warp) % kMaxImages;
    const bool changed = (kStage > 0 && block == 0) || (executing >> i & 1);
    const auto* lstm =
        reinterpret_cast<const float4*>(shared + layout.lstm);  // [embed + hidden + 1, hidden] of i, f, g, o
    const auto* projection = reinterpret_cast<const float*>(lstm + (embed + units + 1) * units);
    if (i < count) {
        float4 sums = lstm[(embed + units) * units + unit];  // the bias
        const auto recall = [&] { add_inputs<kUnroll>(sums, lstm + embed * units + unit, hidden, units, units); };
        float4 input{0.0f, 0.0f, 0.0f, 0.0f};
        if (changed || is_ahead) {
            recall();  // which needs not wait for the pool, as all that follows
            pool_features<kStage>(i);
            add_inputs<kUnroll>(input, lstm + unit, embedded<kStage, kSize>(index + is_ahead), embed, units);
        } else {
            recall();
            input = ahead(i, index)[unit];
        }
        if (is_ahead) {
            if (lane < units) ahead(i, index + 1)[lane] = input;
        } else {
            cell = fast_sigmoid(input.y + sums.y) * cell + fast_sigmoid(input.x + sums.x) * fast_tanh(input.z + sums.z);
            hidden = fast_sigmoid(input.w + sums.w) * fast_tanh(cell);
            products(i)[lane] = lane < units ? projection[unit] * hidden : 0.0f;
        }
    }
    if (is_ahead) fetch_embedding<kStage>(index + kEmbeddings - 1, block + kEmbeddings - 1);
    __syncthreads();
    // A lane has an image, the same in every warp.
    const auto* product = reinterpret_cast<const float4*>(products(lane < count ? lane : 0));
    float4 sums{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll kUnroll
    for (int k = 0; k < quotient_up(units, 4); ++k) {
        const float4 x = product[k];
        sums.x += x.x;
        sums.y += x.y;
        sums.z += x.z;
        sums.w += x.w;
    }
    return compact((sums.x + sums.y) + (sums.z + sums.w) + projection[units]);
}

// The gate after a stage's block, and who runs the next one.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::gate_step(int block) {
    cp_async_wait<kEmbeddings - 3>();
    barrier();  // for the block's output and sums, and two embeddings
    if (index < call.num_gates)
        executing =
            network.embed == 10 && network.hidden == 10 ? rnn_gate<kStage, 10>(block) : rnn_gate<kStage, 0>(block);
    ++index;
}

// The images that a gate lets execute, as a mask; a lane has an image's logit.
template <typename Element, bool kClustered>
__device__ __forceinline__ unsigned ForwardPass<Element, kClustered>::compact(float logit) const {
    const bool decides = lane < count;
    const bool executes = is_forced(index) ? decides && decisions(index)[lane] : executes_logit(logit);
    if (warp == 0 && decides) {
        logits(index)[lane] = logit;
        if (!is_forced(index)) decisions(index)[lane] = executes;
    }
    return __ballot_sync(kAllLanes, executes) & all_images();
}

// Where decisions are forced, a gate finds them made.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::stage_forced_decisions() {
    for (int at = threadIdx.x; at < call.forced_count * count; at += kThreads) {
        const int gate = at / count, i = at % count;
        decisions(gate)[i] =
            call.forced[static_cast<std::size_t>(control().first + i) * call.forced_image + gate * call.forced_gate];
    }
}

// What the gates have found, all at once. A probability is on its decision's side of 0.5, whatever the last bit of an
// exponential function.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::write_decisions() const {
    for (int at = threadIdx.x; at < call.num_gates * count; at += kThreads) {
        const int gate = at / count, i = at % count;
        const std::size_t to = static_cast<std::size_t>(gate) * call.batch + control().first + i;
        const float logit = logits(gate)[i], probability = sigmoid(logit);
        call.gate_logits[to] = logit;
        call.probabilities[to] = executes_logit(logit) == executes(probability) ? probability
                                 : executes(probability)                        ? 0.5f
                                                                                : 0.5f + 0x1p-24f;
        call.executed[to] = decisions(gate)[i];
    }
}

// Global average pool and classifier.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::head() {
    const int last = network.stages - 1, channels = stage_channels(last), classes = network.classes;
    auto* features = reinterpret_cast<float*>(shared + layout.pooled);  // [count, channels]
    for (int at = threadIdx.x; at < count * channels; at += kThreads)
        features[at] = pooled<4>(last, at / channels, at % channels);
    __syncthreads();
    if (rank() > 0) return;
    write_decisions();
    for (int at = threadIdx.x; at < count * classes; at += kThreads) {
        const int i = at / classes, number = at % classes;
        float logit = network.head[channels * classes + number];
        for (int c = 0; c < channels; ++c) logit += network.head[c * classes + number] * features[i * channels + c];
        static_cast<Element*>(call.logits)[static_cast<std::size_t>(control().first) * classes + at] =
            from_float<Element>(logit);
    }
    if (warp < count && lane < network.hidden) {
        const std::size_t at = static_cast<std::size_t>(control().first + warp) * network.hidden + lane;
        call.hidden[at] = hidden;
        call.cell[at] = cell;
    }
}

// The images of a turn; false if none are left.
template <typename Element, bool kClustered>
__device__ __forceinline__ bool ForwardPass<Element, kClustered>::take(int turn, const Turns& turns) {
    const int round = turn / turns.workers, size = turns.least + (round < turns.larger);
    const int first = (round * turns.least + min(round, turns.larger)) * turns.workers + turn % turns.workers * size;
    count = min(size, call.batch - first);
    if (threadIdx.x == 0) control().first = first;
    __syncthreads();
    return count > 0;
}

template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::run(const Turns& turns) {
    if (threadIdx.x < kLine / 16) control().zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
    for (int at = threadIdx.x; at < lstm_floats(network); at += kThreads)
        reinterpret_cast<float*>(shared + layout.lstm)[at] = network.lstm[at];
    for (int turn = static_cast<int>(blockIdx.x) / blocks_of_image(); take(turn, turns);) {
        executing = all_images();
        index = 0;
        hidden = cell = 0.0f;
        for (int gate = 0; gate < kEmbeddings - 1 && warp >= kMaxImages; ++gate) fetch_embedding<0>(gate, gate);
        stage_forced_decisions();
        stem();
        run_stage<0>();
        if (network.stages > 1) run_stage<1>();
        if (network.stages > 2) run_stage<2>();
        head();
        if (kClustered || !call.work_counter) return;
        if (threadIdx.x == 0) control().turn = turns.workers + atomicAdd(call.work_counter, 1);
        __syncthreads();
        turn = control().turn;
    }
}

template <typename Element, bool kClustered>
__global__ void __launch_bounds__(kThreads, 1)
    resident(const ResidentNetwork network, const ResidentCall call, const SharedLayout layout, const Turns turns) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if (kClustered) return;  // never launched
#endif
    ForwardPass<Element, kClustered>{network,
                                     call,
                                     layout,
                                     shared_memory(),
                                     __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0),  // known uniform
                                     static_cast<int>(threadIdx.x % 32)}
        .run(turns);
}

auto kernel_of(const ResidentNetwork& network, bool clustered) {
    if (network.element == ElementType::float16) return clustered ? resident<Half, true> : resident<Half, false>;
    return clustered ? resident<Bfloat16, true> : resident<Bfloat16, false>;
}

}  // namespace

ResidentWeights lay_out(ResidentNetwork& network, const void* fragments, const float* floats) {
    const auto* bytes = static_cast<const unsigned char*>(fragments);
    ResidentWeights used{0, 0};
    const auto convolutions = [&](std::size_t size) {
        used.fragments += size;
        return bytes + used.fragments - size;
    };
    const auto parameters = [&](std::size_t size) {
        used.floats += size;
        return floats + used.floats - size;
    };
    network.stem = convolutions(9 * fragment_bytes(16, 16));
    network.stem_bias = parameters(16);
    int height = network.height, width = network.width;
    network.blocks = 0;
    for (int number = 0; number < network.stages; ++number) {
        ResidentStage& stage = network.stage[number];
        const int channels = stage_channels(number), inner = 2 * stage.blocks - (number > 0);
        if (number > 0) {
            height = quotient_up(height, 2), width = quotient_up(width, 2);
            stage.entry = convolutions(10 * fragment_bytes(channels / 2, channels));
            stage.entry_bias = parameters(2 * channels);
        }
        network.blocks += stage.blocks;
        stage.height = height, stage.width = width;
        stage.share = 1.0f / static_cast<float>(height * width);
        stage.strips = quotient_up(width, kStrip);
        stage.regions = regions_of(channels, height, width);
        stage.inverse = 65536 / stage.strips + 1;
        stage.whole = height % region_rows(channels) == 0 && width % kStrip == 0;
        stage.inner = convolutions(static_cast<std::size_t>(inner) * 9 * fragment_bytes(channels, channels));
        stage.inner_bias = parameters(static_cast<std::size_t>(inner) * channels);
        if (network.embed)
            stage.embeddings = parameters(static_cast<std::size_t>(stage.blocks) * embedding_floats(network, number));
    }
    network.lstm = parameters(lstm_floats(network));
    network.head = parameters(static_cast<std::size_t>(stage_channels(network.stages - 1) + 1) * network.classes);
    return used;
}

int resident_shared_memory(const ResidentNetwork& network, int images) { return shared_layout(network, images).total; }

ResidentDevice place_resident(const ResidentNetwork& network) {
    for (const bool clustered : {false, true}) allow_shared_memory(kernel_of(network, clustered));
    return {multiprocessors(), shared_memory_limit()};
}

ResidentPlan plan_resident(const ResidentNetwork& network, int batch, const ResidentDevice& device) {
    int most = kMaxImages;
    while (most > 0 && resident_shared_memory(network, most) > device.shared_memory) --most;
    check(most > 0, "image: ", network.height, " x ", network.width, " needs ", resident_shared_memory(network, 1),
          " bytes of shared memory, the device has ", device.shared_memory);
    // As few rounds as can be, then as few images at a time.
    const int rounds = quotient_up(batch, device.multiprocessors * most);
    const int images = quotient_up(batch, device.multiprocessors * (rounds > 0 ? rounds : 1));
    const int blocks = min(device.multiprocessors, quotient_up(batch, images > 0 ? images : 1));
    return {images, blocks, blocks * images < batch, 1};
}

void run_resident(const ResidentNetwork& network, const ResidentCall& call, const ResidentPlan& plan, Stream stream) {
    check(plan.images >= 1 && plan.images <= kMaxImages, "plan: expected 1 to ", kMaxImages, " images, got ",
          plan.images);
    check(plan.cluster == 1 || !plan.dynamic, "plan: clusters take one round");
    check(!plan.dynamic || call.work_counter, "work_counter: needed for ", call.batch, " images");
    check(network.element != ElementType::float32, "element: expected 16 bits");
    if (call.batch == 0) return;
    const SharedLayout layout = shared_layout(network, plan.images);
    const Grid grid{dim3(plan.blocks), dim3(kThreads), static_cast<std::size_t>(layout.total), plan.cluster, true};
    ResidentCall counted = call;
    if (call.forced) counted.forced_count = min(call.num_gates, network.blocks - 1);
    launch("resident", kernel_of(network, plan.cluster > 1), grid, stream, network, counted, layout,
           turns_of(call.batch, plan));
}

}  // namespace skipnet::cuda
