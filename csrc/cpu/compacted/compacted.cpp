// The compacted strategy, compiled once for each instruction set (SKIPNET_ISA, SKIPNET_WIDTH; setup.py lists them).
//
// All threads go block by block over the images that execute it, and share each convolution. The list of these images
// is all that compaction needs: a block's first convolution reads them where they are, its last adds to them in place.
// The rooms are those of every engine: stem, gate_step, compact, run_block, head.
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
constexpr int kTogether = 8;

constexpr std::chrono::microseconds kPatience(4000);  // with late threads, for each image: less than one takes

template <typename Operand>
using LayerOf = std::unique_ptr<Layer<Operand, Operand>>;

template <typename Operand>
struct Block {
    int group;                             // of its output, from 0
    LayerOf<Operand> projection;           // where it changes the group
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

// One image on its way.
template <typename Operand>
struct Guest {
    std::vector<BufferOf<typename Operand::Element>> maps;  // one for each of the network's

    Buffer sums;               // [parts, channels] of the activation
    int parts;                 // of sums; 0 where pooled is up to date
    Buffer feature_sums;       // [parts, channels] of a feed-forward gate's last feature map
    Buffer pooled, seen;       // [most channels]: of the activation, of a feed-forward gate's feature map
    Buffer feature;            // [embed]
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
    std::vector<Guest<Operand>> guests;          // as many as there have been, up to kTogether
    std::vector<Scratch> scratch;                // [threads]
    BufferOf<typename Operand::Element> shared;  // of the layers
    Buffer image;                                // of one image at a time, in phases
    BufferOf<typename Operand::Element> stem;    // of one image at a time, what is pooled
};

// Some of the guests, in order.
template <typename Operand>
struct Guests {
    Guest<Operand>* of[kTogether];
    int count = 0;

    void add(Guest<Operand>& guest) { of[count++] = &guest; }
};

// One thread's part in a visit of a few images: first .. first + count - 1 of the call.
template <typename Operand>
struct Worker {
    const Call& call;
    Workspace<Operand>& space;
    int first, count;
    Team team;
    Memory<Operand> memory;

    Guests<Operand> everyone() const {
        Guests<Operand> guests;
        for (int i = 0; i < count; ++i) guests.add(space.guests[i]);
        return guests;
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
// border of zeros does no harm. The team shares the rows.
template <typename Operand>
void max_pool(int kernel, const Plane& in, const typename Operand::Element* from, const Plane& out,
              typename Operand::Element* to, const Team& team) {
    const Share rows(out.blocks() * out.height, team);
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
    using Guest = cpu::Guest<Operand>;
    using Guests = cpu::Guests<Operand>;
    using Worker = cpu::Worker<Operand>;
    using Workspace = cpu::Workspace<Operand>;

public:
    explicit Network(const NetworkWeights& weights);
    void run(const Call& call) override;

private:
    enum class Use { activation, first, second };  // maps of one shape may be in use together

    void walk(const Worker& worker) const;
    void stem(const Worker& worker) const;
    void gate_step(const Worker& worker, int index) const;
    Guests compact(const Worker& worker) const;
    void run_block(const Worker& worker, int index, const Guests& executing) const;
    void head(const Worker& worker) const;

    void run_layer(const Layer& layer, const Guests& guests, int from, int to, Buffer Guest::*sums, Finish finish,
                   const Worker& worker) const;
    void update(const Layer& layer, const Guests& guests, int from, int to, Finish finish, const Worker& worker) const;
    void feedforward_features(const Worker& worker, int index) const;
    float gate_logit(int index, Guest& guest) const;
    const float* pooled(int group, Guest& guest) const;

    Block pack(const BlockWeights& block, const Plane& x);
    FeedforwardGate pack(const GateConvolutions& gate);
    std::unique_ptr<Layer> keep(std::unique_ptr<Layer> layer, const Plane& out);
    int map(const Plane& plane, Use use);

    std::unique_ptr<Workspace> take_workspace(int guests, int threads);
    Guest make_guest() const;

    struct Map {
        Plane plane;
        Use use;
    };

    struct Group {
        int x;  // map of its activation
    };

    const Plane& plane(int map) const { return maps_[map].plane; }

    int classes_;
    PhasePlane image_;
    Plane stem_plane_;
    bool max_pool_;
    std::unique_ptr<blocked::Layer<Float32, Operand>> stem_;
    std::vector<Map> maps_;
    std::vector<Group> groups_;
    std::vector<Block> blocks_;
    std::vector<Linear> embeddings_, tails_;  // one a block, for the gates' kind
    std::vector<FeedforwardGate> gates_;
    std::unique_ptr<RnnCell> cell_;
    std::unique_ptr<blocked::Layer<Float32, Float32>> head_;
    int most_channels_ = 0;
    std::size_t most_shared_ = 0, most_own_ = 0, most_sums_ = 0;

    Workspaces<Workspace> spaces_;
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
    const auto add_group = [&](const Plane& plane) {
        maps_.push_back({plane, Use::activation});
        groups_.push_back({static_cast<int>(maps_.size()) - 1});
    };
    const int stride = weights.stem.stride;
    const int height = (weights.height + stride - 1) / stride, width = (weights.width + stride - 1) / stride;
    if (max_pool_) {
        stem_plane_ = bordered(height, width, weights.stem.out, 2);
        add_group(activation(halved(height), halved(width), weights.stem.out));
    } else {
        stem_plane_ = activation(height, width, weights.stem.out);
        add_group(stem_plane_);
    }
    stem_ = make_first<Operand>(weights.stem, image_, stem_plane_);
    for (std::size_t index = 0; index < weights.blocks.size(); ++index) {
        const BlockWeights& block = weights.blocks[index];
        const Plane x = plane(groups_.back().x);
        if (block.projects) {
            const int by = block.projection.stride;
            add_group(activation((x.height + by - 1) / by, (x.width + by - 1) / by, block.last.out));
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
    if (!embeddings_.empty()) cell_ = std::make_unique<RnnCell>(weights.lstm);
    const int features = weights.blocks.back().last.out;
    head_ = make_direct<Float32, Float32>({features, classes_, 1, 1, weights.head_weight, weights.head_bias},
                        unbordered(1, 1, features), unbordered(1, 1, classes_));
    for (const Map& known : maps_)
        if (known.plane.channels > most_channels_) most_channels_ = known.plane.channels;
}

template <typename Operand>
auto Network<Operand>::pack(const BlockWeights& block, const Plane& x) -> Block {
    Block packed{};
    packed.group = static_cast<int>(groups_.size()) - 1;
    const Plane result = plane(groups_.back().x);  // a copy: maps move as there are more
    if (block.projects) packed.projection = keep(make_layer<Operand>(block.projection, x, result), result);
    // Each map is made for the convolution that reads it.
    const auto add_layer = [&](const ConvolutionWeights& layer, const Plane& in, const Plane& out, Use use) {
        packed.maps[packed.layers.size()] = map(out, use);
        packed.layers.push_back(keep(make_layer<Operand>(layer, in, out), out));
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
    packed.layers.push_back(keep(make_layer<Operand>(block.last, last, result), result));
    return packed;
}

template <typename Operand>
auto Network<Operand>::pack(const GateConvolutions& gate) -> FeedforwardGate {
    const Plane x = plane(groups_.back().x);
    FeedforwardGate packed{gate.max_pool, {}, -1, {}};
    Plane seen = x;
    const auto add_layer = [&](const ConvolutionWeights& layer, const Plane& in, const Plane& out, Use use) {
        packed.maps[packed.layers.size()] = map(out, use);
        packed.layers.push_back(keep(make_layer<Operand>(layer, in, out), out));
    };
    if (gate.max_pool) {
        const Plane most = bordered(x.height / 2, x.width / 2, x.channels, 1);
        seen = bordered(most.height, most.width, x.channels, 2);
        packed.pooled = map(most, Use::first);
        add_layer(gate.layers[0], most, seen, Use::second);
    }
    const Plane feature = unbordered(halved(seen.height), halved(seen.width), x.channels);
    add_layer(gate.layers.back(), seen, feature, Use::first);
    return packed;
}

// The layer, its needs noted.
template <typename Operand>
auto Network<Operand>::keep(std::unique_ptr<Layer> layer, const Plane& out) -> std::unique_ptr<Layer> {
    const std::size_t sums = static_cast<std::size_t>(layer->parts()) * out.channels;
    if (sums > most_sums_) most_sums_ = sums;
    if (layer->shared() > most_shared_) most_shared_ = layer->shared();
    if (layer->own() > most_own_) most_own_ = layer->own();
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
auto Network<Operand>::make_guest() const -> Guest {
    const int lanes = cell_ ? cell_->lanes() : 0;
    Guest guest{{}, Buffer(most_sums_), 0, Buffer(gates_.empty() ? 0 : most_sums_), Buffer(most_channels_),
                Buffer(most_channels_), Buffer(cell_ ? cell_->embed() : 0), Buffer(lanes), Buffer(2 * lanes),
                Buffer(padded(classes_)), true};
    for (const Map& known : maps_) guest.maps.emplace_back(known.plane.size());
    return guest;
}

template <typename Operand>
auto Network<Operand>::take_workspace(int guests, int threads) -> std::unique_ptr<Workspace> {
    std::unique_ptr<Workspace> space = spaces_.take();
    if (!space)
        space.reset(new Workspace{{}, {}, BufferOf<Element>(most_shared_), Buffer(image_.size()),
                                  BufferOf<Element>(max_pool_ ? stem_plane_.size() : 0)});
    while (static_cast<int>(space->guests.size()) < guests) space->guests.push_back(make_guest());
    while (static_cast<int>(space->scratch.size()) < threads)
        space->scratch.push_back({Buffer(most_own_), std::vector<Run>(most_channels_ / kWidth)});
    return space;
}

template <typename Operand>
void Network<Operand>::run(const Call& call) {
    struct Tour {
        const Network& network;
        const Call& call;
        Workspace& space;
        const int threads;
        Barrier barrier;
    };
    Crew crew(call.threads, call.batch * kPatience);
    std::unique_ptr<Workspace> space = take_workspace(call.batch < kTogether ? call.batch : kTogether, crew.size());
    Tour tour{*this, call, *space, crew.size(), Barrier(crew.size())};
    crew.run([](void* context, int rank) {
        Tour& tour = *static_cast<Tour*>(context);
        Scratch& scratch = tour.space.scratch[rank];
        const Memory<Operand> memory{tour.space.shared.get(), scratch.own.get(), scratch.runs.data()};
        const int batch = tour.call.batch, visits = (batch + kTogether - 1) / kTogether;
        for (int visit = 0; visit < visits; ++visit) {
            const int first = batch * visit / visits, count = batch * (visit + 1) / visits - first;
            tour.network.walk({tour.call, tour.space, first, count, Team{rank, tour.threads, &tour.barrier}, memory});
        }
    }, &tour);
    spaces_.give_back(std::move(space));
}

template <typename Operand>
void Network<Operand>::walk(const Worker& worker) const {
    const int steps = worker.call.steps, blocks = static_cast<int>(blocks_.size());
    stem(worker);
    for (int index = 0; index < blocks; ++index) {
        run_block(worker, index, compact(worker));
        if (index < steps) gate_step(worker, index);
    }
    head(worker);
}

// From one map of the guests to another; sums, where given, gets the sums over the output's parts.
template <typename Operand>
void Network<Operand>::run_layer(const Layer& layer, const Guests& guests, int from, int to, Buffer Guest::*sums,
                                 Finish finish, const Worker& worker) const {
    const Element* inputs[kTogether];
    Element* outputs[kTogether];
    float* parts[kTogether];
    for (int i = 0; i < guests.count; ++i) {
        Guest& guest = *guests.of[i];
        inputs[i] = guest.maps[from].get();
        outputs[i] = guest.maps[to].get();
        if (sums) parts[i] = (guest.*sums).get();
    }
    layer.run({inputs, outputs, sums ? parts : nullptr, guests.count}, finish, worker.team, worker.memory);
    worker.team.meet();
}

// The same to an activation, whose pooled feature will have to be brought up to date.
template <typename Operand>
void Network<Operand>::update(const Layer& layer, const Guests& guests, int from, int to, Finish finish,
                              const Worker& worker) const {
    if (worker.team.rank == 0)
        for (int i = 0; i < guests.count; ++i) guests.of[i]->parts = layer.parts();
    run_layer(layer, guests, from, to, &Guest::sums, finish, worker);
}

template <typename Operand>
void Network<Operand>::stem(const Worker& worker) const {
    Workspace& space = worker.space;
    const Team& team = worker.team;
    const int channels = image_.channels, height = image_.height, width = image_.width;
    const Share rows(channels * height, team);
    for (int i = 0; i < worker.count; ++i) {
        Guest& guest = space.guests[i];
        const std::size_t from = static_cast<std::size_t>(worker.first + i) * channels * height * width;
        for (int row = rows.begin; row < rows.end; ++row)
            for (int x = 0; x < width; ++x)
                space.image.get()[image_.at(row / height, row % height, x)] =
                    worker.call.images[from + static_cast<std::size_t>(row) * width + x];
        if (team.rank == 0) {
            guest.executes = true;
            if (cell_) cell_->begin(guest.hidden.get(), guest.cell.get());
        }
        team.meet();
        const float* input = space.image.get();
        Element* x = guest.maps[groups_[0].x].get();
        Element* output = max_pool_ ? space.stem.get() : x;
        stem_->run({&input, &output, nullptr, 1}, Finish::relu, team, {nullptr, nullptr, nullptr});
        team.meet();
        if (max_pool_) max_pool<Operand>(3, stem_plane_, space.stem.get(), plane(groups_[0].x), x, team);
    }
    team.meet();
}

// Pool-finish, embed, LSTM step, decide: the threads share the images.
template <typename Operand>
void Network<Operand>::gate_step(const Worker& worker, int index) const {
    if (!gates_.empty()) feedforward_features(worker, index);
    const Call& call = worker.call;
    const bool forced = call.forced && index + 1 < static_cast<int>(blocks_.size());
    const Share mine(worker.count, worker.team);
    for (int i = mine.begin; i < mine.end; ++i) {
        Guest& guest = worker.space.guests[i];
        const std::size_t to = static_cast<std::size_t>(index) * call.batch + worker.first + i;
        guest.executes = decide(call, to, forced, gate_logit(index, guest));
    }
    worker.team.meet();
}

template <typename Operand>
float Network<Operand>::gate_logit(int index, Guest& guest) const {
    const int group = blocks_[index].group;
    if (cell_) {
        embeddings_[index].run(pooled(group, guest), guest.feature.get());
        return cell_->step(guest.feature.get(), guest.hidden.get(), guest.cell.get());
    }
    const Plane& feature = plane(gates_[index].feature());
    float logit;
    average(guest.feature_sums.get(), gates_[index].layers.back()->parts(), feature.channels, feature.pixels(),
            guest.seen.get());
    tails_[index].run(guest.seen.get(), &logit);
    return logit;
}

template <typename Operand>
void Network<Operand>::feedforward_features(const Worker& worker, int index) const {
    const FeedforwardGate& gate = gates_[index];
    const Guests guests = worker.everyone();
    int from = groups_[blocks_[index].group].x;
    if (gate.max_pool) {
        for (int i = 0; i < guests.count; ++i) {
            std::vector<BufferOf<Element>>& maps = guests.of[i]->maps;
            max_pool<Operand>(2, plane(from), maps[from].get(), plane(gate.pooled), maps[gate.pooled].get(),
                              worker.team);
        }
        worker.team.meet();
        from = gate.pooled;
    }
    for (std::size_t i = 0; i < gate.layers.size(); ++i) {
        const bool last = i + 1 == gate.layers.size();
        run_layer(*gate.layers[i], guests, from, gate.maps[i], last ? &Guest::feature_sums : nullptr, Finish::relu,
                  worker);
        from = gate.maps[i];
    }
}

// The guests that run the next block, in order. Every thread makes the same list.
template <typename Operand>
auto Network<Operand>::compact(const Worker& worker) const -> Guests {
    Guests executing;
    for (int i = 0; i < worker.count; ++i)
        if (worker.space.guests[i].executes) executing.add(worker.space.guests[i]);
    return executing;
}

template <typename Operand>
void Network<Operand>::run_block(const Worker& worker, int index, const Guests& executing) const {
    const Block& block = blocks_[index];
    const int result = groups_[block.group].x;
    int from = result;
    if (block.projection) {
        from = groups_[block.group - 1].x;
        update(*block.projection, worker.everyone(), from, result, Finish::none, worker);
    }
    if (executing.count == 0) {
        worker.team.meet();  // all have to know that nobody executes before the gate decides anew
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
    const Share mine(worker.count, worker.team);
    for (int i = mine.begin; i < mine.end; ++i) pooled(blocks_.back().group, worker.space.guests[i]);
    worker.team.meet();
    const float* inputs[kTogether];
    float* outputs[kTogether];
    for (int i = 0; i < worker.count; ++i) {
        inputs[i] = worker.space.guests[i].pooled.get();
        outputs[i] = worker.space.guests[i].logits.get();
    }
    head_->run({inputs, outputs, nullptr, worker.count}, Finish::none, worker.team, {nullptr, nullptr, nullptr});
    worker.team.meet();
    for (int i = mine.begin; i < mine.end; ++i) {
        const Guest& guest = worker.space.guests[i];
        const std::size_t image = worker.first + i;
        std::memcpy(worker.call.logits + image * classes_, guest.logits.get(), classes_ * sizeof(float));
        if (cell_) cell_->finish(guest.hidden.get(), guest.cell.get(), worker.call, image);
    }
    worker.team.meet();
}

// The activation's pooled feature, brought up to date. An image that skipped its block has it still.
template <typename Operand>
const float* Network<Operand>::pooled(int group, Guest& guest) const {
    const Plane& x = plane(groups_[group].x);
    if (guest.parts > 0) average(guest.sums.get(), guest.parts, x.channels, x.pixels(), guest.pooled.get());
    guest.parts = 0;
    return guest.pooled.get();
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
