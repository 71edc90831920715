// The gate step by itself: a thread block takes an image from pooled sums to its decision; the last one lists who
// executes.
#include "gate_step.cuh"

#include <algorithm>

#include "../check.h"
#include "launch.cuh"

namespace skipnet::cuda {
namespace {

template <typename Gate>
__global__ void __launch_bounds__(Gate::kThreads)
    gate_step_kernel(Gate gate, int batch, const int* present, PooledSums pooled, Decision decision, RowList list,
                     int* arrivals) {
    let_next_grid();
    wait_for_previous_grid();
    const int image = blockIdx.x, images = images_of(present, batch);
    if (image < images)
        decide_and_compact(gate, pooled, decision, image, images, list, arrivals,
                           reinterpret_cast<float*>(shared_memory()));
    else if (image == 0 && threadIdx.x == 0)
        *list.count = 0;
}

template <typename Gate>
void launch_gate_step(const Gate& gate, int scratch, int batch, const int* present, const PooledSums& pooled,
                      const Decision& decision, const RowList& list, int* arrivals, bool dependent, Stream stream) {
    check(batch >= 0, "batch: expected 0 or more, got ", batch);
    check(pooled.tiles >= 1 && pooled.pixels >= 1, "pooled: expected tiles and pixels, got ", pooled.tiles, " and ",
          pooled.pixels);
    if (batch == 0) return compact(decision.executed, 0, list, stream);
    Grid grid{static_cast<unsigned>(batch), Gate::kThreads, std::max(scratch, kGateWarps) * sizeof(float)};
    grid.dependent = dependent;
    launch("gate_step", gate_step_kernel<Gate>, grid, stream, gate, batch, present, pooled, decision, list, arrivals);
}

}  // namespace

void gate_step(const Embedding& embedding, const Lstm& lstm, int batch, const int* present, const PooledSums& pooled,
               float* hidden, float* cell, const Decision& decision, const RowList& list, int* arrivals, bool dependent,
               Stream stream) {
    using Gate = Rnn<kGateWarps>;
    launch_gate_step(Gate(embedding, lstm, hidden, cell), Gate::scratch(lstm), batch, present, pooled, decision, list,
                     arrivals, dependent, stream);
}

void gate_step(const FeedforwardTail& tail, int batch, const int* present, const PooledSums& pooled,
               const Decision& decision, const RowList& list, int* arrivals, bool dependent, Stream stream) {
    launch_gate_step(Feedforward(tail), kGateWarps, batch, present, pooled, decision, list, arrivals, dependent,
                     stream);
}

}  // namespace skipnet::cuda
