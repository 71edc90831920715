// Entries for tests/simulated/test_simt_gate_step.py.
#include "simt.h"

#include "cuda/compaction.cu"
#include "cuda/gate_step.cu"

using namespace skipnet;

extern "C" {

const char* run_compact(const bool* executed, int batch, int* rows, int* count) {
    return simt::report([=] { cuda::compact(executed, batch, {rows, count}, nullptr); });
}

const char* run_rnn(int batch, const int* present, int channels, int embed, int hidden_size,
                    const float* embedding_weight, const float* embedding_bias, const float* input_weight,
                    const float* hidden_weight, const float* bias, const float* projection_weight,
                    float projection_bias, const float* sums, int tiles, int pixels, float* hidden, float* cell,
                    float* logit, float* probability, bool* executed, const bool* forced, int* rows, int* count,
                    int* arrivals) {
    const Lstm lstm{embed, hidden_size, input_weight, hidden_weight, bias, projection_weight, projection_bias};
    return simt::report([=] {
        cuda::gate_step({channels, embedding_weight, embedding_bias}, lstm, batch, present, {sums, tiles, pixels},
                        hidden, cell, {logit, probability, executed, forced}, {rows, count}, arrivals, false, nullptr);
    });
}

const char* run_feedforward(int batch, const int* present, int channels, const float* weight, float bias,
                            const float* sums, int tiles, int pixels, float* logit, float* probability, bool* executed,
                            const bool* forced, int* rows, int* count, int* arrivals) {
    return simt::report([=] {
        cuda::gate_step(FeedforwardTail{channels, weight, bias}, batch, present, {sums, tiles, pixels},
                        {logit, probability, executed, forced}, {rows, count}, arrivals, false, nullptr);
    });
}
}
