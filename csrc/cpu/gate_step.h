// The gate's arithmetic for one image in vectors, always in float32, for one instruction set; see vector.h.
#pragma once

#include "engine.h"
#include "vector.h"

namespace skipnet::cpu {
namespace {

// The LSTM for one image in vectors: lanes are hidden units, each gate (i, f, g, o) in vectors of its own.
class LstmCell {
public:
    LstmCell(const Lstm& lstm)
        : embed_(lstm.embed), hidden_(lstm.hidden), lanes_(padded(hidden_)),
          weight_(static_cast<std::size_t>(embed_ + hidden_) * 4 * lanes_), bias_(4 * lanes_), projection_(lanes_),
          projection_bias_(lstm.projection_bias) {
        for (int gate = 0; gate < 4; ++gate)
            for (int unit = 0; unit < hidden_; ++unit) {
                const int from = gate * hidden_ + unit, to = gate * lanes_ + unit;
                bias_.get()[to] = lstm.bias[from];
                for (int k = 0; k < embed_; ++k)
                    weight_.get()[k * 4 * lanes_ + to] = lstm.input_weight[from * embed_ + k];
                for (int k = 0; k < hidden_; ++k)
                    weight_.get()[(embed_ + k) * 4 * lanes_ + to] = lstm.hidden_weight[from * hidden_ + k];
            }
        for (int unit = 0; unit < hidden_; ++unit) projection_.get()[unit] = lstm.projection_weight[unit];
    }

    int embed() const { return embed_; }
    int hidden() const { return hidden_; }
    int lanes() const { return lanes_; }

    // An image's state before its first step; hidden and cell as for step().
    void reset(float* hidden, float* cell) const {
        std::memset(hidden, 0, lanes_ * sizeof(float));
        std::memset(cell, 0, lanes_ * sizeof(float));
    }

    // Advances hidden, [lanes], and cell, [2 * lanes] of which the second half is scratch, from the embedded
    // feature, [embed]; returns the execute logit.
    float step(const float* feature, float* hidden, float* cell) const {
        for (int lane = 0; lane < lanes_; lane += kWidth) {
            Vector gates[4];
            for (int gate = 0; gate < 4; ++gate) gates[gate] = load(bias_.get() + gate * lanes_ + lane);
            for (int k = 0; k < embed_ + hidden_; ++k) {
                const Vector x = broadcast(k < embed_ ? feature[k] : hidden[k - embed_]);
                for (int gate = 0; gate < 4; ++gate)
                    gates[gate] += x * load(weight_.get() + (k * 4 + gate) * lanes_ + lane);
            }
            const Vector kept = sigmoid(gates[1]) * load(cell + lane);
            const Vector next = kept + sigmoid(gates[0]) * tanh(gates[2]);
            store(cell + lane, next);
            store(output_of(cell, lane), sigmoid(gates[3]) * tanh(next));
        }
        std::memcpy(hidden, output_of(cell, 0), lanes_ * sizeof(float));
        float logit = projection_bias_;
        for (int unit = 0; unit < hidden_; ++unit) logit += projection_.get()[unit] * hidden[unit];
        return logit;
    }

    // Hands over an image's state after its last step.
    void finish(const float* hidden, const float* cell, const Call& call, std::size_t image) const {
        std::memcpy(call.hidden + image * hidden_, hidden, hidden_ * sizeof(float));
        std::memcpy(call.cell + image * hidden_, cell, hidden_ * sizeof(float));
    }

private:
    // The new hidden state waits behind the cell until all lanes have read the old one.
    float* output_of(float* cell, int lane) const { return cell + lanes_ + lane; }

    int embed_, hidden_, lanes_;
    Buffer weight_;      // [embed + hidden, 4, lanes]
    Buffer bias_;        // [4, lanes]
    Buffer projection_;  // [lanes]
    float projection_bias_;
};

// A matrix that maps a pooled feature to embeddings or to logits: lanes are outputs.
class Linear {
public:
    Linear(const float* weight /* [out, in] */, const float* bias /* [out] */, int in, int out)
        : in_(in), out_(out), lanes_(padded(out)), weight_(static_cast<std::size_t>(in) * lanes_), bias_(lanes_) {
        for (int o = 0; o < out; ++o) {
            bias_.get()[o] = bias[o];
            for (int c = 0; c < in; ++c) weight_.get()[c * lanes_ + o] = weight[static_cast<std::size_t>(o) * in + c];
        }
    }

    void run(const float* x /* [in] */, float* y /* [out] */) const {
        for (int lane = 0; lane < lanes_; lane += kWidth) {
            Vector sums[4] = {load(bias_.get() + lane)};  // four chains: one would wait for itself
            for (int c = 0; c < in_; ++c) sums[c % 4] += broadcast(x[c]) * load(weight_.get() + c * lanes_ + lane);
            float result[kWidth];
            store(result, (sums[0] + sums[1]) + (sums[2] + sums[3]));
            for (int o = lane; o < out_ && o < lane + kWidth; ++o) y[o] = result[o - lane];
        }
    }

private:
    int in_, out_, lanes_;
    Buffer weight_;  // [in, lanes]
    Buffer bias_;    // [lanes]
};

// to[c] = sum over i < count of from[i * channels + c], divided by `pixels`; in ascending i.
inline void average(const float* from, int count, int channels, int pixels, float* to) {
    for (int c = 0; c < channels; c += kWidth) {
        Vector sum = {};
        for (int i = 0; i < count; ++i) sum += load(from + i * channels + c);
        store(to + c, sum / broadcast(static_cast<float>(pixels)));
    }
}

// Writes one image's decision to place `to` of the call's; returns whether the image executes the next block.
inline bool decide(const Call& call, std::size_t to, bool forced, float logit) {
    const float probability = sigmoid(broadcast(logit))[0];
    const bool executes = forced ? call.forced[to] : probability > 0.5f;  // half and NaN skip
    call.gate_logits[to] = logit;
    call.probabilities[to] = probability;
    call.executed[to] = executes;
    return executes;
}

// What an image carries from gate to gate.
struct GateState {
    Buffer embedded;      // [embed]
    Buffer hidden, cell;  // [lanes], [2 * lanes]
};

// All gates of a network, of either kind: what follows the pooled feature.
class Gates {
public:
    explicit Gates(const NetworkWeights& weights) {
        for (const Embedding& gate : weights.embeddings)
            linear_.emplace_back(gate.weight, gate.bias, gate.channels, weights.lstm.embed);
        for (const FeedforwardTail& gate : weights.tails)
            linear_.emplace_back(gate.weight, &gate.bias, gate.channels, 1);
        if (!weights.embeddings.empty()) cell_ = std::make_unique<LstmCell>(weights.lstm);
    }

    bool recurrent() const { return cell_ != nullptr; }

    GateState make_state() const {
        const int lanes = cell_ ? cell_->lanes() : 0;
        return {Buffer(cell_ ? cell_->embed() : 0), Buffer(lanes), Buffer(2 * lanes)};
    }

    void reset(GateState& state) const {
        if (cell_) cell_->reset(state.hidden.get(), state.cell.get());
    }

    // The execute logit of gate `index`. pooled: [channels], of the activation (RNNGate), or of the gate's last feature
    // map.
    float logit(int index, const float* pooled, GateState& state) const {
        float logit;
        linear_[index].run(pooled, cell_ ? state.embedded.get() : &logit);
        return cell_ ? cell_->step(state.embedded.get(), state.hidden.get(), state.cell.get()) : logit;
    }

    // Hands over the state after the last gate.
    void finish(const GateState& state, const Call& call, std::size_t image) const {
        if (cell_) cell_->finish(state.hidden.get(), state.cell.get(), call, image);
    }

private:
    std::vector<Linear> linear_;  // one per block: embeddings or tails
    std::unique_ptr<LstmCell> cell_;
};

}  // namespace
}  // namespace skipnet::cpu
