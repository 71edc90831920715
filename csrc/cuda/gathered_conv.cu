#include "gathered_conv.h"

#include <algorithm>
#include <type_traits>

#include "../check.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace skipnet::cuda {
namespace {

// An implicit matrix product: rows are an image's output pixels, columns output channels, and K runs over the kernel's
// taps and, within one, the input channels. A tile of the product never reaches over two images, so that pooled sums
// are an image's own.

constexpr int kStages = 4;         // of the cp.async pipeline
constexpr int kChunk = 16;         // bytes of one cp.async
constexpr int kChunks = 4;         // of a row of a stage: K advances by 32 16-bit or 16 float32 elements
constexpr int kPooledPixels = 64;  // of a pooled tile, whatever the tile of the product is
constexpr int kPack = 8;           // channels that a thread of the epilogue takes together

template <typename ElementOf, int blockM, int blockN, int warpsM, int warpsN>
struct Tile {
    using Element = ElementOf;
    static constexpr int kBlockM = blockM, kBlockN = blockN, kWarpsN = warpsN;
    static constexpr int kThreads = 32 * warpsM * warpsN;
    // What a multiprocessor shall hold at least: float32 products need more registers, and no kernel may spill.
    static constexpr int kBlocksAtOnce = (sizeof(Element) == 4 ? 256 : 512) / kThreads;
    static constexpr int kWarpM = blockM / warpsM, kWarpN = blockN / warpsN;  // a warp's part of the tile
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
    bool gathers, scatters, relu;
};

// Where a chunk lies in a stage: rows of 64 bytes, chunks exchanged so that ldmatrix meets no bank twice. The exchange
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
    __device__ Loader(const Arguments& call, int image, int first_pixel, int first_channel)
        : call_(call), row_(threadIdx.x / kChunks), chunk_(threadIdx.x % kChunks), first_channel_(first_channel) {
        x_ = static_cast<const Element*>(call.x) +
             static_cast<std::int64_t>(image) * call.height * call.width * call.in;
#pragma unroll
        for (int i = 0; i < kRowsA; ++i) {
            const int pixel = first_pixel + row_ + i * kRowStep;
            const int y = pixel / call.out_width, x = pixel % call.out_width;
            // A pixel past the image's end is above its top for every tap.
            top_[i] = pixel < call.out_pixels ? y * call.stride - call.kernel / 2 : -call.kernel;
            left_[i] = x * call.stride - call.kernel / 2;
        }
        channel_ = chunk_ * Tile::kPerChunk;
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
            const Element* from = filled ? weight + (static_cast<std::int64_t>(column) * taps + tap) * call_.in + channel_
                                         : weight;
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

// A warp's part of the product on tensor cores.
template <typename Tile>
class TensorCores {
public:
    __device__ TensorCores(int row, int column) : row_(row), column_(column) {}

    __device__ void multiply(const unsigned char* a, const unsigned char* b) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < kChunks; k += 2) {  // 16 elements at a time
            unsigned left[kM][4], right[kN / 2][4];
            const unsigned char* from_a = a + stage_offset(row_ + lane % 16, k + lane / 16);
            const unsigned char* from_b = b + stage_offset(column_ + lane / 16 * 8 + lane % 8, k + lane / 8 % 2);
#pragma unroll
            for (int m = 0; m < kM; ++m) ldmatrix_x4(from_a + m * 2 * kEightRows, left[m]);
#pragma unroll
            for (int n = 0; n < kN / 2; ++n) ldmatrix_x4(from_b + n * 2 * kEightRows, right[n]);
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    const unsigned pair[2] = {right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]};
                    mma_m16n8k16<typename Tile::Element>(sums_[m][n], left[m], pair);
                }
        }
    }

    __device__ void store(float* staging) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    *reinterpret_cast<float2*>(staging + (row_ + 16 * m + 8 * half + lane / 4) * Tile::kStagingStride +
                                               column_ + 8 * n + lane % 4 * 2) =
                        make_float2(sums_[m][n][2 * half], sums_[m][n][2 * half + 1]);
    }

private:
    static constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
    int row_, column_;
    float sums_[kM][kN][4] = {};
};

// The same in float32 arithmetic: a lane has every 8th row and every 4th column.
template <typename Tile>
class FusedMultiplyAdds {
public:
    __device__ FusedMultiplyAdds(int row, int column)
        : row_(row + threadIdx.x % 8), column_(column + threadIdx.x % 32 / 8) {}

    __device__ void multiply(const unsigned char* a, const unsigned char* b) {
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
                    float sum = sums_[m][n];
                    sum = fmaf(left[m].x, right.x, sum);
                    sum = fmaf(left[m].y, right.y, sum);
                    sum = fmaf(left[m].z, right.z, sum);
                    sums_[m][n] = fmaf(left[m].w, right.w, sum);
                }
            }
        }
    }

    __device__ void store(float* staging) const {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
                staging[(row_ + 8 * m) * Tile::kStagingStride + column_ + 4 * n] = sums_[m][n];
    }

private:
    static constexpr int kM = Tile::kWarpM / 8, kN = Tile::kWarpN / 4;
    int row_, column_;
    float sums_[kM][kN] = {};
};

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
    for (int group = 0; group < Tile::kBlockM; group += kPooledPixels) {
        float sums[kPack] = {};
#pragma unroll 2
        for (int row = group + first_row; row < group + kPooledPixels; row += Tile::kRowsAtOnce) {
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
        for (int i = 0; i < kPack; ++i) staging[(group + first_row) * Tile::kStagingStride + column + i] = sums[i];
    }
    if (!call.sums) return;
    __syncthreads();
    const int mine = threadIdx.x;
    if (mine >= Tile::kBlockN || first_channel + mine >= call.out) return;
    for (int group = 0; group < Tile::kBlockM && first_pixel + group < call.out_pixels; group += kPooledPixels) {
        float sum = 0.0f;
        for (int row = 0; row < Tile::kRowsAtOnce; ++row)
            sum += staging[(group + row) * Tile::kStagingStride + mine];
        const std::int64_t tile = static_cast<std::int64_t>(image) * call.pooled_tiles +
                                  (first_pixel + group) / kPooledPixels;
        call.sums[tile * call.out + first_channel + mine] = sum;
    }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce) gathered_conv_kernel(Arguments call) {
    using Product = std::conditional_t<std::is_same_v<typename Tile::Element, float>, FusedMultiplyAdds<Tile>,
                                       TensorCores<Tile>>;
    unsigned char* shared = shared_memory();  // [kStages, kStageBytes], then the product
    const int count = call.count ? *call.count : call.batch;
    const int tiles = count * call.row_tiles * call.column_tiles;
    const int steps = (call.kernel * call.kernel * call.in + Tile::kBlockK - 1) / Tile::kBlockK;
    const int warp = threadIdx.x / 32;
    // Neighbouring blocks share an image's pixels: they meet in the cache.
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int first_channel = tile % call.column_tiles * Tile::kBlockN;
        const int first_pixel = tile / call.column_tiles % call.row_tiles * Tile::kBlockM;
        const int index = tile / call.column_tiles / call.row_tiles;
        const int row = call.rows ? call.rows[index] : index;

        Loader<Tile> loader(call, call.gathers ? row : index, first_pixel, first_channel);
        Product product(warp / Tile::kWarpsN * Tile::kWarpM, warp % Tile::kWarpsN * Tile::kWarpN);
#pragma unroll
        for (int step = 0; step < kStages - 1; ++step) {
            if (step < steps) loader.load(shared + step * Tile::kStageBytes);
            cp_async_commit();
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            cp_async_wait<kStages - 2>();
            __syncthreads();  // this step has landed for all, and all are done with the stage before
            if (step + kStages - 1 < steps)
                loader.load(shared + (step + kStages - 1) % kStages * Tile::kStageBytes);
            cp_async_commit();
            const unsigned char* stage = shared + step % kStages * Tile::kStageBytes;
            product.multiply(stage, stage + Tile::kBlockM * kChunks * kChunk);
        }
        __syncthreads();  // the stages become the product's place; all of theirs has landed
        float* staging = reinterpret_cast<float*>(shared);
        product.store(staging);
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
    const int blocks = std::min(call.batch * call.row_tiles * call.column_tiles, resident);
    launch("gathered_conv", kernel, {blocks, Tile::kThreads, Tile::kSharedBytes}, stream, call);
}

// The largest tile that still gives every multiprocessor one. Results do not depend on the choice: products are summed
// over K and pooled sums over pixels in the same order, except in the narrow tile, which the layer alone decides.
template <typename Element>
void launch_element(const Arguments& call, Stream stream) {
    using Narrow = Tile<Element, 128, 32, 4, 1>;
    using Small = Tile<Element, 64, 64, 2, 2>;
    using Large = Tile<Element, 128, 128, 2, 4>;
    static_assert(Small::kRowsAtOnce == Large::kRowsAtOnce, "the order of pooled sums");
    const int large_tiles = call.batch * ((call.out_pixels + 127) / 128) * ((call.out + 127) / 128);
    if (call.out <= 32) return launch_tiles<Narrow>(call, stream);
    if (call.out <= 64 || call.out_pixels <= 64 || large_tiles < multiprocessors())
        return launch_tiles<Small>(call, stream);
    launch_tiles<Large>(call, stream);
}

}  // namespace

int pooled_tiles(const Convolution& layer, int height, int width) {
    return (layer.out_side(height) * layer.out_side(width) + kPooledPixels - 1) / kPooledPixels;
}

void gathered_conv(ElementType type, const Convolution& layer, const GatheredConv& call, Stream stream) {
    check(layer.in >= 8 && layer.in % 8 == 0 && layer.out >= 8 && layer.out % 8 == 0,
          "channels: expected multiples of 8, got ", layer.in, " and ", layer.out);
    check(layer.kernel % 2 == 1 && layer.stride >= 1, "kernel and stride: expected an odd kernel, got ", layer.kernel,
          " and ", layer.stride);
    check(call.batch >= 0 && call.height >= 1 && call.width >= 1, "x: got ", call.batch, " images of ", call.height, "x",
          call.width);
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
    arguments.gathers = call.gathers;
    arguments.scatters = call.scatters;
    arguments.relu = call.relu;
    switch (type) {
        case ElementType::float32: return launch_element<float>(arguments, stream);
        case ElementType::float16: return launch_element<Half>(arguments, stream);
        case ElementType::bfloat16: return launch_element<Bfloat16>(arguments, stream);
    }
}

}  // namespace skipnet::cuda
