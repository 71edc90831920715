// A convolution over some images of a batch: reads them through a row list, writes compactly or back to their places.
// All pointers are to the device's memory, 16-byte aligned; activations are channels-last.
#pragma once

#include "compaction.h"
#include "element.h"
#include "gate_step.h"
#include "stream.h"

namespace skipnet::cuda {

// Channels are padded to multiples of 8 with zero weights and biases. An image has fewer, so a stem with stride 2 takes
// its pixels in pairs: two side by side, the first one's column even, with four channels each, count as one pixel of
// eight, of which the kernel covers columns() and moves on by one. So a 7x7 kernel multiplies 7 x 4 x 8 numbers, not
// 7 x 7 x 8. An odd width is padded with a column of zeros.
struct Convolution {
    int in, out;
    int kernel, stride;  // 1x1, 3x3, ... 7x7; padding is kernel / 2
    const void* weight;  // [out, kernel, columns(), in]
    const float* bias;   // [out]
    bool pairs = false;  // and `in` is two pixels' channels

    int out_side(int side) const { return (side - 1) / stride + 1; }
    int columns() const { return pairs ? (kernel / 2 + 1) / 2 + kernel / 4 + 1 : kernel; }
    int depth() const { return kernel * columns() * in; }  // K
};

// Where the thread blocks of a split-K product leave one another partial sums; for one call at a time.
struct PartialSums {
    float* sums;    // [partial_sums]
    int* arrivals;  // [kPartialTiles], zero before a call and after it
};
constexpr int kPartialSums = 1 << 21;  // 8 MiB are enough for any call
constexpr int kPartialTiles = 256;

struct GatheredConv {
    int batch;               // the most images there can be
    int height, width;       // of x
    const RowList* list;     // the images to compute, without rows the first *count; null: all of the batch
    bool gathers;            // x holds the whole batch; otherwise image i of x is the list's i-th
    bool scatters;           // the same for y and the residual; places of other images are left alone
    bool relu;               // of the sum with the residual; NaN stays NaN
    const void* x;           // [batch, height, width, in]; of pairs [batch, height, ceil(width / 2), in]
    const void* residual;    // as y, or null; may be y itself
    void* y;                 // [batch, out_height, out_width, out]
    float* sums;             // [batch, pooled_tiles, out], of y over a tile's pixels, at y's places; may be null
    PartialSums partial;     // without them a thread block computes all slices of K, to the same result
    bool pixels_are_images;  // each pixel is an image of its own: the order of its sums depends on the layer alone
    const GateTail* gate = nullptr;  // of y's images and all others, with `sums`, in place; null: none
    bool dependent = false;          // the stream's last launch was another kernel of this strategy: see launch.cuh
};

// How many tiles' sums an image's pool consists of.
int pooled_tiles(const Convolution& layer, int height, int width);

// How many floats of partial sums a call can use; none where K is not split. A batch of 1x1 images for a call whose
// pixels are images.
int partial_sums(ElementType type, const Convolution& layer, int batch, int height, int width);

// y = relu(convolution(x) + bias + residual). Sums of products are float32 (in float32 every product, too) and in an
// order that depends on the layer and the image's size alone: an image's result does not depend on the batch.
void gathered_conv(ElementType type, const Convolution& layer, const GatheredConv& call, Stream stream);

}  // namespace skipnet::cuda
