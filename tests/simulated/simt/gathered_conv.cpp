// Entries for tests/simulated/test_simt_gathered_conv.py.
#include "simt.h"

#include "cuda/gathered_conv.cu"

using namespace skipnet::cuda;

extern "C" {

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
