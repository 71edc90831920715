// The gate step by itself: a thread block takes an image from pooled sums to its decision; the last one lists who
// executes.
#include "gate_step.cuh"

#include "../check.h"
#include "launch.cuh"

namespace skipnet::cuda {
namespace {

template <typename Gate>
__global__ void __launch_bounds__(kGateThreads, 2)
    gate_step_kernel(Gate gate, int batch, const int* present, PooledSums pooled, Decision decision, RowList list,
                     int* arrivals, int scratch) {
    float* shared = reinterpret_cast<float*>(shared_memory());  // [scratch], then the weights
    let_next_grid();
    gate.stage(shared + scratch);
    wait_for_previous_grid();
    const int image = blockIdx.x, images = images_of(present, batch);
    if (image < images)
        decide_and_compact(gate, pooled, decision, image, images, list, arrivals, shared, shared + scratch);
    else if (image == 0 && threadIdx.x == 0)
        *list.count = 0;
    cp_async_wait<0>();  // where there is no image, too
}

// `scratch` and `weights` in floats.
template <typename Gate>
void launch_gate_step(const Gate& gate, int scratch, int weights, int batch, const int* present,
                      const PooledSums& pooled, const Decision& decision, const RowList& list, int* arrivals,
                      bool dependent, Stream stream) {
    check(batch >= 0, "batch: expected 0 or more, got ", batch);
    check(pooled.tiles >= 1 && pooled.pixels >= 1, "pooled: expected tiles and pixels, got ", pooled.tiles, " and ",
          pooled.pixels);
    if (batch == 0) return compact(decision.executed, 0, list, stream);
    const auto kernel = gate_step_kernel<Gate>;
    allow_shared_memory(kernel);
    Grid grid{static_cast<unsigned>(batch), kGateThreads, (scratch + weights) * sizeof(float)};
    grid.allowed = true;
    grid.dependent = dependent;
    launch("gate_step", kernel, grid, stream, gate, batch, present, pooled, decision, list, arrivals, scratch);
}

}  // namespace

void gate_step(const Embedding& embedding, const Lstm& lstm, int batch, const int* present, const PooledSums& pooled,
               float* hidden, float* cell, const Decision& decision, const RowList& list, int* arrivals, bool dependent,
               Stream stream) {
    const int scratch = gate_scratch(lstm), weights = gate_weights(embedding, lstm);
    const auto launch = [&](auto gate, int staged) {
        launch_gate_step(gate, scratch, staged, batch, present, pooled, decision, list, arrivals, dependent, stream);
    };
    if (can_stage(embedding, lstm, shared_memory_limit()))
        launch(Rnn<true>(embedding, lstm, hidden, cell), weights);
    else
        launch(Rnn<false>(embedding, lstm, hidden, cell), 0);
}

void gate_step(const FeedforwardTail& tail, int batch, const int* present, const PooledSums& pooled,
               const Decision& decision, const RowList& list, int* arrivals, bool dependent, Stream stream) {
    launch_gate_step(Feedforward(tail), kGateWarps, 0, batch, present, pooled, decision, list, arrivals, dependent,
                     stream);
}

}  // namespace skipnet::cuda
