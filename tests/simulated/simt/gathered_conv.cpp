// Entries for tests/simulated/test_simt_gathered_conv.py.
#include "simt.h"

#include "cuda/gathered_conv.cu"

using namespace skipnet::cuda;

namespace {

// Whether some lanes of a warp, `at_once` of them side by side, meet a bank with pieces of so many floats.
template <typename Offset>
bool meet(int at_once, int floats, Offset offset) {
    for (int first = 0; first < 32; first += at_once)
        for (int lane = first; lane < first + at_once; ++lane)
            for (int other = first; other < lane; ++other)
                if (offset(lane) / floats % (32 / floats) == offset(other) / floats % (32 / floats)) return true;
    return false;
}

// The product's way through shared memory: as tensor cores leave it, as the epilogue reads it.
template <typename Tile>
int staging_conflicts() {
    const auto stored = [](int lane) { return lane / 4 * Tile::kStagingStride + Tile::staged(0) + lane % 4 * 2; };
    const auto read = [](int lane) {
        return lane / Tile::kColumns * Tile::kStagingStride + Tile::staged(lane % Tile::kColumns * kChannels);
    };
    return meet(16, 2, stored) + meet(8, 4, read);
}

}  // namespace

extern "C" {

// counts: [ldmatrix' phases, those that meet a bank twice, cp.async's, those that do] since the last call.
const char* count_conflicts(int* counts) {
    counts[0] = std::exchange(simt::ldmatrix_phases, 0);
    counts[1] = std::exchange(simt::ldmatrix_conflicts, 0);
    counts[2] = simt::copy_phases.phases;
    counts[3] = simt::copy_phases.conflicts;
    simt::copy_phases.clear();
    simt::counts_copies = true;
    return nullptr;
}

// Not of the narrow tile: with 32 columns either way has to meet a bank twice, and the epilogue's does.
int count_staging_conflicts() { return staging_conflicts<Small<Half>>() + staging_conflicts<Large<Half, false>>(); }

const char* run_gathered_conv(int type, int in, int out, int kernel, int stride, const void* weight, const float* bias,
                              int batch, int height, int width, int* rows, int* count, bool gathers, bool scatters,
                              bool relu, const void* x, const void* residual, void* y, float* sums, float* partial_sums,
                              int* partial_arrivals, bool pixels_are_images, bool pairs) {
    const Convolution layer{in, out, kernel, stride, weight, bias, pairs};
    const RowList list{rows, count};
    return simt::report([=] {
        gathered_conv(static_cast<ElementType>(type), layer,
                      {batch,
                       height,
                       width,
                       rows ? &list : nullptr,
                       gathers,
                       scatters,
                       relu,
                       x,
                       residual,
                       y,
                       sums,
                       {partial_sums, partial_arrivals},
                       pixels_are_images},
                      nullptr);
    });
}

int count_partial_sums(int type, int in, int out, int kernel, int stride, int batch, int height, int width) {
    return partial_sums(static_cast<ElementType>(type), {in, out, kernel, stride, nullptr, nullptr}, batch, height,
                        width);
}

// What a float16 convolution's launch would be on a GPU of so many multiprocessors; nothing runs. plan: [thread blocks,
// their threads, their bytes of shared memory, launches (a gate's own among them), slices of K].
const char* plan_gathered_conv(int in, int out, int kernel, int batch, int side, bool pools, bool gates,
                               int multiprocessors, int* plan) {
    using simt::machine;
    float place = 0;
    const Convolution layer{in, out, kernel, 1, nullptr, nullptr};
    GateTail gate{};
    gate.embedding.channels = out;
    gate.lstm.embed = gate.lstm.hidden = 10;
    GatheredConv call{};
    call.batch = batch;
    call.height = call.width = side;
    call.sums = pools ? &place : nullptr;
    call.partial = {&place, nullptr};
    call.gate = gates ? &gate : nullptr;
    call.dependent = true;
    const char* error = simt::report([&] {
        machine.synchronize();
        machine.launched.clear();
        const int before = machine.multiprocessors;
        machine.multiprocessors = multiprocessors;
        gathered_conv(ElementType::float16, layer, call, nullptr);
        machine.multiprocessors = before;
        machine.discard();
    });
    if (machine.launched.empty()) return error;
    const auto& first = machine.launched.front();
    plan[0] = first.blocks, plan[1] = first.threads, plan[2] = first.shared;
    plan[3] = static_cast<int>(machine.launched.size());
    plan[4] = split_k_slices<Half>(layer, side * side);
    machine.launched.clear();
    return error;
}

int count_pooled_tiles(int kernel, int stride, int height, int width) {
    return pooled_tiles({8, 8, kernel, stride, nullptr, nullptr}, height, width);
}
}
