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
                     int* arrivals) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    let_next_grid();
    gate.stage(shared);
    const int image = blockIdx.x, warp = own_warp();
    auto ready = gate.ready(pooled, image, shared);
    wait_for_previous_grid();
    const int images = images_of(present, batch);
    if (image < images) {
        const int forced = forced_decision(decision, image);
        const float logit = gate.logit(warp, pooled, image, shared, ready);
        decide_and_compact(warp, logit, forced, decision, image, images, list, arrivals, shared);
    } else if (image == 0 && threadIdx.x == 0) {
        *list.count = 0;
    }
}

template <typename Gate>
void launch_gate_step(const Gate& gate, int batch, const int* present, const PooledSums& pooled,
                      const Decision& decision, const RowList& list, int* arrivals, bool dependent, Stream stream) {
    check(batch >= 0, "batch: expected 0 or more, got ", batch);
    check(pooled.tiles >= 1 && pooled.pixels >= 1, "pooled: expected tiles and pixels, got ", pooled.tiles, " and ",
          pooled.pixels);
    if (batch == 0) return compact(decision.executed, 0, list, stream);
    const auto kernel = gate_step_kernel<Gate>;
    allow_shared_memory(kernel);
    Grid grid{static_cast<unsigned>(batch), kGateThreads, static_cast<std::size_t>(gate.bytes())};
    grid.allowed = true;
    grid.dependent = dependent;
    launch("gate_step", kernel, grid, stream, gate, batch, present, pooled, decision, list, arrivals);
}

}  // namespace

void gate_step(const Embedding& embedding, const Lstm& lstm, int batch, const int* present, const PooledSums& pooled,
               float* hidden, float* cell, const Decision& decision, const RowList& list, int* arrivals, bool dependent,
               Stream stream) {
    const auto launch = [&](const auto& gate) {
        launch_gate_step(gate, batch, present, pooled, decision, list, arrivals, dependent, stream);
    };
    const PublishedRnn published(embedding, lstm, hidden, cell);
    if (PublishedRnn::knows(embedding, lstm) && published.bytes() <= shared_memory_limit())
        launch(published);
    else
        launch(Rnn(embedding, lstm, hidden, cell));
}

void gate_step(const FeedforwardTail& tail, int batch, const int* present, const PooledSums& pooled,
               const Decision& decision, const RowList& list, int* arrivals, bool dependent, Stream stream) {
    launch_gate_step(Feedforward(tail), batch, present, pooled, decision, list, arrivals, dependent, stream);
}

}  // namespace skipnet::cuda
