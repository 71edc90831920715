// The compacted strategy, compiled once for each instruction set (SKIPNET_ISA, SKIPNET_WIDTH; setup.py lists them).
//
// All threads go block by block over the images that execute it, and share each convolution. The list of these images
// is all that compaction needs: a block's first convolution reads them where they are, its last adds to them in place.
// The phases are those of every engine: stem, gate_step, compact, run_block, head.
#include "compacted.h"

#include <cstring>

#include "../gate_step.h"
#include "../variant.h"
#include "winograd_nchwc.h"
#include "../workspace_pool.h"

namespace skipnet::cpu {
namespace {

using namespace blocked;

// Images that go through the network together and share a pass over the weights, at most: as many as fill the threads
// and the caches.
constexpr int kMaxImages = 8;

constexpr std::chrono::microseconds kJoinTimeout(4000);  // with late threads, for each image: less than one takes

template <typename Operand>
using LayerOf = std::unique_ptr<Layer<Operand, Operand>>;

template <typename Operand>
struct Block {
    int stage;                             // of its output, from 0
    LayerOf<Operand> projection;           // where it opens a stage
    std::vector<LayerOf<Operand>> layers;  // two, or three in a bottleneck
    int maps[2];                           // what each layer but the last writes
};

template <typename Operand>
struct FeedforwardGate {
    bool max_pool;
    std::vector<LayerOf<Operand>> layers;  // one, or two after a max pool
    int pooled;                            // map of the max pool, where there is one
    int maps[2];                           // what each layer writes

    int feature() const { return maps[layers.size() - 1]; }
};

// One image on its way through the network.
template <typename Operand>
struct ImageState {
    std::vector<BufferOf<typename Operand::Element>> maps;  // one for each of the network's

    Buffer sums;               // [parts, channels] of the activation
    int parts;                 // of sums; 0 where pooled is up to date
    Buffer feature_sums;       // [parts, channels] of a feed-forward gate's last feature map
    Buffer pooled, gate_pooled;  // [max_channels_]: of the activation, of a feed-forward gate's feature
    Buffer embedded;           // [embed]
    Buffer hidden, cell;       // [lanes], [2 * lanes]
    Buffer logits;             // [classes]
    bool executes;             // the next block
};

struct Scratch {
    Buffer own;
    std::vector<Run> runs;
};

// What a call needs. Made once, reused from call to call.
template <typename Operand>
struct Workspace {
    std::vector<ImageState<Operand>> states;          // as many as there have been, up to kMaxImages
    std::vector<Scratch> scratch;                // [threads]
    BufferOf<typename Operand::Element> shared;  // of the layers
    Buffer image;                                // of one image at a time, in phases
    BufferOf<typename Operand::Element> stem;    // of one image at a time, what is pooled
};

// Some of a slice's images, in order.
template <typename Operand>
struct ImageStates {
    ImageState<Operand>* of[kMaxImages];
    int count = 0;

    void add(ImageState<Operand>& state) { of[count++] = &state; }
};

// One thread's part in a slice of a few images: first .. first + count - 1 of the call.
template <typename Operand>
struct Worker {
    const Call& call;
    Workspace<Operand>& workspace;
    int first, count;
    ThreadGroup group;
    Memory<Operand> memory;

    ImageStates<Operand> all_images() const {
        ImageStates<Operand> states;
        for (int i = 0; i < count; ++i) states.add(workspace.states[i]);
        return states;
    }
};

// to[c] = sum over the parts of sums[part, c], divided by `pixels`; in ascending order.
void average(const float* sums, int parts, int channels, int pixels, float* to) {
    for (int c = 0; c < channels; c += kWidth) {
        Vector sum = {};
        for (int i = 0; i < parts; ++i) sum += load(sums + i * channels + c);
        store(to + c, sum / broadcast(static_cast<float>(pixels)));
    }
}

// Maximum of kernel x kernel with stride 2 and padding (kernel - 1) / 2, NaN if any is; inputs are not negative, so a
// border of zeros does no harm. The group shares the rows.
template <typename Operand>
void max_pool(int kernel, const Plane& in, const typename Operand::Element* from, const Plane& out,
              typename Operand::Element* to, const ThreadGroup& group) {
    const Share rows(out.blocks() * out.height, group);
    const int pad = (kernel - 1) / 2;
    for (int row = rows.begin; row < rows.end; ++row) {
        const int block = row / out.height, y = row % out.height;
        const typename Operand::Element* corner = from + static_cast<std::ptrdiff_t>(block) * in.block() +
                                                  in.at(2 * y - pad, -pad);
        typename Operand::Element* result = to + static_cast<std::ptrdiff_t>(block) * out.block() + out.at(y, 0);
        for (int x = 0; x < out.width; ++x, corner += 2 * kWidth, result += kWidth) {
            Vector most = Operand::widen(corner);
            for (int i = 0; i < kernel; ++i)
                for (int j = 0; j < kernel; ++j) {
                    const Vector value = Operand::widen(corner + i * in.row() + j * kWidth);
                    most = most < value || value != value ? value : most;
                }
            Operand::narrow(result, most);
        }
    }
}

// Operand: what activations are kept in and products are formed from, see vector.h.
template <typename Operand>
class Network final : public Engine {
    using Element = typename Operand::Element;
    using Layer = blocked::Layer<Operand, Operand>;
    using Block = cpu::Block<Operand>;
    using FeedforwardGate = cpu::FeedforwardGate<Operand>;
    using ImageState = cpu::ImageState<Operand>;
    using ImageStates = cpu::ImageStates<Operand>;
    using Worker = cpu::Worker<Operand>;
    using Workspace = cpu::Workspace<Operand>;

public:
    explicit Network(const NetworkWeights& weights);
    void run(const Call& call) override;

private:
    enum class Use { activation, first, second };  // maps of one shape may be in use together

    void forward(const Worker& worker) const;
    void stem(const Worker& worker) const;
    void gate_step(const Worker& worker, int index) const;
    ImageStates compact(const Worker& worker) const;
    void run_block(const Worker& worker, int index, const ImageStates& executing) const;
    void head(const Worker& worker) const;

    void run_layer(const Layer& layer, const ImageStates& states, int from, int to, Buffer ImageState::*sums, Finish finish,
                   const Worker& worker) const;
    void update(const Layer& layer, const ImageStates& states, int from, int to, Finish finish, const Worker& worker) const;
    void feedforward_features(const Worker& worker, int index) const;
    float gate_logit(int index, ImageState& state) const;
    const float* pooled(int stage, ImageState& state) const;

    Block pack(const BlockWeights& block, const Plane& x);
    FeedforwardGate pack(const GateConvolutions& gate);
    std::unique_ptr<Layer> register_layer(std::unique_ptr<Layer> layer, const Plane& out);
    int map(const Plane& plane, Use use);

    std::unique_ptr<Workspace> acquire_workspace(int images, int threads);
    ImageState make_state() const;

    struct Map {
        Plane plane;
        Use use;
    };

    const Plane& plane(int map) const { return maps_[map].plane; }

    int classes_;
    PhasePlane image_;
    Plane stem_plane_;
    bool max_pool_;
    std::unique_ptr<blocked::Layer<Float32, Operand>> stem_;
    std::vector<Map> maps_;
    std::vector<int> stages_;  // the map of each stage's activation
    std::vector<Block> blocks_;
    std::vector<Linear> embeddings_, tails_;  // one per block, for the gates' kind
    std::vector<FeedforwardGate> gates_;
    std::unique_ptr<LstmCell> cell_;
    std::unique_ptr<blocked::Layer<Float32, Float32>> head_;
    int max_channels_ = 0;
    std::size_t max_shared_ = 0, max_own_ = 0, max_sums_ = 0;

    WorkspacePool<Workspace> workspaces_;
};

int halved(int size) { return (size + 1) / 2; }

template <typename Operand>
Network<Operand>::Network(const NetworkWeights& weights)
    : classes_(weights.classes),
      image_{weights.height, weights.width, weights.stem.in, weights.stem.kernel, weights.stem.stride},
      stem_plane_{}, max_pool_(weights.max_pool) {
    const bool basic = !weights.blocks[0].bottleneck;
    const bool strided_gates = !weights.gates.empty() && !weights.gates[0].max_pool;
    const auto activation = [&](int height, int width, int channels) {
        if (basic) return bordered(height, width, channels, 1);
        return strided_gates ? bordered(height, width, channels, 2) : unbordered(height, width, channels);
    };
    const auto add_stage = [&](const Plane& plane) {
        maps_.push_back({plane, Use::activation});
        stages_.push_back(static_cast<int>(maps_.size()) - 1);
    };
    const int stride = weights.stem.stride;
    const int height = (weights.height + stride - 1) / stride, width = (weights.width + stride - 1) / stride;
    if (max_pool_) {
        stem_plane_ = bordered(height, width, weights.stem.out, 2);
        add_stage(activation(halved(height), halved(width), weights.stem.out));
    } else {
        stem_plane_ = activation(height, width, weights.stem.out);
        add_stage(stem_plane_);
    }
    stem_ = make_first<Operand>(weights.stem, image_, stem_plane_);
    for (std::size_t index = 0; index < weights.blocks.size(); ++index) {
        const BlockWeights& block = weights.blocks[index];
        const Plane x = plane(stages_.back());
        if (block.projects) {
            const int by = block.projection.stride;
            add_stage(activation((x.height + by - 1) / by, (x.width + by - 1) / by, block.last.out));
        }
        blocks_.push_back(pack(block, x));
        if (!weights.embeddings.empty()) {
            const Embedding& embedding = weights.embeddings[index];
            embeddings_.emplace_back(embedding.weight, embedding.bias, embedding.channels, weights.lstm.embed);
        }
        if (!weights.gates.empty()) {
            gates_.push_back(pack(weights.gates[index]));
            tails_.emplace_back(weights.tails[index].weight, &weights.tails[index].bias, block.last.out, 1);
        }
    }
    if (!embeddings_.empty()) cell_ = std::make_unique<LstmCell>(weights.lstm);
    const int features = weights.blocks.back().last.out;
    head_ = make_direct<Float32, Float32>({features, classes_, 1, 1, weights.head_weight, weights.head_bias},
                        unbordered(1, 1, features), unbordered(1, 1, classes_));
    for (const Map& map : maps_)
        if (map.plane.channels > max_channels_) max_channels_ = map.plane.channels;
}

template <typename Operand>
auto Network<Operand>::pack(const BlockWeights& block, const Plane& x) -> Block {
    Block packed{};
    packed.stage = static_cast<int>(stages_.size()) - 1;
    const Plane result = plane(stages_.back());  // a copy: maps move as there are more
    if (block.projects) packed.projection = register_layer(make_layer<Operand>(block.projection, x, result), result);
    // Each map is made for the convolution that reads it.
    const auto add_layer = [&](const ConvolutionWeights& layer, const Plane& in, const Plane& out, Use use) {
        packed.maps[packed.layers.size()] = map(out, use);
        packed.layers.push_back(register_layer(make_layer<Operand>(layer, in, out), out));
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
    packed.layers.push_back(register_layer(make_layer<Operand>(block.last, last, result), result));
    return packed;
}

template <typename Operand>
auto Network<Operand>::pack(const GateConvolutions& gate) -> FeedforwardGate {
    const Plane x = plane(stages_.back());
    FeedforwardGate packed{gate.max_pool, {}, -1, {}};
    Plane inner = x;
    const auto add_layer = [&](const ConvolutionWeights& layer, const Plane& in, const Plane& out, Use use) {
        packed.maps[packed.layers.size()] = map(out, use);
        packed.layers.push_back(register_layer(make_layer<Operand>(layer, in, out), out));
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
template <typename Operand>
auto Network<Operand>::register_layer(std::unique_ptr<Layer> layer, const Plane& out) -> std::unique_ptr<Layer> {
    const std::size_t sums = static_cast<std::size_t>(layer->parts()) * out.channels;
    if (sums > max_sums_) max_sums_ = sums;
    if (layer->shared() > max_shared_) max_shared_ = layer->shared();
    if (layer->own() > max_own_) max_own_ = layer->own();
    return layer;
}

// What blocks keep in a map does not outlive them, so that those of one shape share it.
template <typename Operand>
int Network<Operand>::map(const Plane& plane, Use use) {
    int number = 0;
    for (; number < static_cast<int>(maps_.size()); ++number)
        if (maps_[number].use == use && maps_[number].plane == plane) return number;
    maps_.push_back({plane, use});
    return number;
}

template <typename Operand>
auto Network<Operand>::make_state() const -> ImageState {
    const int lanes = cell_ ? cell_->lanes() : 0;
    ImageState state{{}, Buffer(max_sums_), 0, Buffer(gates_.empty() ? 0 : max_sums_), Buffer(max_channels_),
                Buffer(max_channels_), Buffer(cell_ ? cell_->embed() : 0), Buffer(lanes), Buffer(2 * lanes),
                Buffer(padded(classes_)), true};
    for (const Map& map : maps_) state.maps.emplace_back(map.plane.size());
    return state;
}

template <typename Operand>
auto Network<Operand>::acquire_workspace(int images, int threads) -> std::unique_ptr<Workspace> {
    std::unique_ptr<Workspace> workspace = workspaces_.acquire();
    if (!workspace)
        workspace.reset(new Workspace{{}, {}, BufferOf<Element>(max_shared_), Buffer(image_.size()),
                                  BufferOf<Element>(max_pool_ ? stem_plane_.size() : 0)});
    while (static_cast<int>(workspace->states.size()) < images) workspace->states.push_back(make_state());
    while (static_cast<int>(workspace->scratch.size()) < threads)
        workspace->scratch.push_back({Buffer(max_own_), std::vector<Run>(max_channels_ / kWidth)});
    return workspace;
}

template <typename Operand>
void Network<Operand>::run(const Call& call) {
    struct RunContext {
        const Network& network;
        const Call& call;
        Workspace& workspace;
        const int threads;
        Barrier barrier;
    };
    ThreadTeam team(call.threads, call.batch * kJoinTimeout);
    std::unique_ptr<Workspace> workspace = acquire_workspace(call.batch < kMaxImages ? call.batch : kMaxImages, team.size());
    RunContext context{*this, call, *workspace, team.size(), Barrier(team.size())};
    team.run([](void* argument, int rank) {
        RunContext& context = *static_cast<RunContext*>(argument);
        Scratch& scratch = context.workspace.scratch[rank];
        const Memory<Operand> memory{context.workspace.shared.get(), scratch.own.get(), scratch.runs.data()};
        const int batch = context.call.batch, slices = (batch + kMaxImages - 1) / kMaxImages;
        for (int slice = 0; slice < slices; ++slice) {
            const int first = batch * slice / slices, count = batch * (slice + 1) / slices - first;
            context.network.forward({context.call, context.workspace, first, count, ThreadGroup{rank, context.threads, &context.barrier}, memory});
        }
    }, &context);
    workspaces_.release(std::move(workspace));
}

template <typename Operand>
void Network<Operand>::forward(const Worker& worker) const {
    const int num_gates = worker.call.num_gates, blocks = static_cast<int>(blocks_.size());
    stem(worker);
    for (int index = 0; index < blocks; ++index) {
        run_block(worker, index, compact(worker));
        if (index < num_gates) gate_step(worker, index);
    }
    head(worker);
}

// From one map of the images to another; sums, where given, gets the sums over the output's parts.
template <typename Operand>
void Network<Operand>::run_layer(const Layer& layer, const ImageStates& states, int from, int to, Buffer ImageState::*sums,
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
    worker.group.barrier();
}

// The same to an activation, whose pooled feature will have to be brought up to date.
template <typename Operand>
void Network<Operand>::update(const Layer& layer, const ImageStates& states, int from, int to, Finish finish,
                              const Worker& worker) const {
    if (worker.group.rank == 0)
        for (int i = 0; i < states.count; ++i) states.of[i]->parts = layer.parts();
    run_layer(layer, states, from, to, &ImageState::sums, finish, worker);
}

template <typename Operand>
void Network<Operand>::stem(const Worker& worker) const {
    Workspace& workspace = worker.workspace;
    const ThreadGroup& group = worker.group;
    const int channels = image_.channels, height = image_.height, width = image_.width;
    const Share rows(channels * height, group);
    for (int i = 0; i < worker.count; ++i) {
        ImageState& state = workspace.states[i];
        const std::size_t from = static_cast<std::size_t>(worker.first + i) * channels * height * width;
        for (int row = rows.begin; row < rows.end; ++row)
            for (int x = 0; x < width; ++x)
                workspace.image.get()[image_.at(row / height, row % height, x)] =
                    worker.call.images[from + static_cast<std::size_t>(row) * width + x];
        if (group.rank == 0) {
            state.executes = true;
            if (cell_) cell_->reset(state.hidden.get(), state.cell.get());
        }
        group.barrier();
        const float* input = workspace.image.get();
        Element* x = state.maps[stages_[0]].get();
        Element* output = max_pool_ ? workspace.stem.get() : x;
        stem_->run({&input, &output, nullptr, 1}, Finish::relu, group, {nullptr, nullptr, nullptr});
        group.barrier();
        if (max_pool_) max_pool<Operand>(3, stem_plane_, workspace.stem.get(), plane(stages_[0]), x, group);
    }
    group.barrier();
}

// Pool-finish, embed, LSTM step, decide: the threads share the images.
template <typename Operand>
void Network<Operand>::gate_step(const Worker& worker, int index) const {
    if (!gates_.empty()) feedforward_features(worker, index);
    const Call& call = worker.call;
    const bool forced = call.forced && index + 1 < static_cast<int>(blocks_.size());
    const Share mine(worker.count, worker.group);
    for (int i = mine.begin; i < mine.end; ++i) {
        ImageState& state = worker.workspace.states[i];
        const std::size_t to = static_cast<std::size_t>(index) * call.batch + worker.first + i;
        state.executes = decide(call, to, forced, gate_logit(index, state));
    }
    worker.group.barrier();
}

template <typename Operand>
float Network<Operand>::gate_logit(int index, ImageState& state) const {
    const int stage = blocks_[index].stage;
    if (cell_) {
        embeddings_[index].run(pooled(stage, state), state.embedded.get());
        return cell_->step(state.embedded.get(), state.hidden.get(), state.cell.get());
    }
    const Plane& feature = plane(gates_[index].feature());
    float logit;
    average(state.feature_sums.get(), gates_[index].layers.back()->parts(), feature.channels, feature.pixels(),
            state.gate_pooled.get());
    tails_[index].run(state.gate_pooled.get(), &logit);
    return logit;
}

template <typename Operand>
void Network<Operand>::feedforward_features(const Worker& worker, int index) const {
    const FeedforwardGate& gate = gates_[index];
    const ImageStates states = worker.all_images();
    int from = stages_[blocks_[index].stage];
    if (gate.max_pool) {
        for (int i = 0; i < states.count; ++i) {
            std::vector<BufferOf<Element>>& maps = states.of[i]->maps;
            max_pool<Operand>(2, plane(from), maps[from].get(), plane(gate.pooled), maps[gate.pooled].get(),
                              worker.group);
        }
        worker.group.barrier();
        from = gate.pooled;
    }
    for (std::size_t i = 0; i < gate.layers.size(); ++i) {
        const bool last = i + 1 == gate.layers.size();
        run_layer(*gate.layers[i], states, from, gate.maps[i], last ? &ImageState::feature_sums : nullptr, Finish::relu,
                  worker);
        from = gate.maps[i];
    }
}

// The images that run the next block, in order. Every thread makes the same list.
template <typename Operand>
auto Network<Operand>::compact(const Worker& worker) const -> ImageStates {
    ImageStates executing;
    for (int i = 0; i < worker.count; ++i)
        if (worker.workspace.states[i].executes) executing.add(worker.workspace.states[i]);
    return executing;
}

template <typename Operand>
void Network<Operand>::run_block(const Worker& worker, int index, const ImageStates& executing) const {
    const Block& block = blocks_[index];
    const int result = stages_[block.stage];
    int from = result;
    if (block.projection) {
        from = stages_[block.stage - 1];
        update(*block.projection, worker.all_images(), from, result, Finish::none, worker);
    }
    if (executing.count == 0) {
        worker.group.barrier();  // all have to know that nobody executes before the gate decides anew
        return;
    }
    for (std::size_t i = 0; i + 1 < block.layers.size(); ++i) {
        run_layer(*block.layers[i], executing, from, block.maps[i], nullptr, Finish::relu, worker);
        from = block.maps[i];
    }
    update(*block.layers.back(), executing, from, result, Finish::add_relu, worker);
}

// Global average pool and classifier.
template <typename Operand>
void Network<Operand>::head(const Worker& worker) const {
    const Share mine(worker.count, worker.group);
    for (int i = mine.begin; i < mine.end; ++i) pooled(blocks_.back().stage, worker.workspace.states[i]);
    worker.group.barrier();
    const float* inputs[kMaxImages];
    float* outputs[kMaxImages];
    for (int i = 0; i < worker.count; ++i) {
        inputs[i] = worker.workspace.states[i].pooled.get();
        outputs[i] = worker.workspace.states[i].logits.get();
    }
    head_->run({inputs, outputs, nullptr, worker.count}, Finish::none, worker.group, {nullptr, nullptr, nullptr});
    worker.group.barrier();
    for (int i = mine.begin; i < mine.end; ++i) {
        const ImageState& state = worker.workspace.states[i];
        const std::size_t image = worker.first + i;
        std::memcpy(worker.call.logits + image * classes_, state.logits.get(), classes_ * sizeof(float));
        if (cell_) cell_->finish(state.hidden.get(), state.cell.get(), worker.call, image);
    }
    worker.group.barrier();
}

// The activation's pooled feature, brought up to date. An image that skipped its block has it still.
template <typename Operand>
const float* Network<Operand>::pooled(int stage, ImageState& state) const {
    const Plane& x = plane(stages_[stage]);
    if (state.parts > 0) average(state.sums.get(), state.parts, x.channels, x.pixels(), state.pooled.get());
    state.parts = 0;
    return state.pooled.get();
}

}  // namespace

std::unique_ptr<Engine> SKIPNET_VARIANT(make_compacted)(const NetworkWeights& weights) {
#ifdef __AVX512BF16__
    // Feed-forward gates are float32's, and read what the blocks wrote.
    if (weights.bfloat16 && weights.gates.empty()) return std::make_unique<Network<BFloat16>>(weights);
#endif
    return std::make_unique<Network<Float32>>(weights);
}

}  // namespace skipnet::cpu
