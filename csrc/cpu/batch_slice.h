// A few images of a call on their way through a network, and the order of its phases; for one instruction set.
#pragma once

#include "blocking.h"
#include "gate_step.h"

namespace skipnet::cpu {
namespace {

// Images that go through the network together and share a pass over the weights, at most: as many as fill the threads
// and the caches. The transformed weights of SkipNet-110 are 27 MB: a pass for one image alone waits for memory;
// docs/performance.md has the figures.
constexpr int kMaxImages = 8;

// Some of a slice's images, in order. ImageState: what a strategy keeps of an image; it has a GateState `gate`.
template <typename ImageState>
struct ImageList {
    ImageState* of[kMaxImages];
    int count = 0;

    void add(ImageState& state) { of[count++] = &state; }
};

template <typename ImageState>
struct BatchSlice {
    const Call& call;
    ImageState* states;  // [kMaxImages]
    int first, count;    // images first .. first + count - 1 of the call

    ImageList<ImageState> all_images() const {
        ImageList<ImageState> images;
        for (int i = 0; i < count; ++i) images.add(states[i]);
        return images;
    }
};

// The images that run the next block, in order. Every thread makes the same list.
template <typename ImageState>
ImageList<ImageState> compact(const BatchSlice<ImageState>& slice) {
    ImageList<ImageState> executing;
    for (int i = 0; i < slice.count; ++i)
        if (slice.states[i].gate.executes) executing.add(slice.states[i]);
    return executing;
}

// Writes the decisions of gate `index` for some of a slice's images. `has_forced`: forced decisions, where the call has
// any, are for this gate too.
template <typename ImageState, typename GateLogit>
void decide(const BatchSlice<ImageState>& slice, const Share& mine, int index, bool has_forced,
            const GateLogit& gate_logit) {
    const Call& call = slice.call;
    for (int i = mine.begin; i < mine.end; ++i) {
        ImageState& state = slice.states[i];
        const std::size_t to = static_cast<std::size_t>(index) * call.batch + slice.first + i;
        state.gate.executes = decide(call, to, call.forced && has_forced, gate_logit(state));
    }
}

// The phases of every engine: stem, gate_step, compact, run_block, head.
template <typename Network, typename Worker>
void forward(const Network& network, const Worker& worker) {
    network.stem(worker);
    for (int index = 0; index < network.num_blocks(); ++index) {
        network.run_block(worker, index, compact(worker.slice));
        if (index < worker.slice.call.num_gates) network.gate_step(worker, index);
    }
    network.head(worker);
}

}  // namespace
}  // namespace skipnet::cpu
