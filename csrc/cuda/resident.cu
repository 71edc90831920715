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
// Or a cluster of thread blocks takes an image (kClustered): each computes a band of every plane, and stores to others
// the rows that they read, too, and what they pool; gates are computed by each. Not a bit differs. No plan chooses it.
//
// An output is the sum of its bias, then over channels (chunks of 16), columns and rows of the kernel, then of what
// stands in its place (in the first stage after the first column), in this order, whatever the batch.
//
// The phases are those of every engine: stem, gate_step, compact, run_block, head.
#include "resident.h"

#include <cstdint>
#include <type_traits>

#include "../check.h"
#include "../gate.h"
#include "activations.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxImages = 4;   // of a thread block; their decisions are a word
constexpr int kMaxCluster = 4;  // thread blocks; as many lanes have a sum
constexpr int kStrip = 8;       // columns of a region
constexpr int kChunk = 16;      // input channels that a tensor core sums over, and output channels of a warp
constexpr int kLine = 128;      // bytes: planes begin at multiples
constexpr int kRow = 1024;      // bytes of a row of a whole plane: 32x32, 16x16 and 8x8 ones have them
constexpr int kZeros = 0;       // where in shared memory zeros lie, for pixels outside of a plane: lines kRow apart
constexpr int kZeroLines = 6;
constexpr int kMostChannels = stage_channels(kMaxStages - 1);
constexpr int kEmbeddings = 4;        // for a gate, the next one, and two more on their way
constexpr int kPooledTogether = 256;  // sums of pieces that are taken at once, zeros where there are fewer
constexpr unsigned kAllLanes = ~0u;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr bool kManyRegisters = false;  // ptxas needs some more for these
#else
constexpr bool kManyRegisters = true;
#endif

constexpr SKIPNET_HD int rounded_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr SKIPNET_HD int quotient_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

// Rows of a band, of which 32x32, 16x16 and 8x8 planes have four. A pool is a sum over pieces of a band and 8 columns.
constexpr SKIPNET_HD int band_rows(int channels) { return 128 / channels; }

constexpr SKIPNET_HD int region_rows(int channels) { return channels == 64 ? 4 : 8; }

// The number of the first image in a mask, which has some: from a table of two bits for each mask, quicker than __ffs.
__device__ inline int lowest(unsigned images) {
    static_assert(kMaxImages == 4);
    return 0x12131210u >> 2 * images & 3;
}

// A warp's share of a convolution's output: regions, and some of the output channels. Such that the shares of 32x32,
// 16x16 and 8x8 planes keep all warps busy, those of one thread block or, with one piece for each, of four.
template <int kChannels, bool kClustered>
struct Share {
    static constexpr int kRows = kClustered ? band_rows(kChannels) : region_rows(kChannels);
    static constexpr int kBands = kRows / band_rows(kChannels);
    static constexpr int kEighths = kClustered ? 1 : 2;         // 8 output channels each
    static constexpr int kSlices = kChannels / (8 * kEighths);  // warps with the same pixels
    static constexpr int kWorkers = kWarps / kSlices;           // warps with the same channels
};

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
    int sums;        // [images, pieces, channels]: of each piece's pixels; two in turn in a cluster
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
    uint4 zeros[kLine / 16];    // the first line of them
    uint4 identity[32];         // a lane's operand: the 16x16 identity, or halves of it
    StoreCounter exchanges[3];  // in a cluster: of rows alone, and two in turn of rows and sums
    int turn;                   // that the thread block takes next
    int first;                  // of its images
};
static_assert(sizeof(Control) <= kRow, "before the second line of zeros");

SKIPNET_HD int lstm_floats(const ResidentNetwork& network) {
    const int n = network.hidden;
    return n ? 4 * n * (network.embed + n) + 4 * n + n + 1 : 0;
}
SKIPNET_HD int embedding_floats(const ResidentNetwork& network, int stage) {
    return rounded_up(network.embed * stage_channels(stage) + network.embed, 4);
}

// Floats from one output's weights to the next one's in shared memory: those of eight lie in different banks.
constexpr SKIPNET_HD int embedding_row(int channels) { return channels + 4; }

SharedLayout shared_layout(const ResidentNetwork& network, int images, bool clustered) {
    int planes[kMaxStages] = {}, most_sums = kPooledTogether;
    for (int stage = 0; stage < network.stages; ++stage) {
        const ResidentStage& at = network.stage[stage];
        planes[stage] = plane_bytes(stage_channels(stage), at.height, at.width);
        const int sums = rounded_up(at.pieces, 2 * at.strips) * stage_channels(stage);
        if (sums > most_sums) most_sums = sums;
    }
    SharedLayout layout{};
    int end = (kZeroLines - 1) * kRow + kLine;
    const auto place = [&](int bytes) {
        const int at = end;
        end = rounded_up(at + bytes, kLine);
        return at;
    };
    const int channels = stage_channels(network.stages - 1);
    layout.lstm = place(lstm_floats(network) * 4);
    layout.embedding = rounded_up(network.embed * (embedding_row(channels) + 1) * 4, kLine);
    layout.embeddings = place(kEmbeddings * layout.embedding);
    layout.features = place(network.embed ? kWarps * kMostChannels * 4 : 0);
    layout.ahead = place(network.embed ? 2 * kMaxImages * kMaxUnits * 16 : 0);
    layout.sums_of = rounded_up(most_sums * 4, kLine);
    layout.sums = place((clustered ? 2 : images) * layout.sums_of);
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

// Where a lane's part of a convolution's weights lies, if there is such a convolution.
struct Source {
    const uint2* fragments;
    const float2* biases;
    bool exists;
};

// A warp's weights of a convolution: for each chunk of input channels and each tap of the kernel the fragment of 16
// input by 8 or 16 output channels. In memory, `uint4 fragments[out / 16][in / 16][taps][32 lanes]`: a lane's B
// operands of two mma, in the PTX ISA's layout. And the biases of what a lane gets from each of them.
template <int kIn, int kTaps, int kEighths>
struct Weights {
    static constexpr int kChunks = kIn / kChunk;
    std::conditional_t<kEighths == 2, uint4, uint2> of[kChunks][kTaps];
    float2 biases[kEighths];

    // Of the warps' share number `slice` of the output channels.
    static __device__ Source at(const void* fragments, const float* biases, int slice, int lane, bool exists = true) {
        const int eighth = slice * kEighths;
        return {static_cast<const uint2*>(fragments) + (eighth / 2 * kChunks * kTaps * 32 + lane) * 2 + eighth % 2,
                reinterpret_cast<const float2*>(biases) + eighth * 4 + lane % 4, exists};
    }

    __device__ void load_biases(const Source& from, bool loads) {
#pragma unroll
        for (int n = 0; n < kEighths; ++n) load_global(biases[n], from.biases + 4 * n, loads);
    }
    __device__ void load(const Source& from, int chunk, int tap, bool loads) {
        auto& fragment = of[chunk][tap];
        using Fragment = std::remove_reference_t<decltype(fragment)>;
        load_global(fragment, reinterpret_cast<const Fragment*>(from.fragments + (chunk * kTaps + tap) * 64), loads);
    }
    __device__ void load(const Source& from) {
        load_biases(from, true);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) load(from, chunk, tap, true);
    }
};
__device__ inline void operands_of(const uint2& fragment, unsigned (&b)[1][2]) {
    b[0][0] = fragment.x, b[0][1] = fragment.y;
}
__device__ inline void operands_of(const uint4& fragment, unsigned (&b)[2][2]) {
    b[0][0] = fragment.x, b[0][1] = fragment.y;
    b[1][0] = fragment.z, b[1][1] = fragment.w;
}

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

// How the thread blocks of a cluster share an image: bands of its planes, as many in every stage.
struct Bands {
    int all;
    int own;      // of a thread block
    int sharers;  // thread blocks that have some; others have nothing to do
};

Bands bands_of(const ResidentNetwork& network, int cluster) {
    const int all = quotient_up(network.height, band_rows(stage_channels(0))), own = quotient_up(all, cluster);
    return {all, own, quotient_up(all, own)};
}

// A thread block on its way through the network.
template <typename Element, bool kClustered>
struct ForwardPass {
    const ResidentNetwork& network;
    const ResidentCall& call;
    const SharedLayout& layout;
    const Bands& bands;
    unsigned char* shared;
    int warp, lane;
    int count = 0;                     // of images, from first_image() on
    unsigned executing = 0;            // a bit for each of them: it runs the next block
    int index = 0;                     // of the gate that is next
    float hidden = 0.0f, cell = 0.0f;  // warp i has image i's LSTM state, a unit a lane

    int exchanged = 0, pooled_by_all = 0;  // a cluster's exchanges so far: of rows alone, of rows and sums

    __device__ int rank() const { return kClustered ? cluster_rank() : 0; }  // among thread blocks that share an image
    __device__ int first_image() const { return load_shared(&control().first); }
    __device__ unsigned all_images() const { return (1u << count) - 1; }
    __device__ Control& control() const { return *reinterpret_cast<Control*>(shared + kZeros); }
    __device__ unsigned char* image(int i) const { return shared + layout.images + i * layout.image; }
    // Written by a convolution; a cluster has two places in turn.
    __device__ float* next_sums(int i) const {
        const int place = kClustered ? pooled_by_all % 2 : i;
        return reinterpret_cast<float*>(shared + layout.sums + place * layout.sums_of);
    }
    __device__ const float* sums(int i) const {
        const int place = kClustered ? (pooled_by_all + 1) % 2 : i;
        return reinterpret_cast<const float*>(shared + layout.sums + place * layout.sums_of);
    }
    __device__ StoreCounter* exchange(bool pools) const {
        return control().exchanges + (pools ? 1 + pooled_by_all % 2 : 0);
    }
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
    __device__ void rnn_gate(int block);
    template <int kStage, typename Meanwhile>
    __device__ void pool_features(int i, Meanwhile meanwhile) const;
    template <int kStage, int kSize>
    __device__ float embedded(int gate) const;
    __device__ unsigned compact() const;
    __device__ void clear_sums();
    __device__ void stage_forced_decisions();
    __device__ void write_decisions() const;
    __device__ void head();

    template <int kStage>
    __device__ void fetch_embedding(int gate, int block);
    template <int kChannels>
    __device__ void await_others(const ResidentStage& stage, bool pools);
    template <int kTogether, typename Meanwhile>
    __device__ float pooled(int stage, int i, int channel, int begin, int step, Meanwhile meanwhile) const;
    template <int kIn, int kOut, int kStride, int kKernel, bool kCloses = false>
    __device__ void convolve(Weights<kIn, kKernel * kKernel, kClustered ? 1 : 2>& weights, const Source& next,
                             unsigned images, const Planes& planes);
    template <int kIn, int kOut, int kStride, int kKernel, bool kCloses, bool kWhole>
    __device__ void convolve_planes(Weights<kIn, kKernel * kKernel, kClustered ? 1 : 2>& weights, const Source& next,
                                    unsigned images, const Planes& planes);
    template <int kOut, bool kProjects, bool kWhole, bool kCloses, int kPairs, int kEighths>
    __device__ void finish_region(float (&sum)[kPairs][kEighths][4], int i, int row0, int column0,
                                  const Planes& planes);
};

// relu(convolution + bias) for the images of a mask, which has some. One that closes a block adds what stands in its
// output's plane; it and a projection, which has no ReLU, leave each piece's sums. `next`, if it exists, replaces the
// weights.
template <typename Element, bool kClustered>
template <int kIn, int kOut, int kStride, int kKernel, bool kCloses>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::convolve(
    Weights<kIn, kKernel * kKernel, kClustered ? 1 : 2>& weights, const Source& next, unsigned images,
    const Planes& planes) {
    if (planes.stage.whole)
        convolve_planes<kIn, kOut, kStride, kKernel, kCloses, true>(weights, next, images, planes);
    else
        convolve_planes<kIn, kOut, kStride, kKernel, kCloses, false>(weights, next, images, planes);
}

// The same for whole planes, where most numbers are constants, or for others.
template <typename Element, bool kClustered>
template <int kIn, int kOut, int kStride, int kKernel, bool kCloses, bool kWhole>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::convolve_planes(
    Weights<kIn, kKernel * kKernel, kClustered ? 1 : 2>& weights, const Source& next, unsigned images,
    const Planes& planes) {
    using Own = Share<kOut, kClustered>;
    constexpr bool kProjects = kKernel == 1;
    constexpr int kRows = Own::kRows, kPairs = kRows / 2;
    constexpr int kStep = kProjects ? kStride : 1;  // between the input's rows that are read
    // Rows p and p + kPairs of the output are one product's; so are the rows that they come from, kApart from each
    // other.
    constexpr int kApart = kStride * kPairs, kNext = kProjects ? 1 : kStride;
    constexpr int kSources = kNext * (kPairs - 1) + kKernel;
    static_assert(Own::kSlices * Own::kWorkers == kWarps && kRows % 2 == 0 && (kKernel == 1 || kKernel == 3));

    const int strips = kWhole ? kRow / (2 * kOut * kStrip) : planes.stage.strips;
    const int from_pitch = kWhole ? kRow / (2 * kIn) : rounded_up(planes.from_width, kStrip);
    const int from_width = kWhole && kStride == 1 ? from_pitch : planes.from_width;
    const int line = from_pitch * 2 * kIn;  // bytes of a row
    const int first = rank() * bands.own * strips + warp / Own::kSlices;
    const int end = kClustered ? min((rank() + 1) * bands.own * strips, planes.stage.pieces) : planes.stage.regions;

    int region = first;
    unsigned left = region < end ? images : 0;  // a warp may have no region, in the whole stage
    while (left) {
        const int i = lowest(left);
        const int row = kWhole ? region / strips : region * planes.stage.inverse >> 16;  // of regions
        const int row0 = row * kRows, column0 = (region - row * strips) * kStrip;
        // The regions of an image, then the next image's.
        const int region_after = region + Own::kWorkers;
        const bool image_done = region_after >= end;
        const unsigned left_after = image_done ? left & (left - 1) : left;
        const bool refill = !left_after && next.exists;

        float sum[kPairs][Own::kEighths][4];  // of two rows and 8 output channels, as the tensor core leaves it
#pragma unroll
        for (auto& pair : sum)
#pragma unroll
            for (int n = 0; n < Own::kEighths; ++n)
#pragma unroll
                for (int at = 0; at < 4; ++at) pair[n][at] = at % 2 ? weights.biases[n].y : weights.biases[n].x;
        const int from = layout.images + i * layout.image + planes.from;
        // ldmatrix: lanes 0-7 and 8-15 give eight pixels of a row and of its partner, the others their upper 8
        // channels. What comes is a product's operand as it is, in registers side by side.
        const int begin = kStride * row0 - kKernel / 2 + lane / 8 % 2 * kApart;
        // A chunk of input channels and a column of the kernel make a step. Its operands come while the tensor cores
        // are busy with the step before, where registers are left for them.
        constexpr int kSteps = kIn / kChunk * kKernel;
        constexpr int kBuffers = kIn < 64 || kClustered || kManyRegisters ? 2 : 1;
        unsigned operands[kBuffers][kSources][4];
        // In a whole plane an address serves all rows, and zeros where it is outside of the columns. But a region's
        // first and last rows may be outside, too.
        constexpr bool kConstantRows = kWhole && kStride == 1;
        static_assert(!kConstantRows || kSources <= kZeroLines);
        const auto load_operands = [&](int number) {
            const int chunk = number / kKernel, dx = number % kKernel;
            const int column = kStride * (column0 + lane % 8) + dx - kKernel / 2;
            const bool column_inside =
                (kConstantRows && dx == 1) || static_cast<unsigned>(column) < static_cast<unsigned>(from_width);
            const int byte = byte_of<kIn>(0, column, from_pitch, lane / 16) ^ chunk * 32;
            // Outside of the plane zeros, of the same banks: eight pixels still come from all of them. Those of a row
            // outside may read the same ones.
            const int place = column_inside ? from + begin * line + byte : kZeros + (byte & (kLine - 16));
            const int step = kConstantRows || column_inside ? kStep * line : 0;
#pragma unroll
            for (int s = 0; s < kSources; ++s) {
                const bool sure = kConstantRows && 0 < s && s < kSources - 1;
                const bool inside =
                    sure || static_cast<unsigned>(begin + s * kStep) < static_cast<unsigned>(planes.from_height);
                const int row = (inside ? place : kZeros) + (kConstantRows || inside ? s * step : 0);
                ldmatrix_x4(shared + row, operands[number % kBuffers][s]);
            }
        };
        // What stands in the output's place is added like a tenth tap, by a product with the identity, which is exact.
        unsigned before[kPairs][4];
        const auto load_before = [&] {
            const int pitch = kWhole ? kRow / (2 * kOut) : strips * kStrip;
#pragma unroll
            for (int p = 0; p < kPairs; ++p) {
                const int row = row0 + p + lane / 8 % 2 * kPairs, column = column0 + lane % 8;
                const bool inside = (kWhole || (row < planes.stage.height && column < planes.stage.width)) &&
                                    (Own::kEighths == 2 || lane < 16);
                const int eighth = warp % Own::kSlices * Own::kEighths + lane / 16 % Own::kEighths;
                const int byte = byte_of<kOut>(row, column, pitch, eighth);
                ldmatrix_x4(inside ? image(i) + planes.to + byte : shared + kZeros + (byte & (kLine - 16)), before[p]);
            }
        };
        const auto add_before = [&] {
            const uint4 identity = load_shared(control().identity + lane);
            const unsigned halves[2][2] = {{identity.x, identity.y}, {identity.z, identity.w}};
#pragma unroll
            for (int p = 0; p < kPairs; ++p)
#pragma unroll
                for (int n = 0; n < Own::kEighths; ++n) mma_m16n8k16<Element>(sum[p][n], before[p], halves[n]);
        };
        constexpr bool kEarly = kCloses && kOut == 16;  // where registers are left for it
        if (kBuffers == 2) load_operands(0);
#pragma unroll
        for (int number = 0; number < kSteps; ++number) {
            const int chunk = number / kKernel, dx = number % kKernel;
            const int loaded = number + kBuffers - 1;
            if (loaded < kSteps) load_operands(loaded);
            if (kEarly && number == 0) load_before();
            if (number + 1 == kSteps) weights.load_biases(next, refill);
#pragma unroll
            for (int dy = 0; dy < kKernel; ++dy) {
                const int tap = dy * kKernel + dx;
                unsigned b[Own::kEighths][2];
                operands_of(weights.of[chunk][tap], b);
#pragma unroll
                for (int p = 0; p < kPairs; ++p)
#pragma unroll
                    for (int n = 0; n < Own::kEighths; ++n)
                        mma_m16n8k16<Element>(sum[p][n], operands[number % kBuffers][kNext * p + dy], b[n]);
                weights.load(next, chunk, tap, refill);
            }
            if (kEarly && number == 0) add_before();
            __syncwarp();  // keeps these loads here, among the products
        }
        if (kCloses && !kEarly) {
            load_before();
            add_before();
        }
        finish_region<kOut, kProjects, kWhole, kCloses>(sum, i, row0, column0, planes);
        left = left_after;
        region = image_done ? first : region_after;
    }
}

// What follows a region's products: what stands in the place if it closes a block, ReLU but for a projection, and the
// pieces' sums where they are pooled. Tensor cores do both, by products with the identity, which are exact.
template <typename Element, bool kClustered>
template <int kOut, bool kProjects, bool kWhole, bool kCloses, int kPairs, int kEighths>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::finish_region(float (&sum)[kPairs][kEighths][4],
                                                                                int i, int row0, int column0,
                                                                                const Planes& planes) {
    using Own = Share<kOut, kClustered>;
    constexpr int kRows = Own::kRows, kBands = Own::kBands, kBandRows = kRows / kBands;
    constexpr bool kPools = kProjects || kCloses;
    const ResidentStage& stage = planes.stage;
    const int eighth = warp % Own::kSlices * kEighths;
    const int pitch = kWhole ? kRow / (2 * kOut) : stage.strips * kStrip, line = pitch * 2 * kOut;
    const auto inside = [&](int row, int column) {
        return kWhole || (row0 + row < stage.height && column < stage.width);
    };
    unsigned char* plane = image(i) + planes.to;
    const uint4 identity = kPools ? load_shared(control().identity + lane) : uint4();
    const int column = column0 + lane / 4;
    unsigned rounded[kRows][2] = {};  // of 8 channels each
#pragma unroll
    for (int n = 0; n < kEighths; ++n) {
        unsigned char* place = plane + byte_of<kOut>(row0, column, pitch, eighth + n) + lane % 4 * 4;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if (!inside(row, column)) continue;
            const float* both = sum[row % kPairs][n] + row / kPairs * 2;
            rounded[row][n] = kProjects ? pack<Element>(both[0], both[1]) : pack_relu<Element>(both[0], both[1]);
            store_shared(reinterpret_cast<unsigned*>(place + row * line), rounded[row][n]);
        }
    }
    if (kClustered) {  // the neighbours' convolutions read a row more than they have
        unsigned char* place = plane + byte_of<kOut>(row0, column, pitch, eighth) + lane % 4 * 4;
        StoreCounter* counted = exchange(kPools);
        const int above = rank() * bands.own * kRows, below = above + (bands.own - 1) * kRows;
        const bool to_above = rank() > 0 && row0 == above, to_below = rank() + 1 < bands.sharers && row0 == below;
        store_async(place, rounded[0][0], counted, rank() - 1, to_above && inside(0, column));
        store_async(place + (kRows - 1) * line, rounded[kRows - 1][0], counted, rank() + 1,
                    to_below && inside(0, column));
    }
    if (kPools) {
        // With the identity on the left a row is transposed: a lane gets two pixels of channels lane / 4 and + 8.
        const unsigned transposing[4] = {identity.x, identity.y, identity.z, identity.w};
        constexpr int kSums = kBandRows < 4 ? kBandRows : 4;  // of rows, side by side
        float totals[kBands][kSums][4] = {};
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            mma_m16n8k16<Element>(totals[row / kBandRows][row % kSums], transposing, rounded[row]);
        float values[kBands * kEighths];
#pragma unroll
        for (int at = 0; at < kBands * kEighths; ++at) {
            auto& rows = totals[at / kEighths];
            const int n = at % kEighths * 2;
#pragma unroll
            for (auto& sums : rows) sums[n] += sums[n + 1];
#pragma unroll
            for (int half = kSums / 2; half > 0; half /= 2)
#pragma unroll
                for (int k = 0; k < half; ++k) rows[k][n] += rows[k + half][n];
            values[at] = rows[0][n];
        }
        const float total = spread_sums<2, 1>(values, lane);
        const int held = lane / (4 / (kBands * kEighths)) % (kBands * kEighths);
        const int band = row0 / kBandRows + held / kEighths;
        const int at = (band * stage.strips + column0 / kStrip) * kOut + (eighth + held % kEighths) * 8 + lane / 4;
        float* place = next_sums(i) + at;
        // In a cluster each of the four lanes that have a sum stores it to one thread block.
        if (kClustered ? lane % kMaxCluster == rank() : lane % (4 / (kBands * kEighths)) == 0)
            store_shared(place, total);
        if (kClustered)
            store_async(place, __float_as_uint(total), exchange(true), lane % kMaxCluster,
                        lane % kMaxCluster != rank() && lane % kMaxCluster < bands.sharers);
    }
}

// Until the others of a cluster have stored what they share of a convolution's output: the rows next to this thread
// block's and, where it pools, sums. What it takes in may be overwritten by nobody before that: whoever writes it has
// waited for what this thread block stores when it has read it.
template <typename Element, bool kClustered>
template <int kChannels>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::await_others(const ResidentStage& stage, bool pools) {
    if (!kClustered) return;
    const int rows = (rank() > 0) + (rank() + 1 < bands.sharers);
    const int others = bands.all - min(bands.own, bands.all - rank() * bands.own);
    StoreCounter* counter = exchange(pools);
    if (threadIdx.x == 0)
        expect_stores(counter, rows * stage.width * kChannels * 2 + pools * others * stage.strips * kChannels * 4);
    wait_for_stores(counter, (pools ? pooled_by_all / 2 : exchanged) % 2);
    pools ? ++pooled_by_all : ++exchanged;
}

// The images into planes of 16 channels, and the first convolution.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::stem() {
    const int height = network.height, width = network.width, pixels = height * width;
    const int pitch = rounded_up(width, kStrip);
    const ResidentStage& stage = network.stage[0];
    Weights<16, 9, kClustered ? 1 : 2> weights;
    weights.load(weights.at(network.stem, network.stem_bias, warp % Share<16, kClustered>::kSlices, lane));
    // In a cluster its own rows, and those next to them.
    const int rows = bands.own * band_rows(16), above = kClustered ? max(rank() * rows - 1, 0) : 0;
    const int taken = kClustered ? (min((rank() + 1) * rows + 1, height) - above) * width : pixels;
    for (int at = threadIdx.x; at < count * taken; at += kThreads) {
        const int i = at / taken, pixel = above * width + at % taken;
        const auto* from = static_cast<const Element*>(call.images) +
                           static_cast<std::size_t>(first_image() + i) * network.in * pixels + pixel;
        unsigned char* to = image(i) + layout.inner[0];
#pragma unroll
        for (int eighth = 0; eighth < 2; ++eighth) {
            unsigned pairs[4] = {};
#pragma unroll
            for (int c = 0; c < 8; ++c)
                if (eighth * 8 + c < network.in)
                    pairs[c / 2] |= static_cast<unsigned>(from[(eighth * 8 + c) * pixels].bits) << c % 2 * 16;
            store_shared(reinterpret_cast<uint4*>(to + byte_of<16>(pixel / width, pixel % width, pitch, eighth)),
                         make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        }
    }
    __syncthreads();
    const Planes planes{layout.inner[0], height, width, layout.x[0], stage};
    convolve<16, 16, 1, 3>(weights, {}, all_images(), planes);
    await_others<16>(stage, false);
    cp_async_wait<kEmbeddings - 3>();  // for the embeddings of the first gate and the next one
    __syncthreads();
}

// A stage's first block where the activation changes its shape: its first convolution for the images that execute,
// and the projection for all.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::enter_stage() {
    constexpr int kOut = stage_channels(kStage), kIn = kOut / 2;
    const ResidentStage &before = network.stage[kStage - 1], &stage = network.stage[kStage];
    const int slice = warp % Share<kOut, kClustered>::kSlices;
    constexpr int kEighths = Share<kOut, kClustered>::kEighths;
    Planes planes{layout.x[kStage - 1], before.height, before.width, layout.inner[kStage], stage};
    if (executing) {
        Weights<kIn, 9, kEighths> weights;
        weights.load(weights.at(stage.entry, stage.entry_bias, slice, lane));
        convolve<kIn, kOut, 2, 3>(weights, {}, executing, planes);
    }
    Weights<kIn, 1, kEighths> weights;
    const auto* projection = static_cast<const unsigned char*>(stage.entry) + 9 * fragment_bytes(kIn, kOut);
    weights.load(weights.at(projection, stage.entry_bias + kOut, slice, lane));
    planes.to = layout.x[kStage];
    convolve<kIn, kOut, 2, 1>(weights, {}, all_images(), planes);
    if (executing) await_others<kOut>(stage, false);
    await_others<kOut>(stage, true);
    __syncthreads();
}

// run_block for all of a stage's residual blocks, each followed by its gate.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::run_stage() {
    constexpr int kChannels = stage_channels(kStage);
    constexpr int kEntry = kStage > 0;  // the first block's first convolution is not among `inner`
    using Own = Share<kChannels, kClustered>;
    using Inner = Weights<kChannels, 9, Own::kEighths>;
    const ResidentStage& stage = network.stage[kStage];
    const int convolutions = 2 * stage.blocks - kEntry, height = stage.height, width = stage.width;
    const int x = layout.x[kStage], inner = layout.inner[kStage];
    const auto source = [&](int number) {
        return Inner::at(
            static_cast<const unsigned char*>(stage.inner) + number * 9 * fragment_bytes(kChannels, kChannels),
            stage.inner_bias + number * kChannels, warp % Own::kSlices, lane, number < convolutions);
    };

    Inner weights;
    if (kEntry) enter_stage<kStage == 0 ? 1 : kStage>();
    weights.load(source(0));
    bool loaded = true;  // with the last block that was executed, or not at all
    for (int block = 0; block < stage.blocks; ++block) {
        const int end = 2 * (block + 1) - kEntry;  // the next block's first convolution
        if (executing) {
            if (!loaded) weights.load(source(end - 2));
            if (!kEntry || block > 0) {
                convolve<kChannels, kChannels, 1, 3>(weights, source(end - 1), executing,
                                                     {x, height, width, inner, stage});
                await_others<kChannels>(stage, false);
                __syncthreads();
            }
            convolve<kChannels, kChannels, 1, 3, true>(weights, source(end), executing,
                                                       {inner, height, width, x, stage});
            await_others<kChannels>(stage, true);
        }
        loaded = executing;
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
        for (int at = 4 * (threadIdx.x - 32 * kMaxImages); at < floats; at += 4 * (kThreads - 32 * kMaxImages)) {
            const int row = min(at / stage_channels(kStage), network.embed);  // behind them lies the bias
            const int added = embedding_row(stage_channels(kStage)) - stage_channels(kStage);
            cp_async16(embedding_place(gate) + at + row * added, from + at);
        }
    }
    cp_async_commit();
}

// Average over an image's pixels; or the share that some pieces have in it. So many of their sums, or zeros, are on
// their way while `meanwhile` is done.
template <typename Element, bool kClustered>
template <int kTogether, typename Meanwhile>
__device__ __forceinline__ float ForwardPass<Element, kClustered>::pooled(int stage, int i, int channel, int begin,
                                                                          int step, Meanwhile meanwhile) const {
    const ResidentStage& at = network.stage[stage];
    const int channels = stage_channels(stage);
    const float* sum = sums(i) + begin * channels + channel;
    float parts[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) parts[k] = load_shared(sum + k * step * channels);
    meanwhile();
#pragma unroll
    for (int half = kTogether / 2; half > 0; half /= 2)
#pragma unroll
        for (int k = 0; k < half; ++k) parts[k] += parts[k + half];
    float total = parts[0];
#pragma unroll 1
    for (int more = kTogether * step; begin + more < at.pieces; more += step)
        total += load_shared(sum + more * channels);
    return total * at.share;
}

// So many lanes share an LSTM unit, or an output of the embedding: each sums over a part of its inputs. `kSize` is the
// number of either where they are equal and known, so that no loop is left; 0 takes any, a lane for each.
template <int kSize>
constexpr int kSharers = kSize > 0 ? 32 / kSize : 1;

// A lane's place among them; the last lanes, if there are too many, do as the one before them.
template <int kSize>
__device__ inline int sharer(int lane, int units) {
    return min(lane, (kSize ? kSharers<kSize> * kSize : units) - 1);
}

// What a lane's share of some inputs, an input a lane, adds to its unit's four sums. `weights` is that of the unit and
// the first input.
template <int kSize>
__device__ inline void add_inputs(float4& sums, const float4* weights, float input, int inputs, int units, int share) {
    constexpr int kShare = kSharers<kSize>;
#pragma unroll(kSize ? kSize : 1)
    for (int k = 0; k < inputs; k += kShare) {
        const bool last = kShare > 1 && k + kShare > inputs && k + share >= inputs;  // not every lane has one more
        const int own = last ? 0 : k + share;
        const float4 weight = load_shared(weights + own * units);
        const float x = __shfl_sync(kAllLanes, input, own);
        sums.x += last ? 0.0f : weight.x * x;
        sums.y += last ? 0.0f : weight.y * x;
        sums.z += last ? 0.0f : weight.z * x;
        sums.w += last ? 0.0f : weight.w * x;
    }
}

// A unit's sum over the lanes that share it, in the first of them.
template <int kSize>
__device__ inline float over_sharers(float sum, int lane) {
    float all = sum;
#pragma unroll
    for (int other = 1; other < kSharers<kSize>; ++other)
        all += __shfl_sync(kAllLanes, sum, (lane + other * kSize) % 32);
    return all;
}

// The sum over the first kSize lanes, or over all of them, in the first one.
template <int kSize>
__device__ inline float over_units(float value, int lane) {
    if (kSize == 0) return warp_sum(value);
    static_assert(kSize % 2 == 0);
    const float two = value + __shfl_sync(kAllLanes, value, (lane + kSize / 2) % 32);
    float all = two;
#pragma unroll
    for (int k = 1; k < kSize / 2; ++k) all += __shfl_sync(kAllLanes, two, k);
    return all;
}

// Finishes an image's pool into this warp's features.
template <typename Element, bool kClustered>
template <int kStage, typename Meanwhile>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::pool_features(int i, Meanwhile meanwhile) const {
    constexpr int kChannels = stage_channels(kStage);
    constexpr int kLanes = kChannels < 32 ? kChannels : 32;  // that have a channel of their own; others share them
    constexpr int kTogether = kPooledTogether / (kChannels < 32 ? 32 : kChannels);
#pragma unroll
    for (int part = 0; part < kChannels; part += kLanes) {
        const int channel = part + lane % kLanes;
        float sum = pooled<kTogether>(kStage, i, channel, lane / kLanes, 32 / kLanes, [&] {
            if (part == 0) meanwhile();
        });
        if (kLanes < 32) sum += __shfl_xor_sync(kAllLanes, sum, kLanes);
        if (lane < kLanes) store_shared(features() + channel, sum);
    }
    __syncwarp();
}

// A lane's input to the LSTM: one of the outputs of a gate's embedding of this warp's features.
template <typename Element, bool kClustered>
template <int kStage, int kSize>
__device__ __forceinline__ float ForwardPass<Element, kClustered>::embedded(int gate) const {
    constexpr int kChannels = stage_channels(kStage), kPieces = kChannels / 4;
    constexpr int kShare = kSharers<kSize>;
    const int embed = kSize ? kSize : network.embed;
    const int one = sharer<kSize>(lane, embed);
    const int output = kSize ? one % kSize : one, share = kSize ? one / kSize : 0;
    const float* weights = embedding_place(gate);
    const auto* weight = reinterpret_cast<const float4*>(weights + output * embedding_row(kChannels));
    const auto* feature = reinterpret_cast<const float4*>(features());
    float4 sums{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kPieces; k += kShare) {
        const bool last = k + kShare > kPieces && k + share >= kPieces;  // not every lane has one more
        const int own = last ? 0 : k + share;
        const float4 w = load_shared(weight + own), x = load_shared(feature + own);
        sums.x += last ? 0.0f : w.x * x.x;
        sums.y += last ? 0.0f : w.y * x.y;
        sums.z += last ? 0.0f : w.z * x.z;
        sums.w += last ? 0.0f : w.w * x.w;
    }
    const float sum = (sums.x + sums.y) + (sums.z + sums.w);
    float all = load_shared(weights + embed * embedding_row(kChannels) + output);
#pragma unroll
    for (int other = 0; other < kShare; ++other)
        all += kShare > 1 ? __shfl_sync(kAllLanes, sum, output + other * kSize) : sum;
    return all;
}

// Pool-finish, embed, LSTM step, and who executes the next block. Warp i decides for image i, whose features are as
// they were unless its block has changed them. Then what they add to the LSTM's sums is known already: warp i +
// kMaxImages - 1 (or the last one) has computed it during the gate before, as it does now for the next one.
template <typename Element, bool kClustered>
template <int kStage, int kSize>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::rnn_gate(int block) {
    const int embed = kSize ? kSize : network.embed, units = kSize ? kSize : network.hidden;
    const int one = sharer<kSize>(lane, units);
    const int unit = kSize ? one % kSize : one, share = kSize ? one / kSize : 0;
    const bool looks_ahead = warp >= kMaxImages;
    const int i = (warp + looks_ahead) % kMaxImages;
    const bool changed = (kStage > 0 && block == 0) || (executing >> i & 1);
    // [embed + hidden + 1, hidden] of i, f, g, o
    const auto* lstm = reinterpret_cast<const float4*>(shared + layout.lstm) + unit;
    const auto embed_features = [&](int gate) {
        float4 sums{0.0f, 0.0f, 0.0f, 0.0f};
        add_inputs<kSize>(sums, lstm, embedded<kStage, kSize>(gate), embed, units, share);
        return sums;
    };
    // Warps wait for the block's output and sums each in its own code: which one it takes is then decided already.
    const auto await_block = [&] {
        if (executing) __syncthreads();
    };
    if (looks_ahead) {
        await_block();
        if (i < count) {
            if (changed) pool_features<kStage>(i, [] {});
            store_shared(ahead(i, index + 1) + lane, embed_features(index + 1));
        }
        fetch_embedding<kStage>(index + kEmbeddings - 1, block + kEmbeddings - 1);
        cp_async_wait<kEmbeddings - 3>();  // for those of the next gate and the one after
    } else if (i < count) {
        const auto* projection = reinterpret_cast<const float*>(lstm - unit + (embed + units + 1) * units);
        float4 sums{0.0f, 0.0f, 0.0f, 0.0f}, input;
        const auto recall = [&] {
            if (share == 0) sums = load_shared(lstm + (embed + units) * units);  // the bias
            add_inputs<kSize>(sums, lstm + embed * units, hidden, units, units, share);
        };
        if (changed) {
            await_block();
            pool_features<kStage>(i, recall);
            input = embed_features(index);
        } else {
            await_block();
            recall();
            input = load_shared(ahead(i, index) + lane);
        }
        const auto all = [&](float input, float sum) { return over_sharers<kSize>(input + sum, lane); };
        cell = fast_sigmoid(all(input.y, sums.y)) * cell +
               fast_sigmoid(all(input.x, sums.x)) * fast_tanh(all(input.z, sums.z));
        hidden = fast_sigmoid(all(input.w, sums.w)) * fast_tanh(cell);
        const float logit = over_units<kSize>(lane < units ? load_shared(projection + unit) * hidden : 0.0f, lane) +
                            load_shared(projection + units);
        const bool writes = lane == 0, decides = writes && !is_forced(index);
        if (writes) store_shared(logits(index) + i, logit);
        if (decides) store_shared(decisions(index) + i, executes_logit(logit));
    } else {
        await_block();
    }
    __syncthreads();
}

// The gate after a stage's block, and who runs the next one.
template <typename Element, bool kClustered>
template <int kStage>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::gate_step(int block) {
    if (index >= call.num_gates) {
        __syncthreads();
    } else {
        if (network.embed == 10 && network.hidden == 10)
            rnn_gate<kStage, 10>(block);
        else
            rnn_gate<kStage, 0>(block);
        executing = compact();
    }
    ++index;
}

// The images that a gate lets execute, as a mask: its four decisions are the bytes of a word, of which a product brings
// the last bits together.
template <typename Element, bool kClustered>
__device__ __forceinline__ unsigned ForwardPass<Element, kClustered>::compact() const {
    static_assert(kMaxImages == sizeof(unsigned));
    const unsigned decided = load_shared(reinterpret_cast<const unsigned*>(decisions(index))) & 0x01010101;
    return decided * 0x01020408 >> 24 & all_images();
}

// Of pieces that there are not, so that a pool need not ask. A stage has no fewer than the one before.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::clear_sums() {
    for (int at = layout.sums + 16 * threadIdx.x; at < layout.pooled; at += 16 * kThreads)
        store_shared(reinterpret_cast<uint4*>(shared + at), make_uint4(0, 0, 0, 0));
}

// Where decisions are forced, a gate finds them made.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::stage_forced_decisions() {
    for (int at = threadIdx.x; at < call.forced_count * count; at += kThreads) {
        const int gate = at / count, i = at % count;
        store_shared(
            decisions(gate) + i,
            call.forced[static_cast<std::size_t>(first_image() + i) * call.forced_image + gate * call.forced_gate]);
    }
}

// What the gates have found, all at once. A probability is on its decision's side of 0.5, whatever the last bit of an
// exponential function.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::write_decisions() const {
    for (int at = threadIdx.x; at < call.num_gates * count; at += kThreads) {
        const int gate = at / count, i = at % count;
        const std::size_t to = static_cast<std::size_t>(gate) * call.batch + first_image() + i;
        const float logit = load_shared(logits(gate) + i), probability = sigmoid(logit);
        call.gate_logits[to] = logit;
        call.probabilities[to] = executes_logit(logit) == executes(probability) ? probability
                                 : executes(probability)                        ? 0.5f
                                                                                : 0.5f + 0x1p-24f;
        call.executed[to] = load_shared(decisions(gate) + i);
    }
}

// Global average pool and classifier.
template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::head() {
    const int last = network.stages - 1, channels = stage_channels(last), classes = network.classes;
    auto* features = reinterpret_cast<float*>(shared + layout.pooled);  // [count, channels]
    for (int at = threadIdx.x; at < count * channels; at += kThreads)
        store_shared(features + at, pooled<4>(last, at / channels, at % channels, 0, 1, [] {}));
    __syncthreads();
    if (rank() > 0) return;
    write_decisions();
    for (int at = threadIdx.x; at < count * classes; at += kThreads) {
        const int i = at / classes, number = at % classes;
        float logit = network.head[channels * classes + number];
        for (int c = 0; c < channels; ++c)
            logit += network.head[c * classes + number] * load_shared(features + i * channels + c);
        static_cast<Element*>(call.logits)[static_cast<std::size_t>(first_image()) * classes + at] =
            from_float<Element>(logit);
    }
    if (warp < count && lane < network.hidden) {
        const std::size_t at = static_cast<std::size_t>(first_image() + warp) * network.hidden + lane;
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
    if (threadIdx.x == 0) store_shared(&control().first, first);
    __syncthreads();
    return count > 0;
}

template <typename Element, bool kClustered>
__device__ __forceinline__ void ForwardPass<Element, kClustered>::run(const Turns& turns) {
    clear_sums();
    if (kClustered) {
        if (threadIdx.x == 0) {
            for (StoreCounter& counter : control().exchanges) begin_counting(&counter);
            fence_counters();
        }
        cluster_arrive(), cluster_wait();  // nobody stores to a thread block before it counts
        if (rank() >= bands.sharers) return;
    }
    if (threadIdx.x < kZeroLines * kLine / 16)
        store_shared(reinterpret_cast<uint4*>(shared + kZeros + threadIdx.x / (kLine / 16) * kRow +
                                              threadIdx.x % (kLine / 16) * 16),
                     make_uint4(0, 0, 0, 0));
    if (threadIdx.x < 32) {
        const int right = lane / 4 - lane % 4 * 2;  // of a lane's two columns, the diagonal's place
        const unsigned two = pack<Element>(right == 0, right == 1);
        store_shared(control().identity + lane, make_uint4(two, 0, 0, two));
    }
    for (int at = threadIdx.x; at < lstm_floats(network); at += kThreads)
        store_shared(reinterpret_cast<float*>(shared + layout.lstm) + at, network.lstm[at]);
    for (int turn = static_cast<int>(blockIdx.x) / (kClustered ? cluster_size() : 1); take(turn, turns);) {
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
        clear_sums();
        if (threadIdx.x == 0) store_shared(&control().turn, turns.workers + atomicAdd(call.work_counter, 1));
        __syncthreads();
        turn = load_shared(&control().turn);
    }
}

template <typename Element, bool kClustered>
__global__ void __launch_bounds__(kThreads, 1)
    resident(const ResidentNetwork network, const ResidentCall call, const SharedLayout layout, const Turns turns,
             const Bands bands) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if (kClustered) return;  // never launched
#endif
    ForwardPass<Element, kClustered>{network,
                                     call,
                                     layout,
                                     bands,
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
        stage.regions = quotient_up(height, region_rows(channels)) * stage.strips;
        stage.pieces = quotient_up(height, band_rows(channels)) * stage.strips;
        stage.inverse = 65536 / stage.strips + 1;
        stage.whole = height % region_rows(channels) == 0 && width * channels * 2 == kRow;
        stage.inner = convolutions(static_cast<std::size_t>(inner) * 9 * fragment_bytes(channels, channels));
        stage.inner_bias = parameters(static_cast<std::size_t>(inner) * channels);
        if (network.embed)
            stage.embeddings = parameters(static_cast<std::size_t>(stage.blocks) * embedding_floats(network, number));
    }
    network.lstm = parameters(lstm_floats(network));
    network.head = parameters(static_cast<std::size_t>(stage_channels(network.stages - 1) + 1) * network.classes);
    return used;
}

int resident_shared_memory(const ResidentNetwork& network, int images) {
    return shared_layout(network, images, false).total;
}

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
    check(plan.cluster >= 1 && plan.cluster <= kMaxCluster, "plan: expected clusters of 1 to ", kMaxCluster, ", got ",
          plan.cluster);
    check(plan.cluster == 1 || (plan.images == 1 && !plan.dynamic), "plan: clusters take one image and one round");
    check(!plan.dynamic || call.work_counter, "work_counter: needed for ", call.batch, " images");
    check(network.element != ElementType::float32, "element: expected 16 bits");
    if (call.batch == 0) return;
    const SharedLayout layout = shared_layout(network, plan.images, plan.cluster > 1);
    const Grid grid{dim3(plan.blocks), dim3(kThreads), static_cast<std::size_t>(layout.total), plan.cluster, true};
    ResidentCall counted = call;
    if (call.forced) counted.forced_count = min(call.num_gates, network.blocks - 1);
    launch("resident", kernel_of(network, plan.cluster > 1), grid, stream, network, counted, layout,
           turns_of(call.batch, plan), bands_of(network, plan.cluster));
}

}  // namespace skipnet::cuda
