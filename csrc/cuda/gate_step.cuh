// The gate step in device code: gate_step.cu launches it by itself, gathered_conv.cu in the tail of a block's last
// convolution.
#pragma once

#include "../gate.h"
#include "activations.cuh"
#include "arrival.cuh"
#include "compaction.cuh"
#include "divisor.cuh"
#include "gate_step.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace skipnet::cuda {

// Of a thread block that takes one image's gate: a warp for each of an LSTM's four gates.
constexpr int kGateWarps = 4, kGateThreads = 32 * kGateWarps;

// totals[row] += sum_c weight[row, c] * sums[c] over a thread's kAtOnce channels, kGateThreads apart; sums[c] over an
// image's tiles, kTiles at a time. The weights are loaded while the last sums are on their way. Of the last rows there
// may be fewer; what is in their places then has no meaning.
template <int kRows, int kAtOnce, int kTiles>
__device__ void add_products(const float* weight, int rows, int channels, const float* sums, int tiles,
                             float (&totals)[kRows]) {
    float loaded[kTiles][kAtOnce], weights[kAtOnce][kRows], feature[kAtOnce] = {};
    const auto load_sums = [&] {
#pragma unroll
        for (int t = 0; t < kTiles; ++t, sums += channels)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) loaded[t][i] = t < tiles ? __ldcg(sums + i * kGateThreads) : 0.0f;
    };
    const auto add = [&] {
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) feature[i] += loaded[t][i];
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
            weights[i][row] = weight[min(row, rows - 1) * channels + i * kGateThreads];
    add();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int row = 0; row < kRows; ++row) totals[row] += weights[i][row] * feature[i];
}

// weight[rows, channels] times the image's sums, into partial[warp, row] in shared memory; kRows at a time. With more
// of them the pool is taken again.
template <int kRows>
__device__ void multiply(const float* weight, int rows, int channels, const PooledSums& pooled, int image,
                         float* partial) {
    constexpr int kAtOnce = 8, kMany = kAtOnce * kGateThreads;  // channels
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = pooled.tiles, mine = threadIdx.x;
    const float* sums = pooled.sums + static_cast<std::int64_t>(image) * tiles * channels;
#pragma unroll 1
    for (int first = 0; first < rows; first += kRows, weight += kRows * channels) {
        const int left = rows - first;
        float totals[kRows] = {};
        int channel = mine;
#pragma unroll 1
        for (; channel - mine + kMany <= channels; channel += kMany)
            add_products<kRows, kAtOnce, 4>(weight + channel, left, channels, sums + channel, tiles, totals);
#pragma unroll 1
        for (; channel < channels; channel += kGateThreads)
            add_products<kRows, 1, 16>(weight + channel, left, channels, sums + channel, tiles, totals);
        const float sum = spread_sums<16, 1>(totals, lane);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            if (lane == holder<16, 1, kRows>(row) && row < left) store_shared(partial + warp * rows + first + row, sum);
    }
}

// A row of the product, after a barrier.
__device__ inline float product(const float* partial, int rows, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kGateWarps; ++warp) sum += load_shared(partial + warp * rows + row);
    return sum;
}

// The kinds of gate: a thread block brings one image's pooled sums to its execute logit, which thread 0 gets.

// RNNGate of any size. It reads its weights where they lie.
class Rnn {
public:
    Rnn(const Embedding& embedding, const Lstm& lstm, float* hidden, float* cell)
        : embedding_(embedding), lstm_(lstm), hidden_(hidden), cell_(cell) {}

    // That it takes in shared memory.
    int bytes() const { return 4 * 2 * kGateWarps * (lstm_.embed + lstm_.hidden); }

    __device__ void stage(float*) const {}
    struct Ready {};
    __device__ Ready ready(const PooledSums&, int, const float*) const { return {}; }
    __device__ float logit(int warp, const PooledSums& pooled, int image, float* shared, Ready) const {
        const int lane = threadIdx.x % 32, n = lstm_.hidden, embed = lstm_.embed;
        float* inputs = shared + warp * (embed + n);  // each warp has its own: the embedded feature, the state
        float *partial = shared + kGateWarps * (embed + n), *activated = partial + kGateWarps * embed;
        float *hidden = hidden_ + static_cast<std::int64_t>(image) * n,
              *cell = cell_ + static_cast<std::int64_t>(image) * n;
        const float share = fast_reciprocal(static_cast<float>(pooled.pixels));
        multiply<10>(embedding_.weight, embed, embedding_.channels, pooled, image, partial);
        for (int k = lane; k < n; k += 32) store_shared(inputs + embed + k, hidden[k]);
        __syncthreads();
        for (int k = lane; k < embed; k += 32)
            store_shared(inputs + k, share * product(partial, embed, k) + embedding_.bias[k]);
        __syncwarp();
        const float scale = warp == 2 ? 2.0f : 1.0f;  // tanh(x) is 2 sigmoid(2 x) - 1
        for (int unit = lane; unit < n; unit += 32) {
            const int row = warp * n + unit;
            const float sum = lstm_.bias[row] + dot(lstm_.hidden_weight + row * n, inputs + embed, n) +
                              dot(lstm_.input_weight + row * embed, inputs, embed);
            store_shared(activated + row, scale * fast_sigmoid(scale * sum) - (scale - 1.0f));
        }
        __syncthreads();
        if (warp != 0) return 0.0f;
        float sum = 0.0f;
        for (int unit = lane; unit < n; unit += 32) {
            const auto gate = [&](int number) { return load_shared(activated + number * n + unit); };
            const float c = gate(1) * cell[unit] + gate(0) * gate(2);
            const float h = gate(3) * fast_tanh(c);
            cell[unit] = c;
            hidden[unit] = h;
            sum += lstm_.projection_weight[unit] * h;
        }
        return warp_sum(sum) + lstm_.projection_bias;
    }

private:
    __device__ static float dot(const float* weights, const float* inputs, int count) {
        float sum = 0.0f;
        for (int k = 0; k < count; ++k) sum += weights[k] * load_shared(inputs + k);
        return sum;
    }

    Embedding embedding_;
    Lstm lstm_;
    float *hidden_, *cell_;  // [batch, hidden]
};

// RNNGate of the published sizes, where only latency counts. The weights depend on no grid before: they come into
// shared memory while that is still at work, and into registers while pooled sums are waited for. What the LSTM makes
// of the embedded feature is a sum over the warps, of which each takes its own part that far: they meet in one barrier.
// The order of all sums is the layer's; products are added by fmaf, so that the compiler has no choice between a launch
// of its own and a convolution's tail.
class PublishedRnn {
    static constexpr int kSize = 10, kRows = 4 * kSize, kPairs = 4;
    static constexpr int kApart = 4 * kGateThreads;  // numbers that the thread block takes at a time

public:
    // A thread takes four neighbouring numbers at a time, in pairs: of the image's pooled sums [tiles, channels], as
    // one row of numbers, and of a row of the embedding's weights. Up to kApart channels threads stand side by side
    // over whole tiles, and a pair is of the same channels, some tiles apart. Beyond, it is of one tile, kApart
    // channels apart, and the next channels come after all tiles.
    struct Sums {
        float4 pairs[kPairs][2] = {};
    };
    // Where some of an image's sums are, and how many numbers there are from a pair's first four on, and its second.
    struct SumsAt {
        const float* from;
        int left[2];
    };
    // A lane's share of the image's state.
    struct State {
        float hidden, cell;
    };
    // What state and sums meet: an embedding's products, a row of what a warp makes of the state, and two of what a
    // lane makes of the embedded feature.
    struct Weights {
        float4 embedding[2][kSize];
        float embedding_bias, hidden[kSize], bias, input[2][kSize], projection;
    };

    PublishedRnn() = default;
    PublishedRnn(const Embedding& embedding, const Lstm& lstm, float* hidden, float* cell)
        : embedding_(embedding), lstm_(lstm), hidden_(hidden), cell_(cell), channels_(embedding.channels) {
        const bool many = embedding.channels > kApart;
        to_second_ = many ? kApart : kApart / embedding.channels * embedding.channels;
        to_next_ = many ? embedding.channels : 2 * to_second_;
        further_ = many ? kApart : 0;
    }

    // Whether sizes are the published ones, and the weights come in pieces of 16 bytes.
    static bool knows(const Embedding& embedding, const Lstm& lstm) {
        return lstm.embed == kSize && lstm.hidden == kSize && embedding.channels % 4 == 0;
    }
    // That it takes in shared memory.
    int bytes() const { return 4 * (kEmbedding + kSize * embedding_.channels); }

    // Begins to bring the weights into shared memory, as a group of cp.async.
    __device__ void stage(float* shared) const {
        const auto copy = [&](int place, const float* from, int floats) {
#pragma unroll 2
            for (int i = 4 * threadIdx.x; i < floats; i += kApart) cp_async16(shared + place + i, from + i);
        };
        copy(kInput, lstm_.input_weight, kRows * kSize);
        copy(kHidden, lstm_.hidden_weight, kRows * kSize);
        copy(kBias, lstm_.bias, kRows);
        copy(kEmbedding, embedding_.weight, kSize * channels());
        cp_async_commit();
    }

    // The image's first sums, or those from a pair and from a channel on.
    __device__ SumsAt sums_of(const PooledSums& pooled, int image, int start = 0, int channel = 0) const {
        const int all = pooled.tiles * channels(), mine = channel + 4 * static_cast<int>(threadIdx.x);
        SumsAt sums{pooled.sums + static_cast<std::int64_t>(image) * all + mine + start, {}};
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (mine + i * further_ < max(channels(), to_second_)) sums.left[i] = all - mine - start - i * to_second_;
        return sums;
    }
    // Into zeros.
    __device__ void load(Sums& sums, const SumsAt& at) const {
#pragma unroll
        for (int k = 0; k < kPairs; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                load_past_l1(sums.pairs[k][i], reinterpret_cast<const float4*>(at.from + k * to_next_ + i * to_second_),
                             k * to_next_ < at.left[i]);
    }

    __device__ State state_of(int image) const {
        const std::int64_t place = place_of(image);
        State state;
        load_global(state.hidden, hidden_ + place);
        load_global(state.cell, cell_ + place);
        return state;
    }

    // The weights, once they have landed.
    __device__ Weights weights(const float* shared) const {
        const int lane = threadIdx.x % 32, row = row_of_state();
        Weights weights;
        load(weights.embedding, shared, 0);
        weights.embedding_bias = 0.0f;  // in one warp
        if (threadIdx.x < 32) weights.embedding_bias = embedding_.bias[min(held<16, 1, kSize>(lane), kSize - 1)];
        weights.projection = lane < kSize ? lstm_.projection_weight[lane] : 0.0f;
        weights.bias = load_shared(shared + kBias + row);
#pragma unroll
        for (int k = 0; k < kSize; k += 2) load_two(weights.hidden + k, shared + kHidden + row * kSize + k);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int k = 0; k < kSize; k += 2)
                load_two(weights.input[i] + k, shared + kInput + row_of(lane, i) * kSize + k);
        keep_order();
        return weights;
    }

    __device__ float logit(int warp, const PooledSums& pooled, int image, float* shared, const State& state, Sums& sums,
                           Weights& weights) const {
        const int lane = threadIdx.x % 32;
        // What the state adds to the LSTM's four gates, one for each warp: while the sums are waited for.
        float recalled = weights.bias;
#pragma unroll
        for (int k = 0; k < kSize; ++k) recalled = fmaf(weights.hidden[k], __shfl_sync(~0u, state.hidden, k), recalled);
        store_shared(shared + kGateWarps * kRows + row_of_state(), recalled);
        const float share = fast_reciprocal(static_cast<float>(pooled.pixels));
        const float part = fmaf(share, embed(pooled, image, shared, sums, weights), weights.embedding_bias);
        float rows[2] = {};
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
            const float feature = __shfl_sync(~0u, part, holder<16, 1, kSize>(k));
#pragma unroll
            for (int i = 0; i < 2; ++i) rows[i] = fmaf(weights.input[i][k], feature, rows[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) store_shared(shared + warp * kRows + row_of(lane, i), rows[i]);
        __syncthreads();
        if (warp > 0) return 0.0f;
        // The first lanes have a unit's forget and output gate, those from 16 on its input gate and candidate.
        const bool candidate = lane >= 16;
        const float scale = candidate ? 2.0f : 1.0f;  // tanh(x) is 2 sigmoid(2 x) - 1
        const float gate = fast_sigmoid(sum_of_row(shared + row_of(lane, 0)));
        const float other = fmaf(scale, fast_sigmoid(scale * sum_of_row(shared + row_of(lane, 1))), 1.0f - scale);
        const float half = gate * (candidate ? other : state.cell);
        const float cell = half + __shfl_xor_sync(~0u, half, 16);
        const float hidden = other * fast_tanh(cell);
        (candidate ? cell_ : hidden_)[place_of(image)] = candidate ? cell : hidden;
        // Of sixteen lanes, in two rounds.
        float logit = weights.projection * hidden;
        logit = (logit + __shfl_xor_sync(~0u, logit, 1)) +
                (__shfl_xor_sync(~0u, logit, 2) + __shfl_xor_sync(~0u, logit, 3));
        logit = (logit + __shfl_xor_sync(~0u, logit, 4)) + __shfl_xor_sync(~0u, logit, 8);
        return logit + lstm_.projection_bias;
    }

    // In a launch of its own: what depends on no grid before, and the rest.
    struct Ready {
        SumsAt sums;
        Weights weights;
    };
    __device__ Ready ready(const PooledSums& pooled, int image, const float* shared) const {
        cp_async_wait<0>();
        __syncthreads();
        Ready ready;
        ready.sums = sums_of(pooled, image);
        ready.weights = weights(shared);
        return ready;
    }
    __device__ float logit(int warp, const PooledSums& pooled, int image, float* shared, Ready& ready) const {
        const State state = state_of(image);
        Sums sums;
        load(sums, ready.sums);
        return logit(warp, pooled, image, shared, state, sums, ready.weights);
    }

private:
    // Places in shared memory; first comes what rows of the LSTM are the sum of, [kGateWarps + 1, kRows].
    static constexpr int kInput = (kGateWarps + 1) * kRows, kHidden = kInput + kRows * kSize,
                         kBias = kHidden + kRows * kSize, kEmbedding = kBias + kRows;
    static_assert(kInput % 4 == 0 && kEmbedding % 4 == 0, "pieces of 16 bytes");

    // A lane's unit of the state.
    __device__ static std::int64_t place_of(int image) {
        return static_cast<std::int64_t>(image) * kSize + min(threadIdx.x % 16, kSize - 1u);
    }
    // A lane's row of the LSTM, of its warp's gate.
    __device__ static int row_of_state() { return threadIdx.x / 32 * kSize + min(threadIdx.x % 32, kSize - 1u); }
    // The two rows of the LSTM that a lane has, of PyTorch's i, f, g, o. Lanes beyond the last unit have that one's.
    __device__ static int row_of(int lane, int i) { return (2 * i + (lane < 16)) * kSize + min(lane % 16, kSize - 1); }
    __device__ static float sum_of_row(const float* row) {
        const auto part = [&](int number) { return load_shared(row + number * kRows); };
        return (part(0) + part(1)) + (part(2) + part(3)) + part(4);
    }
    __device__ static void load_two(float* two, const float* from) {
        const float2 loaded = load_shared(reinterpret_cast<const float2*>(from));
        two[0] = loaded.x, two[1] = loaded.y;
    }

    // For channels that there are not, some others'.
    __device__ void load(float4 (&weights)[2][kSize], const float* shared, int channel) const {
        int mine = 4 * threadIdx.x;
        channels_.divide(mine);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float* from = shared + kEmbedding + min(channel + mine + i * further_, channels() - 4);
#pragma unroll
            for (int row = 0; row < kSize; ++row)
                weights[i][row] = load_shared(reinterpret_cast<const float4*>(from + row * channels()));
        }
    }
    __device__ int channels() const { return channels_.value(); }

    // The embedding's products with a warp's sums, each in its `holder`. While some are added the next are on their
    // way.
    __device__ float embed(const PooledSums& pooled, int image, const float* shared, Sums& sums,
                           Weights& weights) const {
        float totals[kSize] = {};
        float4 features[2] = {};
        const auto add = [&] {
#pragma unroll
            for (const auto& pair : sums.pairs)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    features[i].x += pair[i].x;
                    features[i].y += pair[i].y;
                    features[i].z += pair[i].z;
                    features[i].w += pair[i].w;
                }
        };
        const auto multiply = [&] {
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int row = 0; row < kSize; ++row) {
                    const float4& weight = weights.embedding[i][row];
                    totals[row] = fmaf(weight.x, features[i].x, totals[row]);
                    totals[row] = fmaf(weight.y, features[i].y, totals[row]);
                    totals[row] = fmaf(weight.z, features[i].z, totals[row]);
                    totals[row] = fmaf(weight.w, features[i].w, totals[row]);
                }
        };
        int start = 0, channel = 0;
        const auto goes_on = [&] {
            start += kPairs * to_next_;
            if (start >= pooled.tiles * channels()) start = 0, channel += 2 * kApart;
            return channel < channels();
        };
#pragma unroll 1
        while (goes_on()) {
            Sums next;
            load(next, sums_of(pooled, image, start, channel));
            keep_order();
            add();
            if (start == 0) {
                multiply();
                features[0] = features[1] = {};
                load(weights.embedding, shared, channel);
            }
            sums = next;
        }
        add();
        multiply();
        return spread_sums<16, 1>(totals, threadIdx.x % 32);
    }

    Embedding embedding_;
    Lstm lstm_;
    float *hidden_, *cell_;  // [batch, kSize]
    Divisor channels_;
    int to_second_, to_next_;  // numbers from a pair's first four to its second, from a pair to the next one
    int further_;              // channels from a pair's first four to its second
};

class Feedforward {
public:
    explicit Feedforward(const FeedforwardTail& tail) : tail_(tail) {}

    // That it takes in shared memory.
    int bytes() const { return 4 * kGateWarps; }

    __device__ void stage(float*) const {}
    struct Ready {};
    __device__ Ready ready(const PooledSums&, int, const float*) const { return {}; }
    __device__ float logit(int, const PooledSums& pooled, int image, float* shared, Ready) const {
        multiply<1>(tail_.weight, 1, tail_.channels, pooled, image, shared);
        __syncthreads();
        return product(shared, 1, 0) / static_cast<float>(pooled.pixels) + tail_.bias;
    }

private:
    FeedforwardTail tail_;
};

// sigmoid(logit) in a few instructions, on the side of 0.5 where executes_logit has it. NaN stays NaN.
__device__ inline float probability_of(float logit) {
    constexpr float kHalf = 0.5f, kMore = 0x1.000002p-1f;
    const float probability = fast_sigmoid(logit);
    if (executes_logit(logit)) return fmaxf(probability, kMore);
    return probability > kHalf ? kHalf : probability;
}

// What an image is made to do, if it is: loaded early, by the thread that decides.
__device__ inline int forced_decision(const Decision& decision, int image) {
    return decision.forced && threadIdx.x == 0 ? decision.forced[image] : 0;
}

// One image's decision, of `images`; the thread block that finishes last lists who executes. Few images' decisions are
// in the word that counts the arrivals, so that the last one need not look for them.
__device__ inline void decide_and_compact(int warp, float logit, int forced, const Decision& decision, int image,
                                          int images, const RowList& list, int* arrivals, void* shared) {
    if (warp == 0) {
        const bool executes = executes_logit(logit), decides = threadIdx.x == 0, alone = images == 1;
        // Looked at here and not before, where it would be waited for.
        const bool executed = decision.forced ? in_register(forced) != 0 : executes;
        store_global(list.rows, executed ? 0 : -1, decides && alone);  // an image alone needs nobody to list it
        store_global(list.count, static_cast<int>(executed), decides && alone);
        store_past_l1(decision.executed + image, executed, decides);
        store_global(decision.logit + image, logit, decides);
        store_global(decision.probability + image, probability_of(logit), decides);
        if (!alone && images <= kFlagsInWord) compact_in_warp(executed, image, images, list, arrivals);
    }
    if (images > kFlagsInWord && comes_last(arrivals, images))
        compact_in_block<kGateThreads>(decision.executed, images, list, static_cast<int*>(shared));
}

}  // namespace skipnet::cuda
