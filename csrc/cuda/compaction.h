// Order-preserving compaction on the device: which images of a batch execute. Counts never reach the host.
#pragma once

#include "stream.h"

namespace skipnet::cuda {

// Where the executing images are listed.
struct RowList {
    int* rows;   // [batch], the executing images in order; the tail is -1
    int* count;  // [1]
};

// Lists the images with executed[i]; any batch.
void compact(const bool* executed /* [batch] */, int batch, const RowList& list, Stream stream);

}  // namespace skipnet::cuda
