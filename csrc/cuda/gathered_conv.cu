// A convolution as an implicit matrix product: rows are output pixels, columns output channels, and K runs over the
// kernel's taps and, within one, the input channels. Where pooled sums are wanted, a tile of the product never reaches
// over two images; elsewhere rows are flat, the executing images' pixels one after the other, and only the last tile
// can be partly empty. A thread block goes through four steps:
//   Loader          cp.async brings K step after K step of both operands into a ring of stages
//   multiply        tensor cores, or float32 arithmetic, sum the products in registers
//   reduce_split_k  if K is split, the last thread block of a tile adds the others' partial sums
//   finish          bias, residual, ReLU, pooled sums
#include "gathered_conv.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../check.h"
#include "arrival.cuh"
#include "channels.cuh"
#include "divisor.cuh"
#include "gate_step.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kStages = 4;         // of the cp.async pipeline
constexpr int kChunk = 16;         // bytes of one cp.async
constexpr int kChunks = 4;         // of a row of a stage: K advances by 32 16-bit or 16 float32 elements
constexpr int kPooledPixels = 64;  // of a pooled tile, whatever the tile of the product is

// Sums over K are taken in ascending order; with splitK each slice of K is summed by itself, and slices are
// added in order.
template <typename ElementOf, int blockM, int blockN, int warpsM, int warpsN, bool splitK>
struct Tile {
    using Element = ElementOf;
    static constexpr int kBlockM = blockM, kBlockN = blockN, kWarpsN = warpsN;
    static constexpr int kThreads = 32 * warpsM * warpsN;
    static constexpr bool kSplitK = splitK;
    static constexpr bool kOnTensorCores = !std::is_same_v<Element, float>;
    static constexpr int kWarpM = blockM / warpsM, kWarpN = blockN / warpsN;  // a warp's part of the tile
    static constexpr int kSums = kWarpM * kWarpN / 32;                        // of a thread
    // Threads that a multiprocessor shall hold at least. Split-K needs a second set of sums, float32 products more
    // registers, and no kernel may spill on any architecture.
    static constexpr int kThreadsAtOnce = !kOnTensorCores || (kSums > 32 && (kSplitK || sizeof(Element) == 4)) ? 256
                                          : kSplitK                                                            ? 384
                                                                                                               : 512;
    static constexpr int kBlocksAtOnce = kThreadsAtOnce / kThreads;
    static constexpr int kPerChunk = kChunk / static_cast<int>(sizeof(Element));
    static constexpr int kBlockK = kChunks * kPerChunk;
    static constexpr int kStageBytes = (blockM + blockN) * kChunks * kChunk;
    // The product passes through shared memory on its way out: rows far enough apart for a warp's stores, which have
    // pairs of neighbours from tensor cores, and every 32 columns four floats of nothing for its loads, so that no bank
    // is met twice.
    static constexpr int kStagingStride =
        kOnTensorCores ? (blockN == 128 ? 152 : blockN + 8) : (blockN == 128 ? 156 : blockN + 4);
    static constexpr int kStagingBytes = blockM * kStagingStride * static_cast<int>(sizeof(float));
    static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kStagingBytes);
    // The epilogue's threads stand side by side over the columns and step over the rows.
    static constexpr int kColumns = blockN / kChannels, kRowsAtOnce = kThreads / kColumns;

    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp's part consists of pairs of 16x8 products");
    static_assert(blockM % kPooledPixels == 0 && kPooledPixels % kRowsAtOnce == 0, "pooled tiles are whole");
    static_assert(blockM * kChunks % kThreads == 0 && blockN * kChunks % kThreads == 0, "every thread loads as much");
    static_assert(kSharedBytes <= 99 * 1024, "what a block can have on every architecture");
    static_assert(kBlockN <= kThreads, "a thread finishes a column's pooled sum");

    // What is worth a register between K steps, where there are enough of them.
    __device__ static int keep(int value) { return sizeof(Element) == 2 ? in_register(value) : value; }
    // Whether the launch may evaluate gates in its tail. Only where every thread block has a multiprocessor for itself,
    // and its weights room beside the tile: with more tiles a launch of its own costs less than what every tile adds.
    static constexpr bool kHasTail = blockM == 64;
    static_assert(!kHasTail || kThreads == kGateThreads, "a thread block is one that takes a gate");
    // Where a column of the product lies in a staged row.
    __host__ __device__ static constexpr int staged(int column) { return column + column / 32 * 4; }
    static_assert(staged(kBlockN - 1) < kStagingStride, "a row has room for its columns");
};

// What a kernel gets: the call with everything worked out that does not depend on the count.
struct Arguments {
    const void* x;
    const void* weight;
    const float* bias;
    const void* residual;
    void* y;
    float* sums;
    const int* rows;   // null: all images in order
    const int* count;  // null: batch
    int batch, height, width, out;
    int kernel, stride, padding;              // of rows
    int stride_x, padding_x;                  // of columns
    int depth;                                // K
    Divisor in, columns;                      // channels, and the kernel's columns: K = kernel * columns * in
    Divisor out_width, out_pixels;            // of one image
    Divisor row_tiles, column_tiles, slices;  // of one image or, if they are flat, of all at most; of K
    int pooled_tiles;
    int max_slices;  // that can be in memory at a time
    PartialSums partial;
    GateTail gate;
    PublishedRnn rnn;  // its evaluation
    bool flat;         // tiles go on from one image to the next
    bool gathers, scatters;
    float least;  // of a result: 0 is the ReLU
};

// A tile of the product.
struct Place {
    int image, out_image;    // where its pixels are read, if rows are not flat; where they are written
    int first_row, end_row;  // of the product: pixels of that image or, if they are flat, of all; the end of all
    int first_channel;
};

// Where a chunk lies in a stage: rows of 64 bytes, chunks swizzled so that ldmatrix meets no bank twice. The swizzle
// is the same 8 rows further on: those offsets are constants.
__device__ int stage_offset(int row, int chunk) { return (row * kChunks + (chunk ^ (row / 2 % kChunks))) * kChunk; }
constexpr int kEightRows = 8 * kChunks * kChunk;

// One thread's part of bringing the operands in, K step after K step. It always loads the same chunk of a row, and K
// lies in memory in order but for the end of the kernel's row: in most steps it just moves on. Places in memory are
// counted in chunks, so that 32 bits reach far enough.
template <typename Tile>
class Loader {
    static constexpr int kRowStep = Tile::kThreads / kChunks;
    static constexpr int kRowsA = Tile::kBlockM / kRowStep, kRowsB = Tile::kBlockN / kRowStep;
    static constexpr int kRowBytes = kChunks * kChunk;

public:
    __device__ Loader(const Arguments& call, const Place& place, int first_step) : call_(call) {
        const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, column = place.first_channel + row;
        in_stage_ = Tile::keep(stage_offset(row, chunk));
        channel_ = first_step * Tile::kBlockK + chunk * Tile::kPerChunk;
        weight_ = (column * call.depth + channel_) / Tile::kPerChunk;
        tap_x_ = call.in.divide(channel_);
        tap_y_ = call.columns.divide(tap_x_);
        filled_ = 0;
#pragma unroll
        for (int i = 0; i < kRowsB; ++i)
            if (column + i * kRowStep < call.out) filled_ |= 1u << (kRowsA + i);
#pragma unroll
        for (int i = 0; i < kRowsA; ++i) {
            int pixel = place.first_row + row + i * kRowStep, image = place.image;
            const bool there = pixel < place.end_row;
            if (call.flat) {
                image = call.out_pixels.divide(pixel);
                if (call.rows && call.gathers && there) image = call.rows[image];
            }
            const int top = call.out_width.divide(pixel) * call.stride - call.padding;
            const int left = pixel * call.stride_x - call.padding_x;
            inside_[i] = there ? inside(top, call.kernel, call.height) | inside(left, call.columns.value(), call.width)
                                                                             << 16
                               : 0;
            x_[i] = ((image * call.height + top + tap_y_) * call.width + left + tap_x_) *
                        (call.in.value() / Tile::kPerChunk) +
                    channel_ / Tile::kPerChunk;
        }
        test();
    }

    // Starts loading the next K step. Where there is nothing to load the address has no meaning, and is not used.
    __device__ void load(unsigned char* stage) {
        stage += in_stage_;
#pragma unroll
        for (int i = 0; i < kRowsA; ++i) {
            cp_async16(stage + i * kRowStep * kRowBytes, at(call_.x, x_[i]), filled_ & 1u << i);
            x_[i] += kChunks;
        }
        stage += Tile::kBlockM * kRowBytes;
#pragma unroll
        for (int i = 0; i < kRowsB; ++i)
            cp_async16(stage + i * kRowStep * kRowBytes,
                       at(call_.weight, weight_ + i * kRowStep * (call_.depth / Tile::kPerChunk)),
                       filled_ & 1u << (kRowsA + i));
        weight_ += kChunks;
        channel_ += Tile::kBlockK;
        if (channel_ >= call_.in.value()) next_tap();
    }

private:
    __device__ static const void* at(const void* memory, unsigned chunk) {
        return static_cast<const uint4*>(memory) + chunk;
    }

    // Of a kernel's `taps` from `first` on, as bits, those that are within a side.
    __device__ static unsigned inside(int first, int taps, int side) {
        return (1u << min(taps, side - first)) - (1u << max(0, -first));
    }

    __device__ void next_tap() {
        do {
            channel_ -= call_.in.value();
            if (++tap_x_ < call_.columns.value()) continue;
            tap_x_ = 0;
            ++tap_y_;
#pragma unroll
            for (unsigned& x : x_) x += (call_.width - call_.columns.value()) * (call_.in.value() / Tile::kPerChunk);
        } while (channel_ >= call_.in.value());
        test();
    }

    // Which rows there are for the tap; none beyond K's end.
    __device__ void test() {
        if (tap_y_ >= call_.kernel) {
            filled_ = 0;
            return;
        }
        filled_ = filled_ >> kRowsA << kRowsA;
#pragma unroll
        for (int i = 0; i < kRowsA; ++i) filled_ |= (inside_[i] >> tap_y_ & inside_[i] >> (16 + tap_x_) & 1) << i;
    }

    static_assert(sizeof(uint4) == kChunk);
    const Arguments& call_;
    unsigned x_[kRowsA], weight_;  // chunks
    unsigned inside_[kRowsA];      // the taps that are inside of the image: rows, and columns from bit 16 on
    unsigned filled_;              // a bit for each row of the first operand, then of the second
    int in_stage_, channel_, tap_x_, tap_y_;
};

constexpr float kNegativeZero = -0.0f;  // what slices are added to: the only number that changes no other's bits

// A thread's sums of a tile, in whatever order its product has them.
template <typename Tile>
struct Sums {
    static constexpr int kFours = Tile::kSums / 4;
    float values[kFours][4];

    __device__ explicit Sums(float value) {
#pragma unroll
        for (auto& four : values)
            for (float& sum : four) sum = value;
    }
    __device__ void add(const Sums& others) {
#pragma unroll
        for (int i = 0; i < kFours; ++i)
            for (int j = 0; j < 4; ++j) values[i][j] += others.values[i][j];
    }

    // To memory and from it, past L1: other thread blocks write there, too.
    __device__ void store_partial(float* memory /* [kFours, kThreads, 4] */) const {
        auto* fours = reinterpret_cast<float4*>(memory) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < kFours; ++i)
            __stcg(fours + i * Tile::kThreads, {values[i][0], values[i][1], values[i][2], values[i][3]});
    }
    __device__ void add_partial(const float* memory) {
        const auto* fours = reinterpret_cast<const float4*>(memory) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float4 four = __ldcg(fours + i * Tile::kThreads);
            values[i][0] += four.x;
            values[i][1] += four.y;
            values[i][2] += four.z;
            values[i][3] += four.w;
        }
    }
};

// A warp's part of the product on tensor cores.
template <typename Tile>
class TensorCores {
public:
    __device__ TensorCores(int row, int column) : row_(row), column_(column) {
        const int lane = threadIdx.x % 32;
        a_ = Tile::keep(stage_offset(row + lane % 16, lane / 16));
        b_ = Tile::keep(stage_offset(column + lane / 16 * 8 + lane % 8, lane / 8 % 2));
    }

    __device__ void multiply(const unsigned char* a, const unsigned char* b, Sums<Tile>& sums) const {
#pragma unroll
        for (int k = 0; k < kChunks; k += 2) {  // 16 16-bit or 8 32-bit elements at a time
            unsigned left[kM][4], right[kN / 2][4];
            const unsigned char *from_a = a + (a_ ^ k * kChunk), *from_b = b + (b_ ^ k * kChunk);
#pragma unroll
            for (int m = 0; m < kM; ++m) ldmatrix_x4(from_a + m * 2 * kEightRows, left[m]);
#pragma unroll
            for (int n = 0; n < kN / 2; ++n) ldmatrix_x4(from_b + n * 2 * kEightRows, right[n]);
            if constexpr (kTf32) {
                for (auto& fragment : left) round(fragment);
                for (auto& fragment : right) round(fragment);
            }
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    const unsigned pair[2] = {right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]};
                    if constexpr (kTf32)
                        mma_m16n8k8_tf32(sums.values[m * kN + n], left[m], pair);
                    else
                        mma_m16n8k16<typename Tile::Element>(sums.values[m * kN + n], left[m], pair);
                }
        }
    }

    __device__ void store(const Sums<Tile>& sums, float* staging) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    store_shared(reinterpret_cast<float2*>(
                                     staging + (row_ + 16 * m + 8 * half + lane / 4) * Tile::kStagingStride +
                                     Tile::staged(column_ + 8 * n) + lane % 4 * 2),
                                 make_float2(sums.values[m * kN + n][2 * half], sums.values[m * kN + n][2 * half + 1]));
    }

private:
    static constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
    static constexpr bool kTf32 = std::is_same_v<typename Tile::Element, Tf32>;

    __device__ static void round(unsigned (&fragment)[4]) {
#pragma unroll
        for (unsigned& value : fragment) value = round_to_tf32(value);
    }

    int row_, column_;
    int a_, b_;  // where the lane reads in a stage; the next two chunks are at a place that differs in a bit
};

// The same in float32 arithmetic: a lane has every 8th row and every 4th column.
template <typename Tile>
class FusedMultiplyAdds {
public:
    __device__ FusedMultiplyAdds(int row, int column)
        : row_(row + threadIdx.x % 8), column_(column + threadIdx.x % 32 / 8) {}

    __device__ void multiply(const unsigned char* a, const unsigned char* b, Sums<Tile>& sums) const {
#pragma unroll 1
        for (int k = 0; k < kChunks; ++k) {  // 4 elements at a time
            const unsigned char* from_a = a + stage_offset(row_, k);
            const unsigned char* from_b[2] = {b + stage_offset(column_, k), b + stage_offset(column_ + 4, k)};
            float4 left[kM];
#pragma unroll
            for (int m = 0; m < kM; ++m)
                left[m] = load_shared(reinterpret_cast<const float4*>(from_a + m * kEightRows));
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                const float4 right = load_shared(reinterpret_cast<const float4*>(from_b[n % 2] + n / 2 * kEightRows));
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    float& sum = sums.values[m * kN / 4 + n / 4][n % 4];
                    sum = fmaf(left[m].x, right.x, sum);
                    sum = fmaf(left[m].y, right.y, sum);
                    sum = fmaf(left[m].z, right.z, sum);
                    sum = fmaf(left[m].w, right.w, sum);
                }
            }
        }
    }

    __device__ void store(const Sums<Tile>& sums, float* staging) const {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
                store_shared(staging + (row_ + 8 * m) * Tile::kStagingStride + Tile::staged(column_ + 4 * n),
                             sums.values[m * kN / 4 + n / 4][n % 4]);
    }

private:
    static constexpr int kM = Tile::kWarpM / 8, kN = Tile::kWarpN / 4;
    static_assert(kN % 4 == 0, "sums come in fours");
    int row_, column_;
};

// Leaves a slice's sums to the last of the tile's thread blocks. Whether this is the one; if so, with the total.
template <typename Tile>
__device__ bool reduce_split_k(const Arguments& call, int tile, int slice, Sums<Tile>& sums) {
    constexpr int kTileSums = Tile::kBlockM * Tile::kBlockN;
    const int slices = call.slices.value();
    float* partial = call.partial.sums + static_cast<std::int64_t>(tile) * slices * kTileSums;
    sums.store_partial(partial + slice * kTileSums);
    if (!comes_last(call.partial.arrivals + tile, slices)) return false;
    sums = Sums<Tile>(kNegativeZero);
#pragma unroll 2
    for (int i = 0; i < slices; ++i) sums.add_partial(partial + i * kTileSums);
    return true;
}

// From the product in shared memory: + bias + residual, ReLU, out; and, if wanted, the pooled sums of what was stored.
template <typename Tile, bool kPools>
__device__ void finish(const Arguments& call, float* staging, const Place& place) {
    using Element = std::conditional_t<sizeof(typename Tile::Element) == 4, float, typename Tile::Element>;
    constexpr int kRows = kPooledPixels / Tile::kRowsAtOnce;  // of a thread in a pooled tile
    constexpr int kAhead = sizeof(Element) == 2 ? kRows : 1;  // of the residual, loaded at once
    static_assert(kRows % kAhead == 0);
    const int column = threadIdx.x % Tile::kColumns * kChannels, first = threadIdx.x / Tile::kColumns;
    const int channel = place.first_channel + column;
    const int end = channel < call.out ? place.end_row : 0;
    float bias[kChannels] = {};
    if (end) Channels<float>::at(call.bias + channel).floats(bias);
#pragma unroll 1
    for (int pool_row = 0; pool_row < Tile::kBlockM; pool_row += kPooledPixels) {
        const int first_pixel = place.first_row + pool_row + first;
        const std::int64_t out =
            (static_cast<std::int64_t>(place.out_image) * call.out_pixels.value() + first_pixel) * call.out + channel;
        float sums[kChannels] = {};
        Channels<Element> residual[kAhead];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (call.residual && i % kAhead == 0) {
#pragma unroll
                for (int j = 0; j < kAhead; ++j)
                    if (first_pixel + (i + j) * Tile::kRowsAtOnce < end)
                        residual[j].load(static_cast<const Element*>(call.residual) + out +
                                         (i + j) * Tile::kRowsAtOnce * call.out);
            }
            if (first_pixel + i * Tile::kRowsAtOnce >= end) continue;
            const float* product = staging + (pool_row + first + i * Tile::kRowsAtOnce) * Tile::kStagingStride;
            float values[kChannels];
            Channels<float>::from_shared(product + Tile::staged(column)).floats(values);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) values[c] += bias[c];
            if (call.residual) {
                float added[kChannels];
                residual[i % kAhead].floats(added);
#pragma unroll
                for (int c = 0; c < kChannels; ++c) values[c] += added[c];
            }
            auto result = Channels<Element>::rounded(values);
            result.raise_to(call.least);
            result.store(static_cast<Element*>(call.y) + out + i * Tile::kRowsAtOnce * call.out);
            if constexpr (kPools) {
                result.floats(values);
#pragma unroll
                for (int c = 0; c < kChannels; ++c) sums[c] += values[c];
            }
        }
        if constexpr (kPools)  // into a place of the product that nobody but this thread reads
            Channels<float>(sums).to_shared(staging + (pool_row + first) * Tile::kStagingStride + Tile::staged(column));
    }
    if constexpr (kPools) {
        __syncthreads();
        const int mine = threadIdx.x;
        if (mine >= Tile::kBlockN || place.first_channel + mine >= call.out) return;
        for (int pool_row = 0; pool_row < Tile::kBlockM && place.first_row + pool_row < place.end_row;
             pool_row += kPooledPixels) {
            float sum = 0.0f;
#pragma unroll
            for (int row = 0; row < Tile::kRowsAtOnce; ++row)
                sum += load_shared(staging + (pool_row + row) * Tile::kStagingStride + Tile::staged(mine));
            const std::int64_t tile = static_cast<std::int64_t>(place.out_image) * call.pooled_tiles +
                                      (place.first_row + pool_row) / kPooledPixels;
            // Past L1, where the thread block looks for it that does the image's gate.
            __stcg(call.sums + tile * call.out + place.first_channel + mine, sum);
        }
    }
}

// The thread block's share of the weights into L2, while the grid before is still at work. A network's weights do not
// stay there from call to call. They are brought for layers that nobody executes, too: not yet known, and little.
template <typename Tile>
__device__ void prefetch_weights(const Arguments& call) {
    const std::int64_t chunks = static_cast<std::int64_t>(call.out) * (call.depth / Tile::kPerChunk);
    const int share = static_cast<int>((chunks + gridDim.x - 1) / gridDim.x);
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * share;
    if (threadIdx.x == 0 && first < chunks)
        prefetch_to_l2(static_cast<const uint4*>(call.weight) + first,
                       kChunk * static_cast<unsigned>(chunks - first < share ? chunks - first : share));
}

template <typename Tile, bool kGates>
__global__ void __launch_bounds__(Tile::kThreads, kGates ? 1 : Tile::kBlocksAtOnce)
    gathered_conv_kernel(Arguments call) {
    using Product = std::conditional_t<Tile::kOnTensorCores, TensorCores<Tile>, FusedMultiplyAdds<Tile>>;
    unsigned char* shared = shared_memory();  // [kStages, kStageBytes], then the product; behind it the gate's
    float* gate_shared = reinterpret_cast<float*>(shared + Tile::kSharedBytes);
    const PooledSums pooled{call.sums, call.pooled_tiles, call.out_pixels.value()};
    let_next_grid();
    prefetch_weights<Tile>(call);
    // An image that skips the block has kept its sums. Its thread block is one of those that have least to do: images
    // that skip leave the last ones without a tile.
    const int skipping = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    PublishedRnn::Ready ready;
    if constexpr (kGates) {
        call.rnn.stage(gate_shared);
        if (skipping < call.batch && call.gate.executed) ready = call.rnn.ready(pooled, skipping, gate_shared);
    }
    wait_for_previous_grid();
    const int count = call.count ? *call.count : call.batch, pixels = count * call.out_pixels.value();
    const int row_tiles = call.flat ? (pixels + Tile::kBlockM - 1) / Tile::kBlockM : count * call.row_tiles.value();
    const int tiles = row_tiles * call.column_tiles.value();
    const int steps = (call.depth + Tile::kBlockK - 1) / Tile::kBlockK;
    const int warp = kGates ? own_warp() : threadIdx.x / 32;
    // A thread block computes one slice of a tile if there are enough of them, otherwise all of its slices in turn.
    const bool splits = Tile::kSplitK && tiles * call.slices.value() <= call.max_slices;
    const int slices = Tile::kSplitK ? call.slices.value() : 1;
    const int items = splits ? tiles * slices : tiles;
    const int images = kGates ? images_of(call.gate.present, call.batch) : 0;
    const auto decide = [&](int image, int forced, const PublishedRnn::State& state, PublishedRnn::Sums& sums,
                            PublishedRnn::Weights& weights) {
        const float logit = call.rnn.logit(warp, pooled, image, gate_shared, state, sums, weights);
        decide_and_compact(warp, logit, forced, call.gate.decision, image, images, call.gate.list,
                           call.gate.arrivals + call.batch, gate_shared);
    };
    if constexpr (kGates) {
        if (images == 0 && blockIdx.x == 0 && threadIdx.x == 0) *call.gate.list.count = 0;
        if (skipping < images && call.gate.executed) {  // whether it skips is known when its sums are there
            const bool skips = !call.gate.executed[skipping];
            const int forced = forced_decision(call.gate.decision, skipping);
            const PublishedRnn::State state = call.rnn.state_of(skipping);
            PublishedRnn::Sums sums;
            call.rnn.load(sums, ready.sums);
            keep_order();
            if (skips) decide(skipping, forced, state, sums, ready.weights);
        }
    }
    // Computes a tile, or a slice of one; if it is an image's last one, its gate.
    const auto compute = [&](int item) {
        int first_slice = splits ? item : 0;
        const int tile = splits ? call.slices.divide(first_slice) : item;
        const int end_slice = splits ? first_slice + 1 : slices;
        int column_tile = tile, row_tile = call.column_tiles.divide(column_tile);
        Place place{0, 0, 0, pixels, column_tile * Tile::kBlockN};
        if (!call.flat) {
            const int index = call.row_tiles.divide(row_tile), image = call.rows ? call.rows[index] : index;
            place.image = call.gathers ? image : index;
            place.out_image = call.scatters ? image : index;
            place.end_row = call.out_pixels.value();
        }
        place.first_row = row_tile * Tile::kBlockM;

        int step = steps * first_slice / slices, loaded = step;
        const int last_step = steps * end_slice / slices;
        Loader<Tile> loader(call, place, step);
        const auto load_next = [&] {
            if (loaded < last_step) loader.load(shared + unsigned(loaded) % kStages * Tile::kStageBytes);
            ++loaded;
            cp_async_commit();
        };
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) load_next();
        const Product product(warp / Tile::kWarpsN * Tile::kWarpM, warp % Tile::kWarpsN * Tile::kWarpN);
        Sums<Tile> total(kNegativeZero);
#pragma unroll 1
        for (int slice = first_slice; slice < end_slice; ++slice) {
            Sums<Tile> sums(0.0f);
            const int end = steps * (slice + 1) / slices;
#pragma unroll 1
            for (; step < end; ++step) {
                cp_async_wait<kStages - 2>();
                __syncthreads();  // this step has landed for all, and all are done with the stage before
                load_next();
                const unsigned char* stage = shared + unsigned(step) % kStages * Tile::kStageBytes;
                product.multiply(stage, stage + Tile::kBlockM * kChunks * kChunk, sums);
            }
            total.add(sums);
        }
        if constexpr (Tile::kSplitK)
            if (splits && !reduce_split_k(call, tile, first_slice, total)) return;
        __syncthreads();  // the stages become the product's place; all of theirs has landed
        float* staging = reinterpret_cast<float*>(shared);
        product.store(total, staging);
        __syncthreads();
        if (kGates || call.sums)
            finish<Tile, true>(call, staging, place);
        else
            finish<Tile, false>(call, staging, place);
        if constexpr (!kGates) {
            __syncthreads();  // the product's place becomes the next tile's stages
        } else {              // whose weights landed with the first stage
            const int image = place.out_image, own_tiles = call.row_tiles.value() * call.column_tiles.value();
            PublishedRnn::Sums sums;
            const PublishedRnn::SumsAt sums_at = call.rnn.sums_of(pooled, image);
            const Arrival arrival(call.gate.arrivals + image, own_tiles);
            const int forced = forced_decision(call.gate.decision, image);
            const PublishedRnn::State state = call.rnn.state_of(image);
            PublishedRnn::Weights weights = call.rnn.weights(gate_shared);
            if (arrival.is_last()) {
                call.rnn.load(sums, sums_at);
                decide(image, forced, state, sums, weights);
            }
        }
    };
    if constexpr (kGates) {
        if (static_cast<int>(blockIdx.x) < items) compute(blockIdx.x);  // there is a thread block for each
        cp_async_wait<0>();                                             // where there was no gate, too
    } else {
        // Neighbouring thread blocks share an image's pixels: they meet in the cache.
        for (int item = blockIdx.x; item < items; item += gridDim.x) compute(item);
    }
}

int divided_up(int value, int by) { return (value + by - 1) / by; }

// How many tiles a product has.
template <typename Tile>
int tiles(int rows, int columns) {
    return divided_up(rows, Tile::kBlockM) * divided_up(columns, Tile::kBlockN);
}

// A call's rows: those of one image after the other, or of all as if they were one.
struct Rows {
    int images, of_each;

    template <typename Tile>
    int tiles(int columns) const {
        return images * cuda::tiles<Tile>(of_each, columns);
    }
};

template <typename Tile>
void launch_tiles(Arguments call, const Rows& rows, int slices, const GatheredConv& asked, Stream stream) {
    call.row_tiles = Divisor(divided_up(rows.of_each, Tile::kBlockM));
    call.column_tiles = Divisor(divided_up(call.out, Tile::kBlockN));
    if (!Tile::kSplitK) slices = 1;
    call.slices = Divisor(slices);
    constexpr int kMaxSlices = kPartialSums / (Tile::kBlockM * Tile::kBlockN);
    static_assert(kMaxSlices / 2 <= kPartialTiles, "there are at least two slices of a tile");
    const int most_blocks = rows.tiles<Tile>(call.out) * slices;
    const auto launch = [&](auto kernel, std::size_t shared) {
        allow_shared_memory(kernel);  // not by launches: those of one kernel take more or less, captured ones too
        const int resident = multiprocessors() * resident_blocks(kernel, Tile::kThreads, shared);
        call.max_slices = slices > 1 && call.partial.sums ? std::min(kMaxSlices, resident) : 0;
        Grid grid{std::min(most_blocks, resident), Tile::kThreads, shared};
        grid.allowed = true;
        grid.dependent = asked.dependent;
        cuda::launch("gathered_conv", kernel, grid, stream, call);
    };
    const GateTail& gate = call.gate;
    if constexpr (Tile::kHasTail) {
        if (asked.gate && most_blocks <= multiprocessors() && PublishedRnn::knows(gate.embedding, gate.lstm)) {
            call.rnn = PublishedRnn(gate.embedding, gate.lstm, gate.hidden, gate.cell);
            const int bytes = Tile::kSharedBytes + call.rnn.bytes();
            if (bytes <= shared_memory_limit()) return launch(gathered_conv_kernel<Tile, true>, bytes);
        }
    }
    launch(gathered_conv_kernel<Tile, false>, Tile::kSharedBytes);
    if (asked.gate)
        gate_step(gate.embedding, gate.lstm, call.batch, gate.present,
                  {call.sums, call.pooled_tiles, call.out_pixels.value()}, gate.hidden, gate.cell, gate.decision,
                  gate.list, gate.arrivals + call.batch, true, stream);
}

template <typename Element>
using Narrow = Tile<Element, 128, 32, 4, 1, false>;
template <typename Element>
using Small = Tile<Element, 64, 64, 2, 2, true>;
template <typename Element, bool splitK>
using Large = Tile<Element, 128, 128, 2, 4, splitK>;

// Into how many slices a layer's K is split, for an image of so many pixels. In small tiles with a thread block for
// every slice, a K step brings in 8 KiB and adding a slice 16 KiB, so steps / slices + 2 slices shall be least. More
// blocks than a GPU has multiprocessors bring little, and a short K is over before its slices are added.
template <typename Element>
int split_k_slices(const Convolution& layer, int pixels) {
    constexpr int kFewestSteps = 32, kMultiprocessors = 128;
    const int steps = divided_up(layer.depth(), Small<Element>::kBlockK);
    if (layer.out <= Narrow<Element>::kBlockN || steps < kFewestSteps) return 1;
    const int slices = static_cast<int>(std::sqrt(steps / 2));
    return std::max(1, std::min(slices, kMultiprocessors / tiles<Small<Element>>(pixels, layer.out)));
}

// Whether a product is too large for small tiles in both directions.
bool wants_large_tiles(int rows, int columns) { return rows > 64 && columns > 64; }

// The largest tile that still gives every multiprocessor one. Results do not depend on the choice: products are summed
// over K and pooled sums over pixels in the same order, except in the narrow tile, which the layer alone decides.
template <typename Element>
void launch_element(const Convolution& layer, const Arguments& call, const GatheredConv& asked, Stream stream) {
    using Serial = Large<Element, false>;
    using SplitK = Large<Element, true>;
    static_assert(Small<Element>::kBlockK == SplitK::kBlockK, "slices have as many steps");
    static_assert(Small<Element>::kRowsAtOnce == SplitK::kRowsAtOnce, "the order of pooled sums");
    const int pixels = call.out_pixels.value();
    const Rows rows = call.flat ? Rows{1, call.batch * pixels} : Rows{call.batch, pixels};
    const int slices = split_k_slices<Element>(layer, asked.pixels_are_images ? 1 : pixels);
    if (call.out <= Narrow<Element>::kBlockN) return launch_tiles<Narrow<Element>>(call, rows, slices, asked, stream);
    if (!wants_large_tiles(rows.of_each, call.out) || rows.tiles<Serial>(call.out) < multiprocessors())
        return launch_tiles<Small<Element>>(call, rows, slices, asked, stream);
    if (slices > 1) return launch_tiles<SplitK>(call, rows, slices, asked, stream);
    launch_tiles<Serial>(call, rows, slices, asked, stream);
}

// Floats of a call's partial sums, whatever its tiles are and whether its rows are flat.
template <typename Element>
std::int64_t all_partial_sums(const Convolution& layer, int batch, int pixels) {
    const int slices = split_k_slices<Element>(layer, pixels);
    if (slices == 1) return 0;
    const auto sums = [&](auto tile, int images, int rows) {
        using Tile = decltype(tile);
        return static_cast<std::int64_t>(slices) * images * tiles<Tile>(rows, layer.out) * Tile::kBlockM *
               Tile::kBlockN;
    };
    std::int64_t most = sums(Small<Element>{}, batch, pixels);
    if (wants_large_tiles(batch * pixels, layer.out))
        most = std::max(most, sums(Large<Element, true>{}, 1, batch * pixels));
    if (wants_large_tiles(pixels, layer.out)) most = std::max(most, sums(Large<Element, true>{}, batch, pixels));
    return most;
}

// work(Element{}) for the type that kernels know.
template <typename Work>
auto with_element(ElementType type, Work work) {
    switch (type) {
        case ElementType::float16:
            return work(Half{});
        case ElementType::bfloat16:
            return work(Bfloat16{});
        case ElementType::tf32:
            return work(Tf32{});
        case ElementType::float32:
            break;
    }
    return work(float{});
}

}  // namespace

int partial_sums(ElementType type, const Convolution& layer, int batch, int height, int width) {
    const int pixels = layer.out_side(height) * layer.out_side(width);
    const std::int64_t sums =
        with_element(type, [&](auto element) { return all_partial_sums<decltype(element)>(layer, batch, pixels); });
    return static_cast<int>(std::min<std::int64_t>(sums, kPartialSums));
}

int pooled_tiles(const Convolution& layer, int height, int width) {
    return (layer.out_side(height) * layer.out_side(width) + kPooledPixels - 1) / kPooledPixels;
}

void gathered_conv(ElementType type, const Convolution& layer, const GatheredConv& call, Stream stream) {
    check(layer.in >= 8 && layer.in % 8 == 0 && layer.out >= 8 && layer.out % 8 == 0,
          "channels: expected multiples of 8, got ", layer.in, " and ", layer.out);
    check(!layer.pairs || layer.stride == 2, "pairs: expected stride 2, got ", layer.stride);
    check(layer.kernel % 2 == 1 && layer.stride >= 1, "kernel and stride: expected an odd kernel, got ", layer.kernel,
          " and ", layer.stride);
    check(layer.kernel <= 15, "kernel: expected 15 at most, got ", layer.kernel);
    check(call.batch >= 0 && call.height >= 1 && call.width >= 1, "x: got ", call.batch, " images of ", call.height,
          "x", call.width);
    check(!call.gate || (call.sums && (call.scatters || !call.list || !call.list->rows)),
          "gate: expected pooled sums, at the images' places");
    if (call.batch == 0) return;
    const int out_width = layer.out_side(call.width), out_pixels = layer.out_side(call.height) * out_width;
    check(static_cast<std::int64_t>(call.batch) * std::max(out_pixels, call.height * call.width) < 1ll << 31,
          "x: expected less than 2^31 pixels, got ", call.batch, " images of ", call.height, "x", call.width);
    Arguments arguments{};
    arguments.x = call.x;
    arguments.weight = layer.weight;
    arguments.bias = layer.bias;
    arguments.residual = call.residual;
    arguments.y = call.y;
    arguments.sums = call.sums;
    arguments.rows = call.list ? call.list->rows : nullptr;
    arguments.count = call.list ? call.list->count : nullptr;
    arguments.batch = call.batch;
    arguments.height = call.height;
    arguments.width = layer.pairs ? divided_up(call.width, 2) : call.width;
    arguments.out = layer.out;
    arguments.kernel = layer.kernel;
    arguments.stride = layer.stride;
    arguments.padding = layer.kernel / 2;
    arguments.stride_x = layer.pairs ? 1 : layer.stride;
    arguments.padding_x = layer.pairs ? divided_up(layer.kernel / 2, 2) : layer.kernel / 2;
    arguments.depth = layer.depth();
    arguments.in = Divisor(layer.in);
    arguments.columns = Divisor(layer.columns());
    arguments.out_width = Divisor(out_width);
    arguments.out_pixels = Divisor(out_pixels);
    arguments.pooled_tiles = pooled_tiles(layer, call.height, call.width);
    arguments.partial = call.partial;
    if (call.gate) arguments.gate = *call.gate;
    arguments.flat = !call.sums && !(call.scatters && arguments.rows);
    arguments.gathers = call.gathers;
    arguments.scatters = call.scatters;
    arguments.least = call.relu ? 0.0f : -INFINITY;
    with_element(type, [&](auto element) { launch_element<decltype(element)>(layer, arguments, call, stream); });
}

}  // namespace skipnet::cuda
