// The gate step in device code: gate_step.cu launches it by itself, gathered_conv.cu in the tail of a block's last
// convolution.
#pragma once

#include "../gate.h"
#include "arrival.cuh"
#include "compaction.cuh"
#include "gate_step.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace skipnet::cuda {

// Sums over channels are taken in the order of so many warps, however many a thread block has.
constexpr int kGateWarps = 8, kGateThreads = 32 * kGateWarps;
// Loads of pooled sums that a thread has under way: each is a trip to L2, and there is little else to do meanwhile.
constexpr int kLoads = 16;

// A pooled sum; past L1 if this grid has written it.
template <bool kPastL1>
__device__ float load_sum(const float* from) {
    return kPastL1 ? __ldcg(from) : *from;
}

// totals[row] += sum_c weight[row, c] * sums[c] over a thread's channels, kGateThreads apart; sums[c] over an image's
// tiles. Of the last rows there may be fewer; what is in their places then has no meaning. All loads of kAtOnce
// channels are issued before the first is waited for.
template <int kRows, int kAtOnce, bool kPastL1>
__device__ void add_products(const float* weight, int rows, int channels, const float* sums, int tiles, int thread,
                             float (&totals)[kRows]) {
    constexpr int kTiles = kLoads / kAtOnce;
    for (int first = thread; first < channels; first += kAtOnce * kGateThreads) {
        float weights[kAtOnce][kRows], feature[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                const int channel = first + i * kGateThreads;
                weights[i][row] = channel < channels ? weight[min(row, rows - 1) * channels + channel] : 0.0f;
            }
        const float* from = sums + first;
        int left = tiles;
        do {
            float loaded[kTiles][kAtOnce];
#pragma unroll
            for (int t = 0; t < kTiles; ++t, from += channels)
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i)
                    loaded[t][i] = t < left && first + i * kGateThreads < channels
                                       ? load_sum<kPastL1>(from + i * kGateThreads)
                                       : 0.0f;
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) feature[i] += loaded[t][i];
            left -= kTiles;
        } while (left > 0);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int row = 0; row < kRows; ++row) totals[row] += weights[i][row] * feature[i];
    }
}

// weight[rows, channels] times the image's sums, into partial[warp, row] in shared memory; kRows at a time, by a thread
// block of kWarps. With more of them the pool is taken again.
template <int kRows, int kWarps>
__device__ void multiply(const float* weight, int rows, int channels, const PooledSums& pooled, int image,
                         float* partial) {
    constexpr bool kPastL1 = kWarps != kGateWarps;  // in a launch of its own a gate has so many
    const int lane = threadIdx.x % 32, tiles = pooled.tiles;
    const float* sums = pooled.sums + static_cast<std::int64_t>(image) * tiles * channels;
    for (int first = 0; first < rows; first += kRows, weight += kRows * channels) {
        const int left = rows - first;
#pragma unroll 1
        for (int warp = threadIdx.x / 32; warp < kGateWarps; warp += kWarps) {
            const int thread = 32 * warp + lane;
            float totals[kRows] = {};
            if (channels <= kGateThreads)
                add_products<kRows, 1, kPastL1>(weight, left, channels, sums, tiles, thread, totals);
            else if (channels <= 2 * kGateThreads)
                add_products<kRows, 2, kPastL1>(weight, left, channels, sums, tiles, thread, totals);
            else
                add_products<kRows, 4, kPastL1>(weight, left, channels, sums, tiles, thread, totals);
#pragma unroll
            for (int row = 0; row < kRows; ++row) totals[row] = warp_sum(totals[row]);
#pragma unroll
            for (int row = 0; row < kRows; ++row)
                if (lane == 0 && row < left) partial[warp * rows + first + row] = totals[row];
        }
    }
}

// A row of the product with the image's averages, after a barrier.
__device__ inline float product(const float* partial, int rows, int row, const PooledSums& pooled) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kGateWarps; ++warp) sum += partial[warp * rows + row];
    return sum / static_cast<float>(pooled.pixels);
}

__device__ inline float load(const float* from, int place, int size) { return place < size ? from[place] : 0.0f; }

// The two kinds of gate: a thread block of kWarps brings one image's pooled sums to its execute logit, which warp 0
// gets; by as many warps as it may be, to the same bits.
template <int kWarps>
class Rnn {
public:
    static constexpr int kThreads = 32 * kWarps;

    __host__ __device__ Rnn(const Embedding& embedding, const Lstm& lstm, float* hidden, float* cell)
        : embedding_(embedding), lstm_(lstm), hidden_(hidden), cell_(cell) {}

    // Floats in shared memory.
    static int scratch(const Lstm& lstm) { return kGateWarps * lstm.embed + 4 * lstm.hidden; }

    __device__ float logit(const PooledSums& pooled, int image, float* scratch) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = lstm_.hidden;
        float *partial = scratch, *gates = partial + kGateWarps * lstm_.embed;
        float *hidden = hidden_ + static_cast<std::int64_t>(image) * n,
              *cell = cell_ + static_cast<std::int64_t>(image) * n;
        // All that the LSTM needs is on its way while the pool is taken: the first one in each lane.
        float weights[kRows], addend = load_addend(hidden, lane);
        load_weights(warp, lane, weights);
        float before = load(cell, lane, n), projection = load(lstm_.projection_weight, lane, n);
        multiply<kFeatures, kWarps>(embedding_.weight, lstm_.embed, embedding_.channels, pooled, image, partial);
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
    static constexpr int kRows = 40 / kWarps;  // of the LSTM's 4 * hidden sums, at a time in a warp; the same

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
    static constexpr int kThreads = kGateThreads;

    explicit Feedforward(const FeedforwardTail& tail) : tail_(tail) {}

    __device__ float logit(const PooledSums& pooled, int image, float* scratch) const {
        multiply<1, kGateWarps>(tail_.weight, 1, tail_.channels, pooled, image, scratch);
        __syncthreads();
        return product(scratch, 1, 0, pooled) + tail_.bias;
    }

private:
    FeedforwardTail tail_;
};

// One image's decision, of `images`; the thread block that finishes last lists who executes.
template <typename Gate>
__device__ void decide_and_compact(const Gate& gate, const PooledSums& pooled, const Decision& decision, int image,
                                   int images, const RowList& list, int* arrivals, float* scratch) {
    const float logit = gate.logit(pooled, image, scratch);
    if (threadIdx.x == 0)  // past L1, where the last thread block looks for it
        __stcg(reinterpret_cast<unsigned char*>(decision.executed + image),
               static_cast<unsigned char>(decide(decision, image, logit)));
    if (comes_last(arrivals, images))
        compact_in_block<Gate::kThreads>(decision.executed, images, list, reinterpret_cast<int*>(scratch));
}

}  // namespace skipnet::cuda
