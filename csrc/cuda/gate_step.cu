// The gate step: a warp takes an image from pooled sums to its decision; the last thread block lists who executes.
#include "gate_step.h"

#include "../check.h"
#include "../gate.h"
#include "compaction.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a thread block: few, so that a small batch has many

// sum_c weight[c] * x[c] over the warp; lane l takes the channels l, l + 32, ...
__device__ float warp_dot(const float* weight, const float* x, int size) {
    float sum = 0.0f;
    for (int c = threadIdx.x % 32; c < size; c += 32) sum += weight[c] * x[c];
    return warp_sum(sum);
}

// The image's average over its pixels into shared memory. A lane reads back only the channels that it wrote.
__device__ void finish_pool(const PooledSums& pooled, int channels, int image, float* feature /* [channels] */) {
    const float* sums = pooled.sums + static_cast<std::int64_t>(image) * pooled.tiles * channels;
    for (int c = threadIdx.x % 32; c < channels; c += 32) {
        float sum = 0.0f;
        for (int tile = 0; tile < pooled.tiles; ++tile) sum += sums[tile * channels + c];
        feature[c] = sum / static_cast<float>(pooled.pixels);
    }
}

// The two kinds of gate: a warp brings one image's pooled feature to its execute logit.
struct Rnn {
    Embedding embedding;
    Lstm lstm;
    float *hidden, *cell;  // [batch, hidden]

    __host__ __device__ int channels() const { return embedding.channels; }
    __host__ __device__ int scratch() const { return lstm.embed + 6 * lstm.hidden; }  // floats a warp

    __device__ float logit(int image, const float* pooled, float* scratch) const {
        const int lane = threadIdx.x % 32, n = lstm.hidden;
        float *feature = scratch, *gates = feature + lstm.embed, *h = gates + 4 * n, *c = h + n;
        const std::int64_t state = static_cast<std::int64_t>(image) * n;
        for (int k = lane; k < n; k += 32) {
            h[k] = hidden[state + k];
            c[k] = cell[state + k];
        }
#pragma unroll 5
        for (int k = 0; k < lstm.embed; ++k) {
            const float sum = warp_dot(embedding.weight + k * embedding.channels, pooled, embedding.channels);
            if (lane == 0) feature[k] = sum + embedding.bias[k];
        }
        __syncwarp();
        for (int k = lane; k < 4 * n; k += 32) gates[k] = lstm_gate(lstm, k, feature, h);
        __syncwarp();
        for (int k = lane; k < n; k += 32) {
            lstm_unit(gates[k], gates[n + k], gates[2 * n + k], gates[3 * n + k], h[k], c[k]);
            hidden[state + k] = h[k];
            cell[state + k] = c[k];
        }
        __syncwarp();
        return dot(lstm.projection_weight, h, n, lstm.projection_bias);
    }
};

struct Feedforward {
    FeedforwardTail tail;

    __host__ __device__ int channels() const { return tail.channels; }
    __host__ __device__ int scratch() const { return 0; }

    __device__ float logit(int, const float* pooled, float*) const {
        return warp_dot(tail.weight, pooled, tail.channels) + tail.bias;
    }
};

// A warp per image; the thread block that finishes last compacts for all.
template <typename Gate>
__global__ void __launch_bounds__(kThreads)
    gate_step_kernel(Gate gate, int batch, const int* present, PooledSums pooled, Decision decision, RowList list,
                     int* arrivals) {
    float* floats = reinterpret_cast<float*>(shared_memory());  // [kWarps, channels + scratch]
    int* warp_counts = reinterpret_cast<int*>(floats + kWarps * (gate.channels() + gate.scratch()));  // [kWarps]
    int* is_last = warp_counts + kWarps;
    const int warp = threadIdx.x / 32, image = blockIdx.x * kWarps + warp, images = images_of(present, batch);
    if (image < images) {
        float* feature = floats + warp * (gate.channels() + gate.scratch());
        finish_pool(pooled, gate.channels(), image, feature);
        const float logit = gate.logit(image, feature, feature + gate.channels());
        if (threadIdx.x % 32 == 0) decide(decision, image, logit);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // the block's decisions before its arrival
        *is_last = atomicAdd(arrivals, 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (!*is_last) return;
    __threadfence();  // all arrivals before the others' decisions
    if (threadIdx.x == 0) *arrivals = 0;
    compact_in_block<kThreads>(decision.executed, images, list, warp_counts);
}

template <typename Gate>
void launch_gate_step(const Gate& gate, int batch, const int* present, const PooledSums& pooled,
                      const Decision& decision, const RowList& list, int* arrivals, Stream stream) {
    check(batch >= 0, "batch: expected 0 or more, got ", batch);
    check(pooled.tiles >= 1 && pooled.pixels >= 1, "pooled: expected tiles and pixels, got ", pooled.tiles, " and ",
          pooled.pixels);
    if (batch == 0) return compact(decision.executed, 0, list, stream);
    const std::size_t shared = (kWarps * (gate.channels() + gate.scratch()) + kWarps + 1) * sizeof(float);
    launch("gate_step", gate_step_kernel<Gate>, {(batch + kWarps - 1u) / kWarps, kThreads, shared}, stream, gate, batch,
           present, pooled, decision, list, arrivals);
}

}  // namespace

void gate_step(const Embedding& embedding, const Lstm& lstm, int batch, const int* present, const PooledSums& pooled,
               float* hidden, float* cell, const Decision& decision, const RowList& list, int* arrivals,
               Stream stream) {
    launch_gate_step(Rnn{embedding, lstm, hidden, cell}, batch, present, pooled, decision, list, arrivals, stream);
}

void gate_step(const FeedforwardTail& tail, int batch, const int* present, const PooledSums& pooled,
               const Decision& decision, const RowList& list, int* arrivals, Stream stream) {
    launch_gate_step(Feedforward{tail}, batch, present, pooled, decision, list, arrivals, stream);
}

}  // namespace skipnet::cuda
