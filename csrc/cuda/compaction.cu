// Compaction by itself.
#include "compaction.cuh"

#include "../check.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace skipnet::cuda {
namespace {

constexpr int kCompactionThreads = 1024;

// One block for any batch: 4,096 images a round.
__global__ void __launch_bounds__(kCompactionThreads) compact_kernel(const bool* executed, int batch, RowList list) {
    compact_in_block<kCompactionThreads>(executed, batch, list, reinterpret_cast<int*>(shared_memory()));
}

}  // namespace

void compact(const bool* executed, int batch, const RowList& list, Stream stream) {
    check(batch >= 0, "batch: expected 0 or more, got ", batch);
    launch("compact", compact_kernel, {1, kCompactionThreads, kCompactionThreads / 32 * sizeof(int)}, stream, executed,
           batch, list);
}

}  // namespace skipnet::cuda
