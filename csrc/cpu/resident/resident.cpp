// The resident strategy, compiled once for each instruction set (SKIPNET_ISA, SKIPNET_WIDTH; setup.py lists them).
//
// A team of threads takes a few images from stem to head; a worker's activations stay in its cache. Skipping is a
// branch. The rooms are those of every engine: stem, gate_step, compact, run_block, head.
#include "resident.h"

#include <atomic>

#include "conv_nhwc.h"
#include "../gate_step.h"
#include "../variant.h"
#include "../workspace_pool.h"

namespace skipnet::cpu {
namespace {

// Images that share a pass over the weights, at most. The transformed weights of SkipNet-110 are 27 MB: a pass for one
// image alone waits for memory; docs/performance.md has the figures.
constexpr int kGroup = 8;

constexpr std::chrono::microseconds kPatience(100);  // with late threads, for each image: less than one takes

struct Block {
    int group;       // of its output, from 0
    bool changes;    // the group: the first convolution is strided, the shortcut a projection
    int first;       // place in direct_ where it changes the group, in winograd_ otherwise
    int last;        // place in winograd_
    int projection;  // place in direct_, where it changes the group
};

struct FeedforwardGate {
    bool max_pool;
    int first;   // place in gate_winograd_, where there is a max pool (FFGate-I)
    int second;  // place in gate_direct_
};

enum class Pooled { current, from_tiles, from_plane };  // what the pooled feature is, or how to come by it

// An image's memory in one group of blocks.
struct Room {
    Buffer x, inner;                  // the activation, and a block's inner one
    Buffer tile_sums;                 // [tiles, channels] of x
    Buffer halved, seen, feature;     // of a feed-forward gate: max pool, first and second convolution
};

// One image on its way.
struct Guest {
    Buffer image;             // channels last, bordered
    std::vector<Room> rooms;  // one a group
    Buffer pooled, seen;      // [most channels]: of the activation, of a feed-forward gate's feature map
    Pooled state;             // of pooled
    Buffer feature;           // [embed]
    Buffer hidden, cell;      // [lanes], [2 * lanes]
    bool executes;            // the next block
};

// What a team needs for a few images. Made once, reused from call to call.
template <typename Operand>
struct Workspace {
    std::vector<Guest> guests;                   // [kGroup]
    std::vector<Scratch<Operand>> scratch;       // [threads of the team]
    std::vector<Scratch<Float32>> gate_scratch;  // [threads of the team]: gates are float32 always
};

// A team's few images, shared by its threads.
struct Visit {
    const Call& call;
    Guest* guests;     // [kGroup]
    int first, count;  // images first .. first + count - 1 of the call
};

// Some of a visit's guests, in order.
struct Guests {
    Guest* of[kGroup];
    int count = 0;

    void add(Guest& guest) { of[count++] = &guest; }
};

// A buffer of each of some guests.
struct Buffers {
    float* of[kGroup];

    template <typename Select>
    Buffers(const Guests& guests, const Select& select) {
        for (int i = 0; i < guests.count; ++i) of[i] = select(*guests.of[i]).get();
    }
};

// One thread's part in a visit.
template <typename Operand>
struct Worker {
    Visit& visit;
    Team team;
    Scratch<Operand>& scratch;
    Scratch<Float32>& gate_scratch;

    Guests everyone() const {
        Guests guests;
        for (int i = 0; i < visit.count; ++i) guests.add(visit.guests[i]);
        return guests;
    }
};

// to[c] = sum over i of from[i * channels + c], divided by `pixels`; in ascending i.
void average(const float* from, int count, int channels, int pixels, float* to) {
    for (int c = 0; c < channels; c += kWidth) {
        Vector sum = {};
        for (int i = 0; i < count; ++i) sum += load(from + i * channels + c);
        store(to + c, sum / broadcast(static_cast<float>(pixels)));
    }
}

// Global average of a plane.
void pool(const Plane& plane, const float* x, float* to) {
    for (int c = 0; c < plane.channels; c += kWidth) {
        Vector sum = {};
        for (int y = 0; y < plane.height; ++y)
            for (int pixel = 0; pixel < plane.width; ++pixel) sum += load(x + plane.at(y, pixel) + c);
        store(to + c, sum / broadcast(static_cast<float>(plane.height * plane.width)));
    }
}

// 2x2 maximum of all four, NaN if any is; the team shares the rows.
void max_pool(const Plane& in, const float* from, const Plane& out, float* to, const Team& team) {
    const Share rows(out.height, team);
    for (int y = rows.begin; y < rows.end; ++y)
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
}

// Operand: what products are formed from, see vector.h.
template <typename Operand>
class Network final : public Engine {
    using Workspace = cpu::Workspace<Operand>;
    using Worker = cpu::Worker<Operand>;

public:
    explicit Network(const NetworkWeights& weights);
    void run(const Call& call) override;

private:
    void walk(const Worker& worker) const;
    void stem(const Worker& worker) const;
    void gate_step(const Worker& worker, int index) const;
    Guests compact(const Worker& worker) const;
    void run_block(const Worker& worker, int index, const Guests& executing) const;
    void head(const Worker& worker) const;

    void feedforward_features(const Worker& worker, int index) const;
    float gate_logit(int index, Guest& guest) const;
    const float* pooled(int group, Guest& guest) const;

    std::unique_ptr<Workspace> take_workspace(int threads);
    Room make_room(int group) const;

    // What a feed-forward gate's last convolution reads and writes in a group.
    Plane seen_plane(int group) const {
        const Plane& plane = planes_[group];
        return gates_[0].max_pool ? Plane{plane.height / 2, plane.width / 2, plane.channels} : plane;
    }
    Plane feature_plane(int group) const {
        const Plane seen = seen_plane(group);
        return {(seen.height + 1) / 2, (seen.width + 1) / 2, seen.channels};
    }

    template <typename Layer>
    static int add(std::vector<Layer>& layers, const ConvolutionWeights& layer, int in_channels) {
        layers.emplace_back(layer, in_channels);
        return static_cast<int>(layers.size()) - 1;
    }

    int classes_, most_channels_ = 0;
    Plane image_;                // the input, channels last
    std::vector<Plane> planes_;  // one a group
    std::vector<Block> blocks_;
    Direct<Float32> stem_;       // three channels do not pair
    std::vector<Direct<Operand>> direct_;
    std::vector<Winograd<Operand>> winograd_;
    std::vector<Direct<Float32>> gate_direct_;
    std::vector<Winograd<Float32>> gate_winograd_;
    std::vector<Linear> embeddings_, tails_;  // one a block, for the gates' kind
    std::vector<FeedforwardGate> gates_;
    std::unique_ptr<RnnCell> cell_;
    std::unique_ptr<Linear> head_;

    Workspaces<Workspace> spaces_;
};

template <typename Operand>
Network<Operand>::Network(const NetworkWeights& weights)
    : classes_(weights.classes), image_{weights.height, weights.width, weights.stem.in},
      stem_(weights.stem, image_.channels) {
    planes_.push_back(stem_.out(image_));
    for (std::size_t index = 0; index < weights.blocks.size(); ++index) {
        const BlockWeights& block = weights.blocks[index];
        const int channels = planes_.back().channels;
        Block packed{};
        packed.changes = block.projects;
        if (block.projects) {
            packed.projection = add(direct_, block.projection, channels);
            packed.first = add(direct_, block.first, channels);
            planes_.push_back(direct_[packed.first].out(planes_.back()));
        } else {
            packed.first = add(winograd_, block.first, channels);
        }
        packed.group = static_cast<int>(planes_.size()) - 1;
        packed.last = add(winograd_, block.last, planes_.back().channels);
        blocks_.push_back(packed);

        const int out = block.last.out;
        if (!weights.embeddings.empty()) {
            const Embedding& embedding = weights.embeddings[index];
            embeddings_.emplace_back(embedding.weight, embedding.bias, out, weights.lstm.embed);
        }
        if (!weights.gates.empty()) {
            const GateConvolutions& gate = weights.gates[index];
            const int seen = planes_.back().channels;
            FeedforwardGate packed_gate{gate.max_pool, -1, -1};
            if (gate.max_pool) packed_gate.first = add(gate_winograd_, gate.layers[0], seen);
            packed_gate.second = add(gate_direct_, gate.layers.back(), seen);
            gates_.push_back(packed_gate);
            tails_.emplace_back(weights.tails[index].weight, &weights.tails[index].bias, out, 1);
        }
    }
    if (!embeddings_.empty()) cell_ = std::make_unique<RnnCell>(weights.lstm);
    head_ = std::make_unique<Linear>(weights.head_weight, weights.head_bias, weights.blocks.back().last.out, classes_);
    for (const Plane& plane : planes_)
        if (plane.channels > most_channels_) most_channels_ = plane.channels;
}

template <typename Operand>
Room Network<Operand>::make_room(int group) const {
    const Plane& plane = planes_[group];
    Room room{Buffer(plane.size()), Buffer(plane.size()), Buffer(plane.tiles() * plane.channels), {}, {}, {}};
    if (!gates_.empty()) {
        if (gates_[0].max_pool) {
            room.halved = Buffer(seen_plane(group).size());
            room.seen = Buffer(seen_plane(group).size());
        }
        room.feature = Buffer(feature_plane(group).size());
    }
    return room;
}

template <typename Operand>
auto Network<Operand>::take_workspace(int threads) -> std::unique_ptr<Workspace> {
    std::unique_ptr<Workspace> space = spaces_.take();
    if (!space) {
        space = std::make_unique<Workspace>();
        const int lanes = cell_ ? cell_->lanes() : 0;
        for (int i = 0; i < kGroup; ++i) {
            Guest guest{Buffer(image_.size()), {}, Buffer(most_channels_), Buffer(most_channels_), Pooled::current,
                        Buffer(cell_ ? cell_->embed() : 0), Buffer(lanes), Buffer(2 * lanes), true};
            for (int group = 0; group < static_cast<int>(planes_.size()); ++group)
                guest.rooms.push_back(make_room(group));
            space->guests.push_back(std::move(guest));
        }
    }
    while (static_cast<int>(space->scratch.size()) < threads) {
        space->scratch.emplace_back(planes_, kGroup);
        space->gate_scratch.emplace_back(gate_winograd_.empty() ? std::vector<Plane>() : planes_, kGroup);
    }
    return space;
}

// Few images: all threads work on each. Many: every thread takes a few at a time, as long as there are any.
template <typename Operand>
void Network<Operand>::run(const Call& call) {
    struct Tour {
        Network& network;
        const Call& call;
        const int team_size, group;
        std::vector<std::unique_ptr<Workspace>> spaces;  // one a team
        std::vector<std::unique_ptr<Visit>> visits;
        std::vector<std::unique_ptr<Barrier>> barriers;
        std::atomic<int> next{0};  // the first image that nobody has taken

        // The team's first thread takes images for all of it.
        void take(Visit& visit) {
            visit.first = next.fetch_add(group, std::memory_order_relaxed);
            const int left = call.batch - visit.first;
            visit.count = left < group ? left : group;
        }
    };
    Crew crew(call.threads, call.batch * kPatience);
    const int team_size = call.batch < crew.size() ? crew.size() / call.batch : 1, teams = crew.size() / team_size;
    const int rounds = (call.batch + teams * kGroup - 1) / (teams * kGroup);
    Tour tour{*this, call, team_size, (call.batch + teams * rounds - 1) / (teams * rounds), {}, {}, {}};
    for (int team = 0; team < teams; ++team) {
        tour.spaces.push_back(take_workspace(team_size));
        tour.visits.push_back(std::unique_ptr<Visit>(new Visit{call, tour.spaces.back()->guests.data(), 0, 0}));
        tour.barriers.push_back(std::make_unique<Barrier>(team_size));
    }
    crew.run([](void* context, int rank) {
        Tour& tour = *static_cast<Tour*>(context);
        const int number = rank / tour.team_size;
        if (number == static_cast<int>(tour.spaces.size())) return;  // too few are left for a team
        const Team team{rank % tour.team_size, tour.team_size, tour.barriers[number].get()};
        Visit& visit = *tour.visits[number];
        const Worker worker{visit, team, tour.spaces[number]->scratch[team.rank],
                            tour.spaces[number]->gate_scratch[team.rank]};
        for (;;) {
            if (team.rank == 0) tour.take(visit);
            team.meet();
            if (visit.count <= 0) return;
            tour.network.walk(worker);
            team.meet();
        }
    }, &tour);
    for (auto& space : tour.spaces) spaces_.give_back(std::move(space));
}

template <typename Operand>
void Network<Operand>::walk(const Worker& worker) const {
    const int steps = worker.visit.call.steps, blocks = static_cast<int>(blocks_.size());
    stem(worker);
    for (int index = 0; index < blocks; ++index) {
        run_block(worker, index, compact(worker));
        if (index < steps) gate_step(worker, index);
    }
    head(worker);
}

template <typename Operand>
void Network<Operand>::stem(const Worker& worker) const {
    const Visit& visit = worker.visit;
    const Guests guests = worker.everyone();
    const int channels = image_.channels, pixels = image_.height * image_.width;
    const Share rows(image_.height, worker.team);
    for (int i = 0; i < guests.count; ++i) {
        Guest& guest = *guests.of[i];
        const std::size_t from = static_cast<std::size_t>(visit.first + i) * channels * pixels;
        for (int y = rows.begin; y < rows.end; ++y)
            for (int x = 0; x < image_.width; ++x)
                for (int c = 0; c < channels; ++c)
                    guest.image.get()[image_.at(y, x) + c] =
                        visit.call.images[from + c * pixels + y * image_.width + x];
        if (worker.team.rank == 0) {
            guest.executes = true;
            if (cell_) cell_->begin(guest.hidden.get(), guest.cell.get());
        }
    }
    worker.team.meet();
    const Buffers images(guests, [](Guest& guest) -> Buffer& { return guest.image; });
    const Buffers x(guests, [](Guest& guest) -> Buffer& { return guest.rooms[0].x; });
    stem_.run(image_, images.of, x.of, true, guests.count, worker.team, worker.gate_scratch);
    worker.team.meet();
}

// Pool-finish, embed, LSTM step, decide.
template <typename Operand>
void Network<Operand>::gate_step(const Worker& worker, int index) const {
    if (!gates_.empty()) feedforward_features(worker, index);
    if (worker.team.rank == 0) {
        const Visit& visit = worker.visit;
        const Call& call = visit.call;
        const bool forced = call.forced && index + 1 < static_cast<int>(blocks_.size());
        for (int i = 0; i < visit.count; ++i) {
            Guest& guest = visit.guests[i];
            const std::size_t to = static_cast<std::size_t>(index) * call.batch + visit.first + i;
            guest.executes = decide(call, to, forced, gate_logit(index, guest));
        }
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
    float logit;
    pool(feature_plane(group), guest.rooms[group].feature.get(), guest.seen.get());
    tails_[index].run(guest.seen.get(), &logit);
    return logit;
}

template <typename Operand>
void Network<Operand>::feedforward_features(const Worker& worker, int index) const {
    const FeedforwardGate& gate = gates_[index];
    const int group = blocks_[index].group;
    const Guests guests = worker.everyone();
    const Buffers x(guests, [&](Guest& guest) -> Buffer& { return guest.rooms[group].x; });
    const Buffers feature(guests, [&](Guest& guest) -> Buffer& { return guest.rooms[group].feature; });
    if (!gate.max_pool) {
        gate_direct_[gate.second].run(planes_[group], x.of, feature.of, true, guests.count, worker.team,
                                      worker.gate_scratch);
    } else {
        const Buffers halved(guests, [&](Guest& guest) -> Buffer& { return guest.rooms[group].halved; });
        const Buffers seen(guests, [&](Guest& guest) -> Buffer& { return guest.rooms[group].seen; });
        const Plane plane = seen_plane(group);
        for (int i = 0; i < guests.count; ++i) max_pool(planes_[group], x.of[i], plane, halved.of[i], worker.team);
        worker.team.meet();
        gate_winograd_[gate.first].run(plane, halved.of, seen.of, false, nullptr, guests.count, worker.team,
                                       worker.gate_scratch);
        worker.team.meet();
        gate_direct_[gate.second].run(plane, seen.of, feature.of, true, guests.count, worker.team,
                                      worker.gate_scratch);
    }
    worker.team.meet();
}

// The guests that run the next block, in order. Every thread of a team makes the same list.
template <typename Operand>
Guests Network<Operand>::compact(const Worker& worker) const {
    Guests executing;
    for (int i = 0; i < worker.visit.count; ++i)
        if (worker.visit.guests[i].executes) executing.add(worker.visit.guests[i]);
    return executing;
}

template <typename Operand>
void Network<Operand>::run_block(const Worker& worker, int index, const Guests& executing) const {
    const Block& block = blocks_[index];
    const int group = block.group;
    const Plane& plane = planes_[group];
    const Team& team = worker.team;
    const Buffers inner(executing, [&](Guest& guest) -> Buffer& { return guest.rooms[group].inner; });
    const Buffers x(executing, [&](Guest& guest) -> Buffer& { return guest.rooms[group].x; });
    const Buffers sums(executing, [&](Guest& guest) -> Buffer& { return guest.rooms[group].tile_sums; });
    if (block.changes) {
        const Guests guests = worker.everyone();
        const Buffers all_before(guests, [&](Guest& guest) -> Buffer& { return guest.rooms[group - 1].x; });
        const Buffers all_x(guests, [&](Guest& guest) -> Buffer& { return guest.rooms[group].x; });
        const Buffers before(executing, [&](Guest& guest) -> Buffer& { return guest.rooms[group - 1].x; });
        direct_[block.projection].run(planes_[group - 1], all_before.of, all_x.of, false, guests.count, team,
                                      worker.scratch);
        direct_[block.first].run(planes_[group - 1], before.of, inner.of, true, executing.count, team,
                                 worker.scratch);
        if (team.rank == 0)
            for (int i = 0; i < guests.count; ++i) guests.of[i]->state = Pooled::from_plane;
    } else {
        winograd_[block.first].run(plane, x.of, inner.of, false, nullptr, executing.count, team, worker.scratch);
    }
    team.meet();
    winograd_[block.last].run(plane, inner.of, x.of, true, sums.of, executing.count, team, worker.scratch);
    if (team.rank == 0)
        for (int i = 0; i < executing.count; ++i) executing.of[i]->state = Pooled::from_tiles;
    team.meet();
}

// Global average pool and classifier.
template <typename Operand>
void Network<Operand>::head(const Worker& worker) const {
    if (worker.team.rank != 0) return;
    const Visit& visit = worker.visit;
    for (int i = 0; i < visit.count; ++i) {
        Guest& guest = visit.guests[i];
        const std::size_t image = visit.first + i;
        head_->run(pooled(static_cast<int>(planes_.size()) - 1, guest), visit.call.logits + image * classes_);
        if (cell_) cell_->finish(guest.hidden.get(), guest.cell.get(), visit.call, image);
    }
}

// The activation's pooled feature, brought up to date. An image that skipped its block has it still.
template <typename Operand>
const float* Network<Operand>::pooled(int group, Guest& guest) const {
    const Plane& plane = planes_[group];
    const Room& room = guest.rooms[group];
    if (guest.state == Pooled::from_plane) pool(plane, room.x.get(), guest.pooled.get());
    if (guest.state == Pooled::from_tiles)
        average(room.tile_sums.get(), plane.tiles(), plane.channels, plane.height * plane.width, guest.pooled.get());
    guest.state = Pooled::current;
    return guest.pooled.get();
}

}  // namespace

std::unique_ptr<Engine> SKIPNET_VARIANT(make_resident)(const NetworkWeights& weights) {
#if defined(__AMX_BF16__)
    if (weights.bfloat16) return std::make_unique<Network<AmxBFloat16>>(weights);
#elif defined(__AVX512BF16__)
    if (weights.bfloat16) return std::make_unique<Network<BFloat16>>(weights);
#endif
    return std::make_unique<Network<Float32>>(weights);
}

}  // namespace skipnet::cpu
