// A few images of a call on their way through a network, and the order of its phases; for one instruction set.
#pragma once

#include <mutex>
#include <vector>

#include "gate_step.h"
#include "thread_team.h"
#include "workspace_pool.h"

namespace skipnet::cpu {
namespace {

// Images of a slice of the compacted strategy, at most: as many as share a pass over the weights.
constexpr int kMaxImages = 8;

// Of any slice, at most: the resident strategy has more of them share a pass.
constexpr int kSliceImages = 16;

// Some of a slice's images, in order. ImageState: what a strategy keeps of an image; it has a GateState `gate`.
template <typename ImageState>
struct ImageList {
    ImageState* of[kSliceImages];
    int count = 0;

    void add(ImageState& state) { of[count++] = &state; }
};

// What the gates decided on a slice's images. A thread that comes late goes by it, so it is kept to the end.
struct Decisions {
    bool executes[kSliceImages];
};

template <typename ImageState>
struct BatchSlice {
    const Call& call;
    ImageState* states;    // [count]
    Decisions* decisions;  // [num_gates of the call]
    int first, count;      // images first .. first + count - 1 of the call
    int place = 0;         // of the first one in `decisions`

    // Images begin .. end - 1 of these.
    BatchSlice part(int begin, int end) const {
        return {call, states + begin, decisions, first + begin, end - begin, place + begin};
    }

    ImageList<ImageState> all_images() const {
        ImageList<ImageState> images;
        for (int i = 0; i < count; ++i) images.add(states[i]);
        return images;
    }

    // Whether an image executes block `index`: all execute the first one, and every one of a dense network.
    bool executes(int index, int image) const {
        return index == 0 || call.num_gates == 0 || decisions[index - 1].executes[place + image];
    }
};

// The images that run a block, in order. Every thread makes the same list.
template <typename ImageState>
ImageList<ImageState> compact(const BatchSlice<ImageState>& slice, int index) {
    ImageList<ImageState> executing;
    for (int i = 0; i < slice.count; ++i)
        if (slice.executes(index, i)) executing.add(slice.states[i]);
    return executing;
}

// Writes the decisions of gate `index`, from gate_logit(image). `has_forced`: forced decisions, where the call has any,
// are for this gate too.
template <typename ImageState, typename GateLogit>
void decide(const BatchSlice<ImageState>& slice, const ThreadGroup& group, int index, bool has_forced,
            const GateLogit& gate_logit) {
    const Call& call = slice.call;
    group.share(slice.count, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
            const std::size_t to = static_cast<std::size_t>(index) * call.batch + slice.first + i;
            slice.decisions[index].executes[slice.place + i] =
                decide(call, to, call.forced && has_forced, gate_logit(i));
        }
    });
}

// Blocks begin .. end - 1, each with the gate step after it.
template <typename Network, typename Worker>
void run_blocks(const Network& network, const Worker& worker, int begin, int end) {
    for (int index = begin; index < end; ++index) {
        network.run_block(worker, index, compact(worker.slice, index));
        if (index < worker.slice.call.num_gates) network.gate_step(worker, index);
    }
}

// The phases of every engine: stem, gate_step, compact, run_block, head.
template <typename Network, typename Worker>
void forward(const Network& network, const Worker& worker) {
    network.stem(worker);
    run_blocks(network, worker, 0, network.num_blocks());
    network.head(worker);
}

// A call's images in slices. Threads take slices as long as there are any, then help with those of others.
// Workspace: what a slice needs, of the network; it has vectors of ImageState `states` and of Decisions `decisions`.
template <typename Network, typename Workspace, typename ImageState>
class Slices {
public:
    struct Slice {
        BatchSlice<ImageState> images;
        std::unique_ptr<Workspace> workspace;
        SharedWork work;
        int threads;   // that are in it
        bool running;  // not all of it is done
    };

    // slice_size images each, the last one fewer; at most `most` slices at a time. threads: that work.
    Slices(Network& network, const Call& call, int slice_size, int most, int threads)
        : network_(network), call_(call), slice_size_(slice_size), most_(most), places_(most + threads) {}

    // Goes on until nothing is left to do. take_part(slice) returns when all of the slice is done.
    template <typename TakePart>
    void work(const TakePart& take_part) {
        while (Slice* slice = enter()) {
            take_part(*slice);
            leave(slice);
        }
    }

private:
    // A type of our own, so that no vector of a common type is instantiated for this instruction set.
    struct Place {
        std::unique_ptr<Slice> slice;
    };

    // A new slice, or the running one with the fewest threads, or null.
    Slice* enter() {
        std::lock_guard<std::mutex> lock(mutex_);
        const bool starts = running_ < most_ && next_ < call_.batch;
        Slice* entered = nullptr;
        for (Place& place : places_) {
            if (starts && !place.slice) {
                entered = start(place);
                break;
            }
            if (!starts && place.slice && place.slice->running && (!entered || place.slice->threads < entered->threads))
                entered = place.slice.get();
        }
        if (entered) ++entered->threads;
        return entered;
    }

    Slice* start(Place& place) {
        const int left = call_.batch - next_, count = left < slice_size_ ? left : slice_size_;
        std::unique_ptr<Workspace> workspace = network_.acquire_workspace(call_, count);
        const BatchSlice<ImageState> images{call_, workspace->states.data(), workspace->decisions.data(), next_, count};
        place.slice.reset(new Slice{images, std::move(workspace), {}, 0, true});
        next_ += count;
        ++running_;
        return place.slice.get();
    }

    // From one that is done. The last thread gives its memory back.
    void leave(Slice* slice) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (slice->running) --running_;
        slice->running = false;
        if (--slice->threads > 0) return;
        network_.release(std::move(slice->workspace));
        for (Place& place : places_)
            if (place.slice.get() == slice) place.slice.reset();
    }

    Network& network_;
    const Call& call_;
    const int slice_size_, most_;
    std::mutex mutex_;
    int next_ = 0, running_ = 0;  // the first image that is in no slice yet; slices; under mutex_, like what follows
    std::vector<Place> places_;   // of slices that a thread is in: an idle one always finds a place for a new one
};

}  // namespace
}  // namespace skipnet::cpu
