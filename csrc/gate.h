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

// One unit's new state from its four gates' sums.
SKIPNET_HD inline void lstm_unit(float input, float forget, float candidate, float output, float& hidden, float& cell) {
    const float kept = sigmoid(forget) * cell;
    cell = kept + sigmoid(input) * tanhf(candidate);
    hidden = sigmoid(output) * tanhf(cell);
}

// Writes one image's logit and probability, and says whether it executes; its caller writes that.
SKIPNET_HD inline bool decide(const Decision& decision, int image, float logit) {
    const float probability = sigmoid(logit);
    decision.logit[image] = logit;
    decision.probability[image] = probability;
    return decision.forced ? decision.forced[image] : executes(probability);
}

}  // namespace skipnet
