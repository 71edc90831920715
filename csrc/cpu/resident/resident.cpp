// The resident strategy, compiled once for each instruction set (SKIPNET_ISA, SKIPNET_WIDTH; setup.py lists them).
//
// A slice of a few images goes from stem to head in one thread's cache, or in those of the threads that share it.
// Skipping is a branch. The phases are those of every engine: stem, gate_step, compact, run_block, head.
#include "resident.h"

#include "../batch_slice.h"
#include "../variant.h"
#include "conv_nhwc.h"
#include "standalone_conv.h"

namespace skipnet::cpu {
namespace {

struct Block {
    int stage;         // of its output, from 0
    bool opens_stage;  // the first convolution is strided, the shortcut a projection
    int first;         // place in direct_ where it opens a stage, in winograd_ otherwise
    int last;          // place in winograd_
    int projection;    // place in direct_, where it opens a stage
};

struct FeedforwardGate {
    bool max_pool;
    int first;   // place in gate_winograd_, where there is a max pool (FFGate-I)
    int second;  // place in gate_direct_
};

// An image's memory in one stage, the blocks of one width.
struct StageBuffers {
    Buffer x, inner;       // the activation, and a block's inner one
    Buffer tile_sums;      // [tiles, channels] of x
    Buffer gate_max_pool;  // what a feed-forward gate's layers write: FFGate-I's first two
    Buffer gate_inner;
    Buffer gate_feature;  // the last convolution
};

// One image on its way through the network.
struct ImageState {
    Buffer image;  // channels last, bordered
    std::vector<StageBuffers> stages;
    Buffer pooled, gate_pooled;  // [max_channels_]: of the activation, of a feed-forward gate's feature
    int pooled_after;            // the last block after which `pooled` has changed, or -1
    GateState gate;
};

// What a slice needs. Made once, reused from call to call.
struct Workspace {
    std::vector<ImageState> states;    // as many as there have been, up to kSliceImages
    std::vector<Decisions> decisions;  // [gates]
};

// Where a thread works. Made once, reused from call to call.
struct ThreadScratch {
    Scratch<VariantOperand> convolutions;
    Scratch<Float32> gates;  // float32 always
};

// Images that go through the first stage together, at most: measured, docs/cpu.md.
constexpr int kFirstStageImages = 8;

using Slice = BatchSlice<ImageState>;
using States = ImageList<ImageState>;

// A buffer of each of some images.
struct Buffers {
    float* of[kSliceImages];

    template <typename Select>
    Buffers(const States& states, const Select& select) {
        for (int i = 0; i < states.count; ++i) of[i] = select(*states.of[i]).get();
    }
};

// One thread's part in a slice.
struct Worker {
    const Slice& slice;
    const ThreadGroup& group;
    Scratch<VariantOperand>& scratch;
    Scratch<Float32>& gate_scratch;
};

// Global average of a plane.
void pool(const Plane& plane, const float* x, float* to) {
    for (int c = 0; c < plane.channels; c += kWidth) {
        Vector sum = {};
        for (int y = 0; y < plane.height; ++y)
            for (int pixel = 0; pixel < plane.width; ++pixel) sum += load(x + plane.at(y, pixel) + c);
        store(to + c, sum / broadcast(static_cast<float>(plane.height * plane.width)));
    }
}

// 2x2 maximum of all four, NaN if any is; the group shares the rows.
void max_pool(const Plane& in, const float* from, const Plane& out, float* to, const ThreadGroup& group) {
    group.share(out.height, [&](int begin, int end) {
        for (int y = begin; y < end; ++y)
            for (int x = 0; x < out.width; ++x)
                for (int c = 0; c < out.channels; c += kWidth) {
                    const float* corner = from + in.at(2 * y, 2 * x) + c;
                    Vector most = load(corner);
                    for (int offset : {in.channels, in.row(), in.row() + in.channels}) {
                        const Vector value = load(corner + offset);
                        most = most < value || value != value ? value : most;
                    }
                    store(to + out.at(y, x) + c, most);
                }
    });
}

class Network final : public Engine {
public:
    explicit Network(const NetworkWeights& weights);
    void run(const Call& call) override;
    void forward(const Worker& worker) const;

    int num_blocks() const { return static_cast<int>(blocks_.size()); }
    void stem(const Worker& worker) const;
    void gate_step(const Worker& worker, int index) const;
    void run_block(const Worker& worker, int index, const States& executing) const;
    void head(const Worker& worker) const;

    // Of a slice of this call.
    std::unique_ptr<Workspace> acquire_workspace(const Call& call, int images);
    void release(std::unique_ptr<Workspace> workspace) { workspaces_.release(std::move(workspace)); }

private:
    void feedforward_features(const Worker& worker, int index) const;
    float gate_logit(const Slice& slice, int index, int image) const;
    const float* pooled(const Slice& slice, int index, int image) const;

    ThreadScratch make_scratch() const;
    ImageState make_state() const;
    StageBuffers make_buffers(int stage) const;

    // What a feed-forward gate's last convolution reads and writes in a stage.
    Plane gate_plane(int stage) const {
        const Plane& plane = planes_[stage];
        return feedforward_gates_[0].max_pool ? Plane{plane.height / 2, plane.width / 2, plane.channels} : plane;
    }
    Plane feature_plane(int stage) const {
        const Plane in = gate_plane(stage);
        return {(in.height + 1) / 2, (in.width + 1) / 2, in.channels};
    }

    template <typename Layer>
    static int add(std::vector<Layer>& layers, const ConvolutionWeights& layer, int in_channels) {
        layers.emplace_back(layer, in_channels);
        return static_cast<int>(layers.size()) - 1;
    }

    int classes_, max_channels_ = 0, first_stage_ = 0;  // blocks of the first stage
    Plane image_;                                       // the input, channels last
    std::vector<Plane> planes_;                         // one per stage
    std::vector<Block> blocks_;
    Direct<Float32> stem_;  // three channels do not pair
    std::vector<Direct<VariantOperand>> direct_;
    std::vector<Winograd<VariantOperand>> winograd_;
    std::vector<Direct<Float32>> gate_direct_;
    std::vector<Winograd<Float32>> gate_winograd_;
    std::vector<FeedforwardGate> feedforward_gates_;  // one per block, or none
    Gates gates_;
    Linear head_;

    // A call's threads' own memory.
    struct Team {
        std::vector<ThreadScratch> scratch;
    };

    WorkspacePool<Workspace> workspaces_;
    WorkspacePool<Team> teams_;
};

Network::Network(const NetworkWeights& weights)
    : classes_(weights.classes), image_{weights.height, weights.width, weights.stem.in},
      stem_(weights.stem, image_.channels), gates_(weights),
      head_(weights.head_weight, weights.head_bias, weights.blocks.back().last.out, classes_) {
    planes_.push_back(stem_.out(image_));
    for (std::size_t index = 0; index < weights.blocks.size(); ++index) {
        const BlockWeights& block = weights.blocks[index];
        const int channels = planes_.back().channels;
        Block packed{};
        packed.opens_stage = block.projects;
        if (block.projects) {
            packed.projection = add(direct_, block.projection, channels);
            packed.first = add(direct_, block.first, channels);
            planes_.push_back(direct_[packed.first].out(planes_.back()));
        } else {
            packed.first = add(winograd_, block.first, channels);
        }
        packed.stage = static_cast<int>(planes_.size()) - 1;
        packed.last = add(winograd_, block.last, planes_.back().channels);
        blocks_.push_back(packed);
        if (packed.stage == 0) ++first_stage_;

        if (!weights.gates.empty()) {
            const GateConvolutions& gate = weights.gates[index];
            FeedforwardGate packed_gate{gate.max_pool, -1, -1};
            if (gate.max_pool) packed_gate.first = add(gate_winograd_, gate.layers[0], planes_.back().channels);
            packed_gate.second = add(gate_direct_, gate.layers.back(), planes_.back().channels);
            feedforward_gates_.push_back(packed_gate);
        }
    }
    for (const Plane& plane : planes_)
        if (plane.channels > max_channels_) max_channels_ = plane.channels;
}

StageBuffers Network::make_buffers(int stage) const {
    const Plane& plane = planes_[stage];
    StageBuffers buffers{
        Buffer(plane.size()), Buffer(plane.size()), Buffer(plane.tiles() * plane.channels), {}, {}, {}};
    if (!feedforward_gates_.empty()) {
        if (feedforward_gates_[0].max_pool) {
            buffers.gate_max_pool = Buffer(gate_plane(stage).size());
            buffers.gate_inner = Buffer(gate_plane(stage).size());
        }
        buffers.gate_feature = Buffer(feature_plane(stage).size());
    }
    return buffers;
}

auto Network::make_state() const -> ImageState {
    ImageState state{Buffer(image_.size()), {}, Buffer(max_channels_), Buffer(max_channels_), -1, gates_.make_state()};
    for (int stage = 0; stage < static_cast<int>(planes_.size()); ++stage) state.stages.push_back(make_buffers(stage));
    return state;
}

auto Network::acquire_workspace(const Call& call, int images) -> std::unique_ptr<Workspace> {
    std::unique_ptr<Workspace> workspace = workspaces_.acquire();
    if (!workspace) workspace = std::make_unique<Workspace>();
    while (static_cast<int>(workspace->states.size()) < images) workspace->states.push_back(make_state());
    workspace->decisions.resize(call.num_gates);
    return workspace;
}

auto Network::make_scratch() const -> ThreadScratch {
    return {Scratch<VariantOperand>(planes_, kSliceImages),
            Scratch<Float32>(gate_winograd_.empty() ? std::vector<Plane>() : planes_, kSliceImages)};
}

// As many slices as threads, or a multiple of it; fewer where there are fewer images.
void Network::run(const Call& call) {
    struct RunContext {
        const Network& network;
        Slices<Network, Workspace, ImageState> slices;
        Team& team;
        const int threads;
    };
    ThreadTeam threads(call.threads);
    const int at_once = call.batch < threads.size() ? call.batch : threads.size();
    const int rounds = (call.batch + at_once * kSliceImages - 1) / (at_once * kSliceImages);
    const int slice_size = (call.batch + at_once * rounds - 1) / (at_once * rounds);
    std::unique_ptr<Team> team = teams_.acquire();
    if (!team) team = std::make_unique<Team>();
    while (static_cast<int>(team->scratch.size()) < threads.size()) team->scratch.push_back(make_scratch());
    RunContext context{*this, {*this, call, slice_size, at_once, threads.size()}, *team, threads.size()};
    threads.run(
        [](void* argument, int rank) {
            RunContext& context = *static_cast<RunContext*>(argument);
            ThreadScratch& scratch = context.team.scratch[rank];
            context.slices.work([&](auto& slice) {
                const ThreadGroup group =
                    context.threads > 1 ? ThreadGroup(rank, context.threads, slice.work) : ThreadGroup();
                context.network.forward(Worker{slice.images, group, scratch.convolutions, scratch.gates});
            });
        },
        &context);
    teams_.release(std::move(team));
}

// A few images at a time through the first stage: its planes are the largest, and its kernels the smallest.
void Network::forward(const Worker& worker) const {
    const int count = worker.slice.count;
    for (int begin = 0; begin < count; begin += kFirstStageImages) {
        const int end = begin + kFirstStageImages < count ? begin + kFirstStageImages : count;
        const Slice part = worker.slice.part(begin, end);
        const Worker of_part{part, worker.group, worker.scratch, worker.gate_scratch};
        stem(of_part);
        run_blocks(*this, of_part, 0, first_stage_);
    }
    run_blocks(*this, worker, first_stage_, num_blocks());
    head(worker);
}

void Network::stem(const Worker& worker) const {
    const Slice& slice = worker.slice;
    const States states = worker.slice.all_images();
    const int channels = image_.channels, pixels = image_.height * image_.width;
    worker.group.share(states.count * image_.height, [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            const int i = row / image_.height, y = row % image_.height;
            ImageState& state = *states.of[i];
            const std::size_t from = static_cast<std::size_t>(slice.first + i) * channels * pixels + y * image_.width;
            for (int x = 0; x < image_.width; ++x)
                for (int c = 0; c < channels; ++c)
                    state.image.get()[image_.at(y, x) + c] = slice.call.images[from + c * pixels + x];
            if (y > 0) continue;
            state.pooled_after = -1;
            gates_.reset(state.gate);
        }
    });
    const Buffers images(states, [](ImageState& state) -> Buffer& { return state.image; });
    const Buffers x(states, [](ImageState& state) -> Buffer& { return state.stages[0].x; });
    stem_.run(image_, images.of, x.of, true, states.count, worker.group, worker.gate_scratch);
}

// Pool-finish, embed, LSTM step, decide.
void Network::gate_step(const Worker& worker, int index) const {
    if (!feedforward_gates_.empty()) feedforward_features(worker, index);
    decide(worker.slice, worker.group, index, index + 1 < num_blocks(),
           [&](int image) { return gate_logit(worker.slice, index, image); });
}

float Network::gate_logit(const Slice& slice, int index, int image) const {
    ImageState& state = slice.states[image];
    if (gates_.recurrent()) return gates_.logit(index, pooled(slice, index, image), state.gate);
    const int stage = blocks_[index].stage;
    pool(feature_plane(stage), state.stages[stage].gate_feature.get(), state.gate_pooled.get());
    return gates_.logit(index, state.gate_pooled.get(), state.gate);
}

void Network::feedforward_features(const Worker& worker, int index) const {
    const FeedforwardGate& gate = feedforward_gates_[index];
    const int stage = blocks_[index].stage;
    const States states = worker.slice.all_images();
    const Buffers x(states, [&](ImageState& state) -> Buffer& { return state.stages[stage].x; });
    const Buffers feature(states, [&](ImageState& state) -> Buffer& { return state.stages[stage].gate_feature; });
    if (!gate.max_pool) {
        gate_direct_[gate.second].run(planes_[stage], x.of, feature.of, true, states.count, worker.group,
                                      worker.gate_scratch);
    } else {
        const Buffers max_pooled(states,
                                 [&](ImageState& state) -> Buffer& { return state.stages[stage].gate_max_pool; });
        const Buffers inner(states, [&](ImageState& state) -> Buffer& { return state.stages[stage].gate_inner; });
        const Plane plane = gate_plane(stage);
        for (int i = 0; i < states.count; ++i) max_pool(planes_[stage], x.of[i], plane, max_pooled.of[i], worker.group);
        gate_winograd_[gate.first].run(plane, max_pooled.of, inner.of, false, nullptr, states.count, worker.group,
                                       worker.gate_scratch);
        gate_direct_[gate.second].run(plane, inner.of, feature.of, true, states.count, worker.group,
                                      worker.gate_scratch);
    }
}

void Network::run_block(const Worker& worker, int index, const States& executing) const {
    const Block& block = blocks_[index];
    const int stage = block.stage;
    const Plane& plane = planes_[stage];
    const ThreadGroup& group = worker.group;
    const Buffers inner(executing, [&](ImageState& state) -> Buffer& { return state.stages[stage].inner; });
    const Buffers x(executing, [&](ImageState& state) -> Buffer& { return state.stages[stage].x; });
    const Buffers sums(executing, [&](ImageState& state) -> Buffer& { return state.stages[stage].tile_sums; });
    if (block.opens_stage) {
        // An image's rows for both convolutions while they are in cache.
        group.share(worker.slice.count * plane.height, [&](int begin, int end) {
            for (int row = begin; row < end; ++row) {
                const int image = row / plane.height, y = row % plane.height;
                ImageState& state = worker.slice.states[image];
                const float* before = state.stages[stage - 1].x.get();
                StageBuffers& to = state.stages[stage];
                direct_[block.projection].run_row(planes_[stage - 1], before, to.x.get(), false, y, worker.scratch);
                if (worker.slice.executes(index, image))
                    direct_[block.first].run_row(planes_[stage - 1], before, to.inner.get(), true, y, worker.scratch);
            }
        });
    } else {
        winograd_[block.last].announce(plane, executing.count, group, worker.scratch);
        winograd_[block.first].run(plane, x.of, inner.of, false, nullptr, executing.count, group, worker.scratch);
    }
    // The next gate has not decided yet.
    if (index + 1 < num_blocks() && !blocks_[index + 1].opens_stage)
        winograd_[blocks_[index + 1].first].announce(plane, executing.count, group, worker.scratch);
    winograd_[block.last].run(plane, inner.of, x.of, true, sums.of, executing.count, group, worker.scratch);
}

// Global average pool and classifier.
void Network::head(const Worker& worker) const {
    const Slice& slice = worker.slice;
    worker.group.share(slice.count, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
            const std::size_t image = slice.first + i;
            head_.run(pooled(slice, num_blocks() - 1, i), slice.call.logits + image * classes_);
            gates_.finish(slice.states[i].gate, slice.call, image);
        }
    });
}

// The activation's pooled feature after a block. An image that has skipped blocks since it was pooled has it still.
const float* Network::pooled(const Slice& slice, int index, int image) const {
    ImageState& state = slice.states[image];
    while (index > state.pooled_after && !slice.executes(index, image) && !blocks_[index].opens_stage) --index;
    if (index > state.pooled_after) {
        const int stage = blocks_[index].stage;
        const Plane& plane = planes_[stage];
        const StageBuffers& buffers = state.stages[stage];
        if (slice.executes(index, image))
            average(buffers.tile_sums.get(), plane.tiles(), plane.channels, plane.height * plane.width,
                    state.pooled.get());
        else
            pool(plane, buffers.x.get(), state.pooled.get());
        state.pooled_after = index;
    }
    return state.pooled.get();
}

}  // namespace

std::unique_ptr<Engine> SKIPNET_VARIANT(make_resident)(const NetworkWeights& weights) {
    return std::make_unique<Network>(weights);
}

std::unique_ptr<StandaloneConv> SKIPNET_VARIANT(make_resident_conv)(const ConvolutionWeights& weights, int batch,
                                                                    int height, int width) {
    return std::make_unique<ConvNhwc<VariantOperand>>(weights, batch, height, width);
}

}  // namespace skipnet::cpu
