// A convolution as an implicit matrix product: rows are an image's output pixels, columns output channels, and K runs
// over the kernel's taps and, within one, the input channels. A tile of the product never reaches over two images, so
// that pooled sums are an image's own. A thread block goes through four steps:
//   Loader          cp.async brings K step after K step of both operands into a ring of stages
//   multiply        tensor cores, or float32 arithmetic, sum the products in registers
//   reduce_split_k  if K is split, the last thread block of a tile adds the others' partial sums
//   finish          bias, residual, ReLU, pooled sums
#include "gathered_conv.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../check.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kStages = 4;         // of the cp.async pipeline
constexpr int kChunk = 16;         // bytes of one cp.async
constexpr int kChunks = 4;         // of a row of a stage: K advances by 32 16-bit or 16 float32 elements
constexpr int kPooledPixels = 64;  // of a pooled tile, whatever the tile of the product is
constexpr int kPack = 8;           // channels that a thread of the epilogue takes together

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
    // registers, and no kernel may spill.
    static constexpr int kBlocksAtOnce = (!kOnTensorCores || (kSplitK && kSums > 32) ? 256 : 512) / kThreads;
    static constexpr int kPerChunk = kChunk / static_cast<int>(sizeof(Element));
    static constexpr int kBlockK = kChunks * kPerChunk;
    static constexpr int kStageBytes = (blockM + blockN) * kChunks * kChunk;
    // The product passes through shared memory on its way out. 8 floats of padding: no bank conflicts.
    static constexpr int kStagingStride = blockN + 8;
    static constexpr int kStagingBytes = blockM * kStagingStride * static_cast<int>(sizeof(float));
    static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kStagingBytes);
    // The epilogue's threads stand side by side over the columns and step over the rows.
    static constexpr int kColumns = blockN / kPack, kRowsAtOnce = kThreads / kColumns;

    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp's part consists of pairs of 16x8 products");
    static_assert(blockM % kPooledPixels == 0 && kPooledPixels % kRowsAtOnce == 0, "pooled tiles are whole");
    static_assert(blockM * kChunks % kThreads == 0 && blockN * kChunks % kThreads == 0, "every thread loads as much");
    static_assert(kSharedBytes <= 99 * 1024, "what a block can have on every architecture");
    static_assert(kBlockN <= kThreads, "a thread finishes a column's pooled sum");
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
    int batch, height, width, in, out, kernel, stride;
    int out_width, out_pixels;
    int row_tiles, column_tiles, pooled_tiles;  // of one image
    int slices;                                 // of K
    int max_slices;                             // that can be in memory at a time
    PartialSums partial;
    bool gathers, scatters, relu;
};

// Where a chunk lies in a stage: rows of 64 bytes, chunks swizzled so that ldmatrix meets no bank twice. The swizzle
// is the same 8 rows further on: those offsets are constants.
__device__ int stage_offset(int row, int chunk) { return (row * kChunks + (chunk ^ (row / 2 % kChunks))) * kChunk; }
constexpr int kEightRows = 8 * kChunks * kChunk;

// One thread's part of bringing the operands in, K step after K step. It always loads the same chunk of a row.
template <typename Tile>
class Loader {
    using Element = typename Tile::Element;
    static constexpr int kRowStep = Tile::kThreads / kChunks;
    static constexpr int kRowsA = Tile::kBlockM / kRowStep, kRowsB = Tile::kBlockN / kRowStep;

public:
    __device__ Loader(const Arguments& call, int image, int first_pixel, int first_channel, int first_step)
        : call_(call), row_(threadIdx.x / kChunks), chunk_(threadIdx.x % kChunks), first_channel_(first_channel) {
        x_ =
            static_cast<const Element*>(call.x) + static_cast<std::int64_t>(image) * call.height * call.width * call.in;
#pragma unroll
        for (int i = 0; i < kRowsA; ++i) {
            const int pixel = first_pixel + row_ + i * kRowStep;
            const int y = pixel / call.out_width, x = pixel % call.out_width;
            // A pixel past the image's end is above its top for every tap.
            top_[i] = pixel < call.out_pixels ? y * call.stride - call.kernel / 2 : -call.kernel;
            left_[i] = x * call.stride - call.kernel / 2;
        }
        channel_ = first_step * Tile::kBlockK + chunk_ * Tile::kPerChunk;
        settle();
    }

    // Starts loading the next K step.
    __device__ void load(unsigned char* stage) {
        const bool inside = tap_y_ < call_.kernel;
#pragma unroll
        for (int i = 0; i < kRowsA; ++i) {
            const int y = top_[i] + tap_y_, x = left_[i] + tap_x_;
            const bool filled = inside && y >= 0 && y < call_.height && x >= 0 && x < call_.width;
            const Element* from = filled ? x_ + (y * call_.width + x) * call_.in + channel_ : x_;
            cp_async16(stage + stage_offset(row_ + i * kRowStep, chunk_), from, filled);
        }
        stage += Tile::kBlockM * kChunks * kChunk;
        const Element* weight = static_cast<const Element*>(call_.weight);
        const int taps = call_.kernel * call_.kernel, tap = tap_y_ * call_.kernel + tap_x_;
#pragma unroll
        for (int i = 0; i < kRowsB; ++i) {
            const int column = first_channel_ + row_ + i * kRowStep;
            const bool filled = inside && column < call_.out;
            const Element* from =
                filled ? weight + (static_cast<std::int64_t>(column) * taps + tap) * call_.in + channel_ : weight;
            cp_async16(stage + stage_offset(row_ + i * kRowStep, chunk_), from, filled);
        }
        channel_ += Tile::kBlockK;
        settle();
    }

private:
    // Moves on by taps until the channel is one.
    __device__ void settle() {
        while (channel_ >= call_.in) {
            channel_ -= call_.in;
            if (++tap_x_ == call_.kernel) {
                tap_x_ = 0;
                ++tap_y_;
            }
        }
    }

    const Arguments& call_;
    const Element* x_;
    int row_, chunk_, first_channel_, channel_, tap_x_ = 0, tap_y_ = 0;
    int top_[kRowsA], left_[kRowsA];
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
    __device__ TensorCores(int row, int column) : row_(row), column_(column) {}

    __device__ void multiply(const unsigned char* a, const unsigned char* b, Sums<Tile>& sums) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < kChunks; k += 2) {  // 16 16-bit or 8 32-bit elements at a time
            unsigned left[kM][4], right[kN / 2][4];
            const unsigned char* from_a = a + stage_offset(row_ + lane % 16, k + lane / 16);
            const unsigned char* from_b = b + stage_offset(column_ + lane / 16 * 8 + lane % 8, k + lane / 8 % 2);
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
                    *reinterpret_cast<float2*>(staging + (row_ + 16 * m + 8 * half + lane / 4) * Tile::kStagingStride +
                                               column_ + 8 * n + lane % 4 * 2) =
                        make_float2(sums.values[m * kN + n][2 * half], sums.values[m * kN + n][2 * half + 1]);
    }

private:
    static constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
    static constexpr bool kTf32 = std::is_same_v<typename Tile::Element, Tf32>;

    __device__ static void round(unsigned (&fragment)[4]) {
#pragma unroll
        for (unsigned& value : fragment) value = round_to_tf32(value);
    }

    int row_, column_;
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
            for (int m = 0; m < kM; ++m) left[m] = *reinterpret_cast<const float4*>(from_a + m * kEightRows);
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                const float4 right = *reinterpret_cast<const float4*>(from_b[n % 2] + n / 2 * kEightRows);
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
                staging[(row_ + 8 * m) * Tile::kStagingStride + column_ + 4 * n] =
                    sums.values[m * kN / 4 + n / 4][n % 4];
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
    float* partial = call.partial.sums + static_cast<std::int64_t>(tile) * call.slices * kTileSums;
    sums.store_partial(partial + slice * kTileSums);
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();  // the block's sums before its arrival
        last = atomicAdd(call.partial.arrivals + tile, 1) == call.slices - 1;
    }
    if (!__syncthreads_or(last)) return false;
    __threadfence();  // all arrivals before the others' sums
    if (threadIdx.x == 0) call.partial.arrivals[tile] = 0;
    sums = Sums<Tile>(kNegativeZero);
#pragma unroll 2
    for (int i = 0; i < call.slices; ++i) sums.add_partial(partial + i * kTileSums);
    return true;
}

// kPack neighbouring channels, to and from memory in units of 16 bytes.
template <typename Element>
struct alignas(16) Pack {
    Element values[kPack];

    __device__ static Pack from(const Element* memory) { return *reinterpret_cast<const Pack*>(memory); }
    __device__ void to(Element* memory) const { *reinterpret_cast<Pack*>(memory) = *this; }
};

// From the product in shared memory: + bias + residual, ReLU, out; and the pooled sums of what was stored.
template <typename Tile>
__device__ void finish(const Arguments& call, float* staging, int image, int first_pixel, int first_channel) {
    using Element = typename Tile::Element;
    const int column = threadIdx.x % Tile::kColumns * kPack, first_row = threadIdx.x / Tile::kColumns;
    const int channel = first_channel + column;
    float bias[kPack] = {};
    if (channel < call.out) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) bias[i] = call.bias[channel + i];
    }
#pragma unroll 1
    for (int pool_row = 0; pool_row < Tile::kBlockM; pool_row += kPooledPixels) {
        float sums[kPack] = {};
#pragma unroll 2
        for (int row = pool_row + first_row; row < pool_row + kPooledPixels; row += Tile::kRowsAtOnce) {
            const int pixel = first_pixel + row;
            if (pixel >= call.out_pixels || channel >= call.out) continue;
            const std::int64_t place =
                (static_cast<std::int64_t>(image) * call.out_pixels + pixel) * call.out + channel;
            const float* product = staging + row * Tile::kStagingStride + column;
            Pack<Element> result, residual{};
            if (call.residual) residual = Pack<Element>::from(static_cast<const Element*>(call.residual) + place);
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
                float value = product[i] + bias[i];
                if (call.residual) value += to_float(residual.values[i]);
                if (call.relu && value < 0.0f) value = 0.0f;
                result.values[i] = from_float<Element>(value);
                sums[i] += to_float(result.values[i]);
            }
            result.to(static_cast<Element*>(call.y) + place);
        }
        if (!call.sums) continue;
        // Into a place of the product that nobody but this thread reads.
#pragma unroll
        for (int i = 0; i < kPack; ++i) staging[(pool_row + first_row) * Tile::kStagingStride + column + i] = sums[i];
    }
    if (!call.sums) return;
    __syncthreads();
    const int mine = threadIdx.x;
    if (mine >= Tile::kBlockN || first_channel + mine >= call.out) return;
    for (int pool_row = 0; pool_row < Tile::kBlockM && first_pixel + pool_row < call.out_pixels;
         pool_row += kPooledPixels) {
        float sum = 0.0f;
        for (int row = 0; row < Tile::kRowsAtOnce; ++row)
            sum += staging[(pool_row + row) * Tile::kStagingStride + mine];
        const std::int64_t tile =
            static_cast<std::int64_t>(image) * call.pooled_tiles + (first_pixel + pool_row) / kPooledPixels;
        call.sums[tile * call.out + first_channel + mine] = sum;
    }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce) gathered_conv_kernel(Arguments call) {
    using Product = std::conditional_t<Tile::kOnTensorCores, TensorCores<Tile>, FusedMultiplyAdds<Tile>>;
    unsigned char* shared = shared_memory();  // [kStages, kStageBytes], then the product
    const int count = call.count ? *call.count : call.batch;
    const int tiles = count * call.row_tiles * call.column_tiles;
    const int steps = (call.kernel * call.kernel * call.in + Tile::kBlockK - 1) / Tile::kBlockK;
    const int warp = threadIdx.x / 32;
    // A thread block computes one slice of a tile if there are enough of them, otherwise all of its slices in turn.
    const bool splits = Tile::kSplitK && tiles * call.slices <= call.max_slices;
    const int slices = Tile::kSplitK ? call.slices : 1, share = splits ? slices : 1;  // thread blocks of a tile
    // Neighbouring thread blocks share an image's pixels: they meet in the cache.
    for (int item = blockIdx.x; item < tiles * share; item += gridDim.x) {
        const int tile = item / share;
        const int first_slice = item % share, end_slice = splits ? first_slice + 1 : slices;
        const int first_channel = tile % call.column_tiles * Tile::kBlockN;
        const int first_pixel = tile / call.column_tiles % call.row_tiles * Tile::kBlockM;
        const int index = tile / call.column_tiles / call.row_tiles;
        const int row = call.rows ? call.rows[index] : index;

        int step = steps * first_slice / slices, loaded = step;
        const int last_step = steps * end_slice / slices;
        Loader<Tile> loader(call, call.gathers ? row : index, first_pixel, first_channel, step);
        const auto load_next = [&] {
            if (loaded < last_step) loader.load(shared + loaded % kStages * Tile::kStageBytes);
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
                const unsigned char* stage = shared + step % kStages * Tile::kStageBytes;
                product.multiply(stage, stage + Tile::kBlockM * kChunks * kChunk, sums);
            }
            total.add(sums);
        }
        if constexpr (Tile::kSplitK)
            if (splits && !reduce_split_k(call, tile, first_slice, total)) continue;
        __syncthreads();  // the stages become the product's place; all of theirs has landed
        float* staging = reinterpret_cast<float*>(shared);
        product.store(total, staging);
        __syncthreads();
        finish<Tile>(call, staging, call.scatters ? row : index, first_pixel, first_channel);
        __syncthreads();  // the product's place becomes the next tile's stages
    }
}

template <typename Tile>
void launch_tiles(Arguments call, Stream stream) {
    call.row_tiles = (call.out_pixels + Tile::kBlockM - 1) / Tile::kBlockM;
    call.column_tiles = (call.out + Tile::kBlockN - 1) / Tile::kBlockN;
    const auto kernel = gathered_conv_kernel<Tile>;
    const int resident = multiprocessors() * resident_blocks(kernel, Tile::kThreads, Tile::kSharedBytes);
    constexpr int kMaxSlices = kPartialSums / (Tile::kBlockM * Tile::kBlockN);
    static_assert(kMaxSlices / 2 <= kPartialTiles, "there are at least two slices of a tile");
    call.max_slices = call.slices > 1 && call.partial.sums ? std::min(kMaxSlices, resident) : 0;
    const int blocks = std::min(call.batch * call.row_tiles * call.column_tiles * call.slices, resident);
    launch("gathered_conv", kernel, {blocks, Tile::kThreads, Tile::kSharedBytes}, stream, call);
}

template <typename Element>
using Narrow = Tile<Element, 128, 32, 4, 1, false>;
template <typename Element>
using Small = Tile<Element, 64, 64, 2, 2, true>;
template <typename Element, bool splitK>
using Large = Tile<Element, 128, 128, 2, 4, splitK>;

// How many tiles an image's product has.
template <typename Tile>
int tiles(int pixels, int channels) {
    return (pixels + Tile::kBlockM - 1) / Tile::kBlockM * ((channels + Tile::kBlockN - 1) / Tile::kBlockN);
}

// Into how many slices a layer's K is split, for an image of so many pixels. In small tiles with a thread block for
// every slice, a K step brings in 8 KiB and adding a slice 16 KiB, so steps / slices + 2 slices shall be least. More
// blocks than a GPU has multiprocessors bring little, and a short K is over before its slices are added.
template <typename Element>
int split_k_slices(const Convolution& layer, int pixels) {
    constexpr int kFewestSteps = 32, kMultiprocessors = 128;
    const int steps = (layer.kernel * layer.kernel * layer.in + Small<Element>::kBlockK - 1) / Small<Element>::kBlockK;
    if (layer.out <= Narrow<Element>::kBlockN || steps < kFewestSteps) return 1;
    const int slices = static_cast<int>(std::sqrt(steps / 2));
    return std::max(1, std::min(slices, kMultiprocessors / tiles<Small<Element>>(pixels, layer.out)));
}

// Whether a product is too large for small tiles in both directions.
bool wants_large_tiles(int pixels, int channels) { return pixels > 64 && channels > 64; }

// The largest tile that still gives every multiprocessor one. Results do not depend on the choice: products are summed
// over K and pooled sums over pixels in the same order, except in the narrow tile, which the layer alone decides.
template <typename Element>
void launch_element(const Convolution& layer, Arguments call, bool pixels_are_images, Stream stream) {
    using Serial = Large<Element, false>;
    using SplitK = Large<Element, true>;
    static_assert(Small<Element>::kBlockK == SplitK::kBlockK, "slices have as many steps");
    static_assert(Small<Element>::kRowsAtOnce == SplitK::kRowsAtOnce, "the order of pooled sums");
    call.slices = split_k_slices<Element>(layer, pixels_are_images ? 1 : call.out_pixels);
    if (call.out <= Narrow<Element>::kBlockN) return launch_tiles<Narrow<Element>>(call, stream);
    if (!wants_large_tiles(call.out_pixels, call.out) ||
        call.batch * tiles<Serial>(call.out_pixels, call.out) < multiprocessors())
        return launch_tiles<Small<Element>>(call, stream);
    if (call.slices > 1) return launch_tiles<SplitK>(call, stream);
    launch_tiles<Serial>(call, stream);
}

// Floats of an image's partial sums, in either tile.
template <typename Element>
int partial_sums_per_image(const Convolution& layer, int pixels) {
    const auto sums = [&](auto tile) {
        using Tile = decltype(tile);
        return tiles<Tile>(pixels, layer.out) * Tile::kBlockM * Tile::kBlockN;
    };
    const int slices = split_k_slices<Element>(layer, pixels), small = sums(Small<Element>{});
    if (slices == 1) return 0;
    return slices * (wants_large_tiles(pixels, layer.out) ? std::max(small, sums(Large<Element, true>{})) : small);
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
    const std::int64_t one =
        with_element(type, [&](auto element) { return partial_sums_per_image<decltype(element)>(layer, pixels); });
    return static_cast<int>(std::min<std::int64_t>(batch * one, kPartialSums));
}

int pooled_tiles(const Convolution& layer, int height, int width) {
    return (layer.out_side(height) * layer.out_side(width) + kPooledPixels - 1) / kPooledPixels;
}

void gathered_conv(ElementType type, const Convolution& layer, const GatheredConv& call, Stream stream) {
    check(layer.in >= 8 && layer.in % 8 == 0 && layer.out >= 8 && layer.out % 8 == 0,
          "channels: expected multiples of 8, got ", layer.in, " and ", layer.out);
    check(layer.kernel % 2 == 1 && layer.stride >= 1, "kernel and stride: expected an odd kernel, got ", layer.kernel,
          " and ", layer.stride);
    check(call.batch >= 0 && call.height >= 1 && call.width >= 1, "x: got ", call.batch, " images of ", call.height,
          "x", call.width);
    if (call.batch == 0) return;
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
    arguments.width = call.width;
    arguments.in = layer.in;
    arguments.out = layer.out;
    arguments.kernel = layer.kernel;
    arguments.stride = layer.stride;
    arguments.out_width = layer.out_side(call.width);
    arguments.out_pixels = layer.out_side(call.height) * arguments.out_width;
    arguments.pooled_tiles = pooled_tiles(layer, call.height, call.width);
    arguments.partial = call.partial;
    arguments.gathers = call.gathers;
    arguments.scatters = call.scatters;
    arguments.relu = call.relu;
    with_element(type, [&](auto element) {
        launch_element<decltype(element)>(layer, arguments, call.pixels_are_images, stream);
    });
}

}  // namespace skipnet::cuda
