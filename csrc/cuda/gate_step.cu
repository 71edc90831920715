// The gate step: a thread block takes an image from pooled sums to its decision; the last one lists who executes.
#include "gate_step.h"

#include <algorithm>

#include "../check.h"
#include "../gate.h"
#include "compaction.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // of a thread block
// Loads of pooled sums that a thread has under way: each is a trip to L2, and there is little else to do meanwhile.
constexpr int kLoads = 16;

// totals[row] += sum_c weight[row, c] * sums[c] over the thread's channels, kThreads apart; sums[c] over an image's
// tiles. Of the last rows there may be fewer; what is in their places then has no meaning. All loads of kChannels
// channels are issued before the first is waited for.
template <int kRows, int kChannels>
__device__ void add_products(const float* weight, int rows, int channels, const float* sums, int tiles,
                             float (&totals)[kRows]) {
    constexpr int kTiles = kLoads / kChannels;
    for (int first = threadIdx.x; first < channels; first += kChannels * kThreads) {
        float weights[kChannels][kRows], feature[kChannels] = {};
#pragma unroll
        for (int i = 0; i < kChannels; ++i)
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                const int channel = first + i * kThreads;
                weights[i][row] = channel < channels ? weight[min(row, rows - 1) * channels + channel] : 0.0f;
            }
        const float* from = sums + first;
        int left = tiles;
        do {
            float loaded[kTiles][kChannels];
#pragma unroll
            for (int t = 0; t < kTiles; ++t, from += channels)
#pragma unroll
                for (int i = 0; i < kChannels; ++i)
                    loaded[t][i] = t < left && first + i * kThreads < channels ? from[i * kThreads] : 0.0f;
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int i = 0; i < kChannels; ++i) feature[i] += loaded[t][i];
            left -= kTiles;
        } while (left > 0);
#pragma unroll
        for (int i = 0; i < kChannels; ++i)
#pragma unroll
            for (int row = 0; row < kRows; ++row) totals[row] += weights[i][row] * feature[i];
    }
}

// The warp's share of weight[rows, channels] times the image's sums, into partial[warp, row] in shared memory; kRows at
// a time. With more of them the pool is taken again: its sums are in L1.
template <int kRows>
__device__ void multiply(const float* weight, int rows, int channels, const PooledSums& pooled, int image,
                         float* partial) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = pooled.tiles;
    const float* sums = pooled.sums + static_cast<std::int64_t>(image) * tiles * channels;
    for (int first = 0; first < rows; first += kRows, weight += kRows * channels) {
        const int left = rows - first;
        float totals[kRows] = {};
        if (channels <= kThreads)
            add_products<kRows, 1>(weight, left, channels, sums, tiles, totals);
        else if (channels <= 2 * kThreads)
            add_products<kRows, 2>(weight, left, channels, sums, tiles, totals);
        else
            add_products<kRows, 4>(weight, left, channels, sums, tiles, totals);
#pragma unroll
        for (int row = 0; row < kRows; ++row) totals[row] = warp_sum(totals[row]);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            if (lane == 0 && row < left) partial[warp * rows + first + row] = totals[row];
    }
}

// A row of the product with the image's averages, after a barrier.
__device__ float product(const float* partial, int rows, int row, const PooledSums& pooled) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * rows + row];
    return sum / static_cast<float>(pooled.pixels);
}

__device__ float load(const float* from, int place, int size) { return place < size ? from[place] : 0.0f; }

// The two kinds of gate: a thread block brings one image's pooled sums to its execute logit, which warp 0 gets.
class Rnn {
public:
    Rnn(const Embedding& embedding, const Lstm& lstm, float* hidden, float* cell)
        : embedding_(embedding), lstm_(lstm), hidden_(hidden), cell_(cell) {}

    int scratch() const { return kWarps * lstm_.embed + 4 * lstm_.hidden; }  // floats in shared memory

    __device__ float logit(const PooledSums& pooled, int image, float* scratch) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = lstm_.hidden;
        float *partial = scratch, *gates = partial + kWarps * lstm_.embed;
        float *hidden = hidden_ + static_cast<std::int64_t>(image) * n,
              *cell = cell_ + static_cast<std::int64_t>(image) * n;
        // All that the LSTM needs is on its way while the pool is taken: the first one in each lane.
        float weights[kRows], addend = load_addend(hidden, lane);
        load_weights(warp, lane, weights);
        float before = load(cell, lane, n), projection = load(lstm_.projection_weight, lane, n);
        multiply<kFeatures>(embedding_.weight, lstm_.embed, embedding_.channels, pooled, image, partial);
        __syncthreads();
        for (int first = warp; first < 4 * n; first += kRows * kWarps) {
            float sums[kRows] = {};
            for (int k = lane; k < inputs(); k += 32) {
                if (first != warp || k != lane) {
                    addend = load_addend(hidden, k);
                    load_weights(first, k, weights);
                }
                const float input = addend + (k < lstm_.embed ? product(partial, lstm_.embed, k, pooled) : 0.0f);
#pragma unroll
                for (int i = 0; i < kRows; ++i) sums[i] += weights[i] * input;
            }
#pragma unroll
            for (int i = 0; i < kRows; ++i) sums[i] = warp_sum(sums[i]);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
                if (lane == 0 && first + i * kWarps < 4 * n) gates[first + i * kWarps] = sums[i];
        }
        __syncthreads();
        if (warp != 0) return 0.0f;
        float sum = 0.0f;
        for (int k = lane; k < n; k += 32) {
            if (k != lane) before = cell[k], projection = lstm_.projection_weight[k];
            float h;
            lstm_unit(gates[k], gates[n + k], gates[2 * n + k], gates[3 * n + k], h, before);
            hidden[k] = h;
            cell[k] = before;
            sum += projection * h;
        }
        return warp_sum(sum) + lstm_.projection_bias;
    }

private:
    static constexpr int kFeatures = 10;  // of the embedding, at a time; as many as there are in the published networks
    static constexpr int kRows = 5;       // of the LSTM's 4 * hidden sums, at a time in a warp; the same

    // What a lane multiplies: the embedded feature, the hidden state, and a one for the bias.
    __device__ int inputs() const { return lstm_.embed + lstm_.hidden + 1; }

    // Input k, but for what the embedding's product adds to it.
    __device__ float load_addend(const float* hidden, int k) const {
        if (k < lstm_.embed) return embedding_.bias[k];
        return k < inputs() - 1 ? hidden[k - lstm_.embed] : 1.0f;
    }
    // Of input k in the sums first, first + kWarps, ...
    __device__ void load_weights(int first, int k, float (&weights)[kRows]) const {
        const int state = k - lstm_.embed;
        const float* from = lstm_.bias;
        int stride = 1;
        if (state < 0)
            from = lstm_.input_weight + k, stride = lstm_.embed;
        else if (state < lstm_.hidden)
            from = lstm_.hidden_weight + state, stride = lstm_.hidden;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int row = first + i * kWarps;
            weights[i] = k < inputs() && row < 4 * lstm_.hidden ? from[row * stride] : 0.0f;
        }
    }

    Embedding embedding_;
    Lstm lstm_;
    float *hidden_, *cell_;  // [batch, hidden]
};

class Feedforward {
public:
    explicit Feedforward(const FeedforwardTail& tail) : tail_(tail) {}

    int scratch() const { return kWarps; }

    __device__ float logit(const PooledSums& pooled, int image, float* scratch) const {
        multiply<1>(tail_.weight, 1, tail_.channels, pooled, image, scratch);
        __syncthreads();
        return product(scratch, 1, 0, pooled) + tail_.bias;
    }

private:
    FeedforwardTail tail_;
};

// A thread block per image; the one that finishes last compacts for all.
template <typename Gate>
__global__ void __launch_bounds__(kThreads)
    gate_step_kernel(Gate gate, int batch, const int* present, PooledSums pooled, Decision decision, RowList list,
                     int* arrivals) {
    let_next_grid();
    wait_for_previous_grid();
    const int image = blockIdx.x, images = images_of(present, batch);
    float* scratch = reinterpret_cast<float*>(shared_memory());
    bool last = false;
    if (image < images) {
        const float logit = gate.logit(pooled, image, scratch);
        if (threadIdx.x == 0)  // past L1, where the last thread block looks for it
            __stcg(reinterpret_cast<unsigned char*>(decision.executed + image),
                   static_cast<unsigned char>(decide(decision, image, logit)));
    }
    if (threadIdx.x == 0) {
        __threadfence();  // the image's decision before its arrival
        last = atomicAdd(arrivals, 1) == static_cast<int>(gridDim.x) - 1;
        __threadfence();  // all arrivals before the others' decisions, which the barrier passes on to the block
    }
    if (!__syncthreads_or(last)) return;
    if (threadIdx.x == 0) *arrivals = 0;
    compact_in_block<kThreads>(decision.executed, images, list, reinterpret_cast<int*>(scratch));
}

template <typename Gate>
void launch_gate_step(const Gate& gate, int batch, const int* present, const PooledSums& pooled,
                      const Decision& decision, const RowList& list, int* arrivals, Stream stream) {
    check(batch >= 0, "batch: expected 0 or more, got ", batch);
    check(pooled.tiles >= 1 && pooled.pixels >= 1, "pooled: expected tiles and pixels, got ", pooled.tiles, " and ",
          pooled.pixels);
    if (batch == 0) return compact(decision.executed, 0, list, stream);
    const std::size_t shared = std::max(gate.scratch(), kWarps) * sizeof(float);  // the compaction's counts, too
    launch("gate_step", gate_step_kernel<Gate>, {static_cast<unsigned>(batch), kThreads, shared}, stream, gate, batch,
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
