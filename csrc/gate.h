// The gate step's arithmetic, one definition for host and device, always in float32.
// Source: SkipNet paper, section 3.1; the LSTM cell is PyTorch's torch.nn.LSTMCell.
#pragma once

#include <cmath>

#include "network.h"

#ifdef __CUDACC__
#define SKIPNET_HD __host__ __device__
#else
#define SKIPNET_HD
#endif

namespace skipnet {

SKIPNET_HD inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// Of two neighbouring floats the lower one: a logit has to be above it for `sigmoid`, rounded at every step, to come
// out above 0.5. 1 + exp(-z) is below 2 from there on.
constexpr float kSkippedLogit = 0x1.8p-24f;

// executes(sigmoid(logit)), without the sigmoid.
SKIPNET_HD inline bool executes_logit(float logit) { return logit > kSkippedLogit; }

// Exactly 0.5 skips, and so does NaN.
SKIPNET_HD inline bool executes(float probability) { return probability > 0.5f; }

// sum_k weight[k] * x[k] + start, in ascending k: the order is part of an image's result.
SKIPNET_HD inline float dot(const float* weight, const float* x, int size, float start) {
    float sum = start;
    for (int k = 0; k < size; ++k) sum += weight[k] * x[k];
    return sum;
}

// Row k of the 4 * hidden sums that go into the LSTM's gates.
SKIPNET_HD inline float lstm_gate(const Lstm& lstm, int k, const float* feature, const float* hidden) {
    const float from_input = dot(lstm.input_weight + k * lstm.embed, feature, lstm.embed, lstm.bias[k]);
    return dot(lstm.hidden_weight + k * lstm.hidden, hidden, lstm.hidden, from_input);
}

// One unit's new state from its four gates' sums.
SKIPNET_HD inline void lstm_unit(float input, float forget, float candidate, float output, float& hidden, float& cell) {
    const float kept = sigmoid(forget) * cell;
    cell = kept + sigmoid(input) * tanhf(candidate);
    hidden = sigmoid(output) * tanhf(cell);
}

// Writes one image's decision.
SKIPNET_HD inline void decide(const Decision& decision, int image, float logit) {
    const float probability = sigmoid(logit);
    decision.logit[image] = logit;
    decision.probability[image] = probability;
    decision.executed[image] = decision.forced ? decision.forced[image] : executes(probability);
}

}  // namespace skipnet
