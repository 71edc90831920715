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

int count_pooled_tiles(int kernel, int stride, int height, int width) {
    return pooled_tiles({8, 8, kernel, stride, nullptr, nullptr}, height, width);
}
}
