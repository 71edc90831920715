// The compacted strategy, compiled once for each instruction set (SKIPNET_ISA, SKIPNET_WIDTH; setup.py lists them).
//
// All threads go block by block over the images that execute it, and share each convolution. The list of these images
// is all that compaction needs: a block's first convolution reads them where they are, its last adds to them in place.
// The phases are those of every engine: stem, gate_step, compact, run_block, head.
#include "compacted.h"

#include <cstring>

#include "../batch_slice.h"
#include "../variant.h"
#include "pooled_stem.h"
#include "standalone_conv.h"
#include "winograd_nchwc.h"

namespace skipnet::cpu {
namespace {

using Element = VariantOperand::Element;
using ConvLayer = Layer<VariantOperand, VariantOperand>;

struct Block {
    int stage;                                       // of its output, from 0
    int number;                                      // of its first convolution among all
    std::unique_ptr<ConvLayer> projection;           // where it opens a stage
    std::vector<std::unique_ptr<ConvLayer>> layers;  // two, or three in a bottleneck
    int maps[2];                                     // what each layer but the last writes
};

struct FeedforwardGate {
    bool max_pool;
    std::vector<std::unique_ptr<ConvLayer>> layers;  // one, or two after a max pool
    int pooled;                                      // map of the max pool, where there is one
    int maps[2];                                     // what each layer writes

    int feature() const { return maps[layers.size() - 1]; }
};

// One image on its way through the network.
struct ImageState {
    std::vector<BufferOf<Element>> maps;  // one for each of the network's

    Buffer sums;                 // [parts, channels] of the activation
    int pooled_after;            // the last block after which `pooled` has changed, or -1
    Buffer feature_sums;         // [parts, channels] of a feed-forward gate's last feature map
    Buffer pooled, gate_pooled;  // [max_channels_]: of the activation, of a feed-forward gate's feature
    GateState gate;
    Buffer logits;  // [classes]
};

struct Scratch {
    Buffer own;
    std::vector<Run> runs;
    BufferOf<Element> band;  // of the stem, where it is pooled
};

// What a slice needs. Made once, reused from call to call.
struct Workspace {
    std::vector<ImageState> states;    // as many as there have been, up to kMaxImages
    std::vector<Decisions> decisions;  // [gates]
    BufferOf<Element> shared;          // of the layers
    BufferOf<Element> image;           // of one image at a time, as the stem reads it
};

// Images go through a block together, and share a pass over its weights, as long as their activations take no more than
// so many bytes: more would be in memory by the time that the next convolution reads them.
constexpr std::size_t kTogetherBytes = 8 << 20;

using Slice = BatchSlice<ImageState>;
using States = ImageList<ImageState>;

// One thread's part in a slice.
struct Worker {
    const Slice& slice;
    Workspace& workspace;
    ThreadGroup group;
    Memory<VariantOperand> memory;
    Element* stem_band;
    Ahead& ahead;
};

// Maximum of 2x2 with stride 2, NaN if any is. The group shares the rows.
void max_pool(const Plane& in, const Element* from, const Plane& out, Element* to, const ThreadGroup& group) {
    group.share(out.blocks() * out.height, [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            const int block = row / out.height, y = row % out.height;
            const Element* top = from + static_cast<std::ptrdiff_t>(block) * in.block() + in.at(2 * y, 0);
            Element* result = to + static_cast<std::ptrdiff_t>(block) * out.block() + out.at(y, 0);
            for (int x = 0; x < out.width; ++x, top += 2 * kWidth, result += kWidth) {
                const auto row_of_two = [](const Element* left) {
                    return larger(VariantOperand::widen(left), VariantOperand::widen(left + kWidth));
                };
                VariantOperand::narrow(result, larger(row_of_two(top), row_of_two(top + in.row())));
            }
        }
    });
}

class Network final : public Engine {
public:
    explicit Network(const NetworkWeights& weights);
    void run(const Call& call) override;

    int num_blocks() const { return static_cast<int>(blocks_.size()); }
    void stem(const Worker& worker) const;
    void gate_step(const Worker& worker, int index) const;
    void run_block(const Worker& worker, int index, const States& executing) const;
    void head(const Worker& worker) const;

    // Of a slice of this call.
    std::unique_ptr<Workspace> acquire_workspace(const Call& call, int images);
    void release(std::unique_ptr<Workspace> workspace) { workspaces_.release(std::move(workspace)); }

private:
    enum class Use { activation, first, second };  // maps of one shape may be in use together

    void run_together(const Worker& worker, int index, const States& executing) const;
    void run_layer(const ConvLayer& layer, const States& states, int from, int to, Buffer ImageState::* sums,
                   Finish finish, const Worker& worker) const;
    void feedforward_features(const Worker& worker, int index) const;
    float gate_logit(const Slice& slice, int index, int image) const;
    const float* pooled(const Slice& slice, int index, int image) const;

    Block pack(const BlockWeights& block, const Plane& x);
    FeedforwardGate pack(const GateConvolutions& gate);
    std::unique_ptr<ConvLayer> register_layer(std::unique_ptr<ConvLayer> layer, const Plane& out);
    int map(const Plane& plane, Use use);

    ImageState make_state() const;

    struct Map {
        Plane plane;
        Use use;
    };

    // A type of our own, so that no vector of a common type is instantiated for this instruction set.
    struct Stage {
        int x;  // map of its activation
    };

    const Plane& plane(int map) const { return maps_[map].plane; }

    int classes_;
    FirstPlane<VariantOperand> image_;
    std::unique_ptr<First<VariantOperand>> stem_;  // the one that the network has
    std::unique_ptr<PooledStem<VariantOperand>> pooled_stem_;
    std::vector<Map> maps_;
    std::vector<Stage> stages_;
    std::vector<Block> blocks_;
    std::vector<FeedforwardGate> feedforward_gates_;  // one per block, or none
    Gates gates_;
    std::unique_ptr<Layer<Float32, Float32>> head_;
    std::vector<Bytes> weights_;  // of blocks' convolutions and the head, in order
    int max_channels_ = 0;
    std::size_t max_shared_ = 0, max_own_ = 0, max_sums_ = 0;

    // A call's threads' own memory. Made once, reused from call to call.
    struct Team {
        std::vector<Scratch> scratch;
    };

    WorkspacePool<Workspace> workspaces_;
    WorkspacePool<Team> teams_;
};

int halved(int size) { return (size + 1) / 2; }

Network::Network(const NetworkWeights& weights)
    : classes_(weights.classes),
      image_{weights.height, weights.width, weights.stem.in, weights.stem.kernel, weights.stem.stride},
      gates_(weights) {
    const bool basic = !weights.blocks[0].bottleneck;
    const bool strided_gates = !weights.gates.empty() && !weights.gates[0].max_pool;
    const auto activation = [&](int height, int width, int channels) {
        if (basic) return bordered(height, width, channels, 1);
        return strided_gates ? bordered(height, width, channels, 2) : unbordered(height, width, channels);
    };
    const auto add_stage = [&](const Plane& plane) {
        maps_.push_back({plane, Use::activation});
        stages_.push_back({static_cast<int>(maps_.size()) - 1});
    };
    const int stride = weights.stem.stride;
    const int height = (weights.height + stride - 1) / stride, width = (weights.width + stride - 1) / stride;
    const int by = weights.max_pool ? 2 : 1;
    add_stage(activation((height + by - 1) / by, (width + by - 1) / by, weights.stem.out));
    if (weights.max_pool)
        pooled_stem_ = std::make_unique<PooledStem<VariantOperand>>(weights.stem, image_, plane(stages_[0].x));
    else
        stem_ = make_first<VariantOperand>(weights.stem, image_, plane(stages_[0].x));
    for (std::size_t index = 0; index < weights.blocks.size(); ++index) {
        const BlockWeights& block = weights.blocks[index];
        const Plane x = plane(stages_.back().x);
        if (block.projects) {
            const int by = block.projection.stride;
            add_stage(activation((x.height + by - 1) / by, (x.width + by - 1) / by, block.last.out));
        }
        blocks_.push_back(pack(block, x));
        if (!weights.gates.empty()) feedforward_gates_.push_back(pack(weights.gates[index]));
    }
    const int features = weights.blocks.back().last.out;
    head_ = make_direct<Float32, Float32>({features, classes_, 1, 1, weights.head_weight, weights.head_bias},
                                          unbordered(1, 1, features), unbordered(1, 1, classes_));
    weights_.push_back(head_->weights());
    for (const Map& map : maps_)
        if (map.plane.channels > max_channels_) max_channels_ = map.plane.channels;
}

auto Network::pack(const BlockWeights& block, const Plane& x) -> Block {
    Block packed{};
    packed.stage = static_cast<int>(stages_.size()) - 1;
    packed.number = static_cast<int>(weights_.size());
    const Plane result = plane(stages_.back().x);  // a copy: maps move as there are more
    if (block.projects)
        packed.projection = register_layer(make_layer<VariantOperand>(block.projection, x, result), result);
    // Each map is made for the convolution that reads it.
    const auto add_layer = [&](const ConvolutionWeights& layer, const Plane& in, const Plane& out, Use use) {
        packed.maps[packed.layers.size()] = map(out, use);
        packed.layers.push_back(register_layer(make_layer<VariantOperand>(layer, in, out), out));
    };
    Plane last = x;
    if (block.bottleneck) {
        const Plane inner = bordered(x.height, x.width, block.first.out, block.middle.stride);
        last = unbordered(result.height, result.width, block.middle.out);
        add_layer(block.first, x, inner, Use::first);
        add_layer(block.middle, inner, last, Use::second);
    } else {
        last = bordered(result.height, result.width, block.first.out, 1);
        add_layer(block.first, x, last, Use::first);
    }
    packed.layers.push_back(register_layer(make_layer<VariantOperand>(block.last, last, result), result));
    if (packed.projection) weights_.push_back(packed.projection->weights());
    for (const auto& layer : packed.layers) weights_.push_back(layer->weights());
    return packed;
}

auto Network::pack(const GateConvolutions& gate) -> FeedforwardGate {
    const Plane x = plane(stages_.back().x);
    FeedforwardGate packed{gate.max_pool, {}, -1, {}};
    Plane inner = x;
    const auto add_layer = [&](const ConvolutionWeights& layer, const Plane& in, const Plane& out, Use use) {
        packed.maps[packed.layers.size()] = map(out, use);
        packed.layers.push_back(register_layer(make_layer<VariantOperand>(layer, in, out), out));
    };
    if (gate.max_pool) {
        const Plane max_pooled = bordered(x.height / 2, x.width / 2, x.channels, 1);
        inner = bordered(max_pooled.height, max_pooled.width, x.channels, 2);
        packed.pooled = map(max_pooled, Use::first);
        add_layer(gate.layers[0], max_pooled, inner, Use::second);
    }
    const Plane feature = unbordered(halved(inner.height), halved(inner.width), x.channels);
    add_layer(gate.layers.back(), inner, feature, Use::first);
    return packed;
}

// The layer, its needs noted.
auto Network::register_layer(std::unique_ptr<ConvLayer> layer, const Plane& out) -> std::unique_ptr<ConvLayer> {
    const std::size_t sums = static_cast<std::size_t>(layer->parts()) * out.channels;
    if (sums > max_sums_) max_sums_ = sums;
    if (layer->shared() > max_shared_) max_shared_ = layer->shared();
    if (layer->own() > max_own_) max_own_ = layer->own();
    return layer;
}

// What blocks keep in a map does not outlive them, so that those of one shape share it.
int Network::map(const Plane& plane, Use use) {
    int number = 0;
    for (; number < static_cast<int>(maps_.size()); ++number)
        if (maps_[number].use == use && maps_[number].plane == plane) return number;
    maps_.push_back({plane, use});
    return number;
}

auto Network::make_state() const -> ImageState {
    ImageState state{{},
                     Buffer(max_sums_),
                     -1,
                     Buffer(feedforward_gates_.empty() ? 0 : max_sums_),
                     Buffer(max_channels_),
                     Buffer(max_channels_),
                     gates_.make_state(),
                     Buffer(padded(classes_))};
    for (const Map& map : maps_) state.maps.emplace_back(map.plane.size());
    return state;
}

auto Network::acquire_workspace(const Call& call, int images) -> std::unique_ptr<Workspace> {
    std::unique_ptr<Workspace> workspace = workspaces_.acquire();
    if (!workspace)
        workspace.reset(new Workspace{{}, {}, BufferOf<Element>(max_shared_), BufferOf<Element>(image_.size())});
    while (static_cast<int>(workspace->states.size()) < images) workspace->states.push_back(make_state());
    workspace->decisions.resize(call.num_gates);
    return workspace;
}

// One slice after another, all threads in each.
void Network::run(const Call& call) {
    struct RunContext {
        const Network& network;
        Slices<Network, Workspace, ImageState> slices;
        Team& team;
        const int threads;
    };
    ThreadTeam threads(call.threads);
    const int slices = (call.batch + kMaxImages - 1) / kMaxImages;
    std::unique_ptr<Team> team = teams_.acquire();
    if (!team) team = std::make_unique<Team>();
    while (static_cast<int>(team->scratch.size()) < threads.size())
        team->scratch.push_back({Buffer(max_own_), std::vector<Run>(max_channels_ / kWidth),
                                 BufferOf<Element>(pooled_stem_ ? pooled_stem_->band() : 0)});
    RunContext context{
        *this, {*this, call, (call.batch + slices - 1) / slices, 1, threads.size()}, *team, threads.size()};
    threads.run(
        [](void* argument, int rank) {
            RunContext& context = *static_cast<RunContext*>(argument);
            Scratch& scratch = context.team.scratch[rank];
            context.slices.work([&](auto& slice) {
                Workspace& workspace = *slice.workspace;
                Ahead ahead;
                const ThreadGroup group =
                    context.threads > 1 ? ThreadGroup(rank, context.threads, slice.work) : ThreadGroup();
                ahead.start(context.network.weights_, group);
                forward(context.network,
                        Worker{slice.images,
                               workspace,
                               group,
                               {workspace.shared.get(), scratch.own.get(), scratch.runs.data(), &ahead},
                               scratch.band.get(),
                               ahead});
            });
        },
        &context);
    teams_.release(std::move(team));
}

// From one map of the images to another; sums, where given, gets the sums over the output's parts.
void Network::run_layer(const ConvLayer& layer, const States& states, int from, int to, Buffer ImageState::* sums,
                        Finish finish, const Worker& worker) const {
    const Element* inputs[kMaxImages];
    Element* outputs[kMaxImages];
    float* parts[kMaxImages];
    for (int i = 0; i < states.count; ++i) {
        ImageState& state = *states.of[i];
        inputs[i] = state.maps[from].get();
        outputs[i] = state.maps[to].get();
        if (sums) parts[i] = (state.*sums).get();
    }
    layer.run({inputs, outputs, sums ? parts : nullptr, states.count}, finish, worker.group, worker.memory);
}

void Network::stem(const Worker& worker) const {
    Workspace& workspace = worker.workspace;
    const ThreadGroup& group = worker.group;
    const int channels = image_.channels, height = image_.height, width = image_.width;
    for (int i = 0; i < worker.slice.count; ++i) {
        ImageState& state = worker.slice.states[i];
        const std::size_t from = static_cast<std::size_t>(worker.slice.first + i) * channels * height * width;
        group.share(channels * height, [&](int begin, int end) {
            for (int row = begin; row < end; ++row)
                image_.set_row(workspace.image.get(), row / height, row % height, [&](int x) {
                    return worker.slice.call.images[from + static_cast<std::size_t>(row) * width + x];
                });
            if (begin > 0) return;
            state.pooled_after = -1;
            gates_.reset(state.gate);
        });
        const Element* input = workspace.image.get();
        Element* x = state.maps[stages_[0].x].get();
        if (pooled_stem_)
            pooled_stem_->run(input, x, worker.stem_band, group, worker.ahead);
        else
            stem_->run({&input, &x, nullptr, 1}, Finish::relu, group, {nullptr, nullptr, nullptr, &worker.ahead});
    }
}

// Pool-finish, embed, LSTM step, decide: the threads share the images.
void Network::gate_step(const Worker& worker, int index) const {
    if (!feedforward_gates_.empty()) feedforward_features(worker, index);
    decide(worker.slice, worker.group, index, index + 1 < num_blocks(),
           [&](int image) { return gate_logit(worker.slice, index, image); });
}

float Network::gate_logit(const Slice& slice, int index, int image) const {
    ImageState& state = slice.states[image];
    if (gates_.recurrent()) return gates_.logit(index, pooled(slice, index, image), state.gate);
    const FeedforwardGate& gate = feedforward_gates_[index];
    const Plane& feature = plane(gate.feature());
    average(state.feature_sums.get(), gate.layers.back()->parts(), feature.channels, feature.pixels(),
            state.gate_pooled.get());
    return gates_.logit(index, state.gate_pooled.get(), state.gate);
}

void Network::feedforward_features(const Worker& worker, int index) const {
    const FeedforwardGate& gate = feedforward_gates_[index];
    const States states = worker.slice.all_images();
    int from = stages_[blocks_[index].stage].x;
    if (gate.max_pool) {
        for (int i = 0; i < states.count; ++i) {
            std::vector<BufferOf<Element>>& maps = states.of[i]->maps;
            max_pool(plane(from), maps[from].get(), plane(gate.pooled), maps[gate.pooled].get(), worker.group);
        }
        from = gate.pooled;
    }
    for (std::size_t i = 0; i < gate.layers.size(); ++i) {
        const bool last = i + 1 == gate.layers.size();
        run_layer(*gate.layers[i], states, from, gate.maps[i], last ? &ImageState::feature_sums : nullptr, Finish::relu,
                  worker);
        from = gate.maps[i];
    }
}

void Network::run_block(const Worker& worker, int index, const States& executing) const {
    const Block& block = blocks_[index];
    const int result = stages_[block.stage].x;
    const auto few_at_a_time = [&](const States& states, const auto& run) {
        const int most = static_cast<int>(kTogetherBytes / (plane(result).size() * sizeof(Element)));
        for (int first = 0; first < states.count;) {
            States some;
            while (first < states.count && (some.count == 0 || some.count < most)) some.add(*states.of[first++]);
            run(some);
        }
    };
    if (block.projection)
        few_at_a_time(worker.slice.all_images(), [&](const States& some) {
            worker.ahead.begin(block.number);
            run_layer(*block.projection, some, stages_[block.stage - 1].x, result, &ImageState::sums, Finish::none,
                      worker);
        });
    few_at_a_time(executing, [&](const States& some) { run_together(worker, index, some); });
}

// The block's convolutions of some images.
void Network::run_together(const Worker& worker, int index, const States& executing) const {
    const Block& block = blocks_[index];
    const int result = stages_[block.stage].x;
    int from = block.projection ? stages_[block.stage - 1].x : result;
    const int number = block.number + (block.projection ? 1 : 0);
    for (std::size_t i = 0; i + 1 < block.layers.size(); ++i) {
        worker.ahead.begin(number + static_cast<int>(i));
        run_layer(*block.layers[i], executing, from, block.maps[i], nullptr, Finish::relu, worker);
        from = block.maps[i];
    }
    worker.ahead.begin(number + static_cast<int>(block.layers.size()) - 1);
    run_layer(*block.layers.back(), executing, from, result, &ImageState::sums, Finish::add_relu, worker);
}

// Global average pool and classifier.
void Network::head(const Worker& worker) const {
    const Slice& slice = worker.slice;
    worker.group.share(slice.count, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) pooled(slice, num_blocks() - 1, i);
    });
    const float* inputs[kMaxImages];
    float* outputs[kMaxImages];
    for (int i = 0; i < slice.count; ++i) {
        inputs[i] = slice.states[i].pooled.get();
        outputs[i] = slice.states[i].logits.get();
    }
    head_->run({inputs, outputs, nullptr, slice.count}, Finish::none, worker.group,
               {nullptr, nullptr, nullptr, &worker.ahead});
    worker.group.share(slice.count, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
            const ImageState& state = slice.states[i];
            const std::size_t image = slice.first + i;
            std::memcpy(slice.call.logits + image * classes_, state.logits.get(), classes_ * sizeof(float));
            gates_.finish(state.gate, slice.call, image);
        }
    });
}

// The activation's pooled feature after a block. An image that has skipped blocks since it was pooled has it still.
const float* Network::pooled(const Slice& slice, int index, int image) const {
    ImageState& state = slice.states[image];
    while (index > state.pooled_after && !slice.executes(index, image) && !blocks_[index].projection) --index;
    if (index > state.pooled_after) {
        const Block& block = blocks_[index];
        const Plane& x = plane(stages_[block.stage].x);
        const ConvLayer& last = slice.executes(index, image) ? *block.layers.back() : *block.projection;
        average(state.sums.get(), last.parts(), x.channels, x.pixels(), state.pooled.get());
        state.pooled_after = index;
    }
    return state.pooled.get();
}

}  // namespace

std::unique_ptr<Engine> SKIPNET_VARIANT(make_compacted)(const NetworkWeights& weights) {
    return std::make_unique<Network>(weights);
}

std::unique_ptr<StandaloneConv> SKIPNET_VARIANT(make_compacted_conv)(const ConvolutionWeights& weights, int batch,
                                                                     int height, int width) {
    return std::make_unique<ConvNchwc<VariantOperand>>(weights, batch, height, width);
}

}  // namespace skipnet::cpu
