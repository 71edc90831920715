// The gate step in device code: gate_step.cu launches it by itself, gathered_conv.cu in the tail of a block's last
// convolution.
#pragma once

#include "../gate.h"
#include "activations.cuh"
#include "arrival.cuh"
#include "compaction.cuh"
#include "gate_step.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace skipnet::cuda {

// Of a thread block that takes one image's gate: a warp for each of an LSTM's four gates.
constexpr int kGateWarps = 4, kGateThreads = 32 * kGateWarps;
// kWidth neighbouring numbers, in one load: one, or four that are aligned.
template <int kWidth>
struct Numbers {
    float values[kWidth];

    __device__ static Numbers at(const float* from) {
        if constexpr (kWidth == 1) {
            return {*from};
        } else {
            const float4 four = *reinterpret_cast<const float4*>(from);
            return {four.x, four.y, four.z, four.w};
        }
    }
    __device__ static Numbers past_l1(const float* from) {
        if constexpr (kWidth == 1) {
            return {__ldcg(from)};
        } else {
            const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
            return {four.x, four.y, four.z, four.w};
        }
    }
};

// totals[row] += sum_c weight[row, c] * sums[c] over a thread's kAtOnce times kWidth channels, kGateThreads * kWidth
// apart; sums[c] over an image's tiles, kTiles at a time, past L1: in a convolution's tail they are the grid's own. The
// weights are loaded while the last sums are on their way. Of the last rows there may be fewer; what is in their places
// then has no meaning.
template <int kRows, int kWidth, int kAtOnce, int kTiles>
__device__ void add_products(const float* weight, int rows, int channels, const float* sums, int tiles,
                             float (&totals)[kRows]) {
    constexpr int kApart = kGateThreads * kWidth;
    Numbers<kWidth> loaded[kTiles][kAtOnce], weights[kAtOnce][kRows], feature[kAtOnce] = {};
    const auto load_sums = [&] {
#pragma unroll
        for (int t = 0; t < kTiles; ++t, sums += channels)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                loaded[t][i] = {};
                if (t < tiles) loaded[t][i] = Numbers<kWidth>::past_l1(sums + i * kApart);
            }
    };
    const auto add = [&] {
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int c = 0; c < kWidth; ++c) feature[i].values[c] += loaded[t][i].values[c];
    };
#pragma unroll 1
    for (; tiles > kTiles; tiles -= kTiles) {
        load_sums();
        add();
    }
    load_sums();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            weights[i][row] = Numbers<kWidth>::at(weight + min(row, rows - 1) * channels + i * kApart);
    add();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
            for (int c = 0; c < kWidth; ++c) totals[row] += weights[i][row].values[c] * feature[i].values[c];
}

// weight[rows, channels] times the image's sums, into partial[warp, row] in shared memory; kRows at a time. With more
// of them the pool is taken again.
template <int kRows, int kWidth>
__device__ void multiply(const float* weight, int rows, int channels, const PooledSums& pooled, int image,
                         float* partial) {
    constexpr int kMany = 8 * kGateThreads;  // channels
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = pooled.tiles, mine = kWidth * threadIdx.x;
    const float* sums = pooled.sums + static_cast<std::int64_t>(image) * tiles * channels;
#pragma unroll 1
    for (int first = 0; first < rows; first += kRows, weight += kRows * channels) {
        const int left = rows - first;
        float totals[kRows] = {};
        int channel = mine;
#pragma unroll 1
        for (; channel - mine + kMany <= channels; channel += kMany)
            add_products<kRows, kWidth, 8 / kWidth, 4>(weight + channel, left, channels, sums + channel, tiles, totals);
#pragma unroll 1
        for (; channel < channels; channel += kWidth * kGateThreads)
            add_products<kRows, kWidth, 1, 16>(weight + channel, left, channels, sums + channel, tiles, totals);
        const float sum = spread_sums<16, 1>(totals, lane);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            if (lane == holder<16, 1, kRows>(row) && row < left) partial[warp * rows + first + row] = sum;
    }
}

// A row of the product, after a barrier.
__device__ inline float product(const float* partial, int rows, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kGateWarps; ++warp) sum += partial[warp * rows + row];
    return sum;
}

constexpr int kPublished = 10;  // numbers of an embedding and of a state in the published networks

// Floats in shared memory that RNNGate works in, a multiple of 4; that its weights take there.
inline int gate_scratch(const Lstm& lstm) {
    return kGateWarps * ((lstm.embed + lstm.hidden + 3) / 4 * 4 + lstm.embed + lstm.hidden);
}
inline int gate_weights(const Embedding& embedding, const Lstm& lstm) {
    return 4 * lstm.hidden * (lstm.embed + lstm.hidden + 1) + lstm.embed * embedding.channels;
}
// Whether the sizes are the published ones and all that fits into so many bytes, the weights in pieces of 16.
inline bool can_stage(const Embedding& embedding, const Lstm& lstm, int bytes) {
    return lstm.embed == kPublished && lstm.hidden == kPublished && embedding.channels % 4 == 0 &&
           (gate_scratch(lstm) + gate_weights(embedding, lstm)) * static_cast<int>(sizeof(float)) <= bytes;
}

// The two kinds of gate: a thread block brings one image's pooled sums to its execute logit, which thread 0 gets.
// RNNGate's weights do not depend on the grid before: with kStaged, for the published sizes only, they come into shared
// memory while that is still at work, and what follows the embedding has no branch.
template <bool kStaged>
class Rnn {
public:
    __host__ __device__ Rnn(const Embedding& embedding, const Lstm& lstm, float* hidden, float* cell)
        : embedding_(embedding), lstm_(lstm), hidden_(hidden), cell_(cell) {}

    // Begins to bring the weights, as a group of cp.async.
    __device__ void stage(float* staged) const {
        if constexpr (kStaged) {
            const auto copy = [&](const float* from, int floats) {
#pragma unroll 2
                for (int i = 4 * threadIdx.x; i < floats; i += 4 * kGateThreads) cp_async16(staged + i, from + i);
                staged += floats;
            };
            copy(lstm_.input_weight, 4 * kSize * kSize);
            copy(lstm_.hidden_weight, 4 * kSize * kSize);
            copy(lstm_.bias, 4 * kSize);
            copy(embedding_.weight, kSize * embedding_.channels);
            cp_async_commit();
        }
    }

    __device__ float logit(const PooledSums& pooled, int image, float* scratch, const float* staged) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int n = kStaged ? kSize : lstm_.hidden, embed = kStaged ? kSize : lstm_.embed;
        const int all_inputs = (embed + n + 3) / 4 * 4;
        float* inputs = scratch + warp * all_inputs;  // each warp has its own: the embedded feature, the state
        float *partial = scratch + kGateWarps * all_inputs, *activated = partial + kGateWarps * embed;
        float *hidden = hidden_ + static_cast<std::int64_t>(image) * n,
              *cell = cell_ + static_cast<std::int64_t>(image) * n;
        const float* weight = embedding_.weight;
        Lstm lstm = lstm_;
        if constexpr (kStaged) {
            lstm.input_weight = staged;
            lstm.hidden_weight = lstm.input_weight + 4 * n * embed;
            lstm.bias = lstm.hidden_weight + 4 * n * n;
            weight = lstm.bias + 4 * n;
        }
        // What is not in shared memory is on its way while the pool is taken: a lane's first ones. Lanes beyond the
        // last unit or feature do the same as that one's.
        const int first = min(lane, n - 1), feature = min(lane, embed - 1);
        const float state = hidden[first], bias = embedding_.bias[feature];
        const float before = cell[first], projection = lstm.projection_weight[first];
        const float share = fast_reciprocal(static_cast<float>(pooled.pixels));
        if constexpr (kStaged) {
            cp_async_wait<0>();
            __syncthreads();
        }
        multiply<kPublished, kStaged ? 4 : 1>(weight, embed, embedding_.channels, pooled, image, partial);
        each(first, n, [&](int k) { inputs[embed + k] = k == first ? state : hidden[k]; });
        __syncthreads();
        each(feature, embed, [&](int k) {
            inputs[k] = share * product(partial, embed, k) + (k == feature ? bias : embedding_.bias[k]);
        });
        __syncwarp();
        const float scale = warp == 2 ? 2.0f : 1.0f;  // tanh(x) is 2 sigmoid(2 x) - 1
        each(first, n, [&](int unit) {
            const int row = warp * n + unit;
            const float sum = lstm.bias[row] + dot(lstm.hidden_weight + row * n, inputs + embed, n) +
                              dot(lstm.input_weight + row * embed, inputs, embed);
            activated[row] = scale * fast_sigmoid(scale * sum) - (scale - 1.0f);
        });
        __syncthreads();
        if (warp != 0) return 0.0f;
        float sum = 0.0f;
        each(first, n, [&](int unit) {
            const float c =
                activated[n + unit] * (unit == first ? before : cell[unit]) + activated[unit] * activated[2 * n + unit];
            const float h = activated[3 * n + unit] * fast_tanh(c);
            cell[unit] = c;
            hidden[unit] = h;
            if (lane < n) sum += (unit == first ? projection : lstm.projection_weight[unit]) * h;
        });
        return warp_sum(sum) + lstm.projection_bias;
    }

private:
    static constexpr int kSize = kPublished;

    // A lane's share of `count` numbers: the first one, and those 32 further on. Of published sizes it has one.
    template <typename Work>
    __device__ static void each(int first, int count, Work work) {
        work(first);
        if constexpr (!kStaged)
            for (int number = first + 32; number < count; number += 32) work(number);
    }
    __device__ static float dot(const float* weights, const float* inputs, int count) {
        float sum = 0.0f;
        if constexpr (kStaged) {
#pragma unroll
            for (int k = 0; k < kSize; ++k) sum += weights[k] * inputs[k];
        } else {
            for (int k = 0; k < count; ++k) sum += weights[k] * inputs[k];
        }
        return sum;
    }

    Embedding embedding_;
    Lstm lstm_;
    float *hidden_, *cell_;  // [batch, hidden]
};

class Feedforward {
public:
    explicit Feedforward(const FeedforwardTail& tail) : tail_(tail) {}

    __device__ void stage(float*) const {}
    __device__ float logit(const PooledSums& pooled, int image, float* scratch, const float*) const {
        multiply<1, 1>(tail_.weight, 1, tail_.channels, pooled, image, scratch);
        __syncthreads();
        return product(scratch, 1, 0) / static_cast<float>(pooled.pixels) + tail_.bias;
    }

private:
    FeedforwardTail tail_;
};

// One image's decision, of `images`; the thread block that finishes last lists who executes.
template <typename Gate>
__device__ void decide_and_compact(const Gate& gate, const PooledSums& pooled, const Decision& decision, int image,
                                   int images, const RowList& list, int* arrivals, float* scratch,
                                   const float* staged) {
    const int forced = decision.forced && threadIdx.x == 0 ? decision.forced[image] : 0;
    const float logit = gate.logit(pooled, image, scratch, staged);
    if (threadIdx.x == 0) {
        // Looked at here and not before, where it would be waited for.
        const bool executed = decision.forced ? in_register(forced) != 0 : executes_logit(logit);
        if (images == 1) {  // an image alone needs nobody to list it
            list.rows[0] = executed ? 0 : -1;
            *list.count = executed;
        }
        // Past L1, where the last thread block looks for it.
        __stcg(reinterpret_cast<unsigned char*>(decision.executed + image), static_cast<unsigned char>(executed));
        decision.logit[image] = logit;
        decision.probability[image] = sigmoid(logit);
    }
    if (images > 1 && comes_last(arrivals, images))
        compact_in_block<kGateThreads>(decision.executed, images, list, reinterpret_cast<int*>(scratch));
}

}  // namespace skipnet::cuda
