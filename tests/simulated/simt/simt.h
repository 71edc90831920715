// Runs CUDA sources on the CPU, to be proved right where there is no GPU. How a source is run here: README.md.
//
// A thread of a grid is a fiber. Fibers run one at a time, each until it has to wait for others; which one is next, and
// in which order blocks start, comes from a seed. What hardware leaves undefined is made to show:
//   - shared memory starts out as NaN and lies against a page that may not be touched, and so do arrays of `allocate`;
//   - cp.async fills its destination with NaN and copies only when its group is waited for;
//   - what a block leaves to others with __stcg is NaN to them, read by __ldcg, until a fence on each side;
//   - a barrier that not all threads reach, or reach at different lines, a warp operation that lanes of its mask do not
//     take part in, and threads that wait for ever are errors that say who waits where.
#pragma once

#include <csetjmp>
#include <csignal>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define SKIPNET_SIMT
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// Of the running thread; the scheduler sets them at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;
using std::max;
using std::min;

namespace simt {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type, -1 in every integer
constexpr std::size_t kPage = 4096, kStack = 128 * 1024;

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A place in the source, for messages and to tell barriers apart.
struct Site {
    const char* file;
    int line;
    // As a default argument: the place of the call.
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
    bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
    std::string text() const {
        const char* slash = std::strrchr(file, '/');
        return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
    }
};

template <typename... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// Poisoned memory between two pages that fault. By the seed it touches the one before or the one after; what is left
// over on the other side is filled with a pattern that must still be there at the end.
class Guarded {
public:
    Guarded(std::size_t size, bool against_end) : size_(size) {
        // Sizes are rounded up for alignment: the last few bytes past an odd size are checked by the pattern only.
        const std::size_t aligned = (size + 15) / 16 * 16;
        inner_ = std::max(kPage, (aligned + kPage - 1) / kPage * kPage);
        base_ = static_cast<unsigned char*>(
            mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(base_ + kPage, inner_, PROT_READ | PROT_WRITE);
        data_ = base_ + kPage + (against_end ? inner_ - aligned : 0);
        std::memset(base_ + kPage, kPattern, inner_);
        poison();
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(base_, inner_ + 2 * kPage); }
    unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }
    void poison() { std::memset(data_, kPoison, size_); }
    void forbid() { mprotect(base_ + kPage, inner_, PROT_NONE); }
    bool covers(const void* address) const { return address >= base_ && address < base_ + inner_ + 2 * kPage; }
    bool holds(const void* address, std::size_t bytes) const {
        return address >= data_ && static_cast<const unsigned char*>(address) + bytes <= data_ + size_;
    }
    bool intact() const {
        const auto clean = [](const unsigned char* from, const unsigned char* to) {
            return std::all_of(from, to, [](unsigned char byte) { return byte == kPattern; });
        };
        return clean(base_ + kPage, data_) && clean(data_ + size_, base_ + kPage + inner_);
    }

private:
    static constexpr unsigned char kPattern = 0xa5;
    std::size_t size_, inner_;
    unsigned char *base_, *data_;
};

struct Block;

struct Copy {
    unsigned char* to;
    const unsigned char* from;  // null fills with zeros
    int bytes;
};

struct Fiber {
    ucontext_t start;
    std::jmp_buf context;
    unsigned char* stack = nullptr;
    bool started = false, finished = true;
    Block* block = nullptr;
    uint3 thread{};
    int linear = 0;
    const char* waits_for = nullptr;
    Site site{};
    std::vector<Copy> open_copies;                // not yet committed
    std::vector<std::vector<Copy>> copy_groups;   // committed, oldest first
    // How many stores of __stcg had landed when it last looked at what others had done, and what a fence has made of it.
    std::size_t observed = 0, seen = 0;
    int lane() const { return linear % warpSize; }
};

struct Barrier {
    Site site{};
    std::vector<Fiber*> waiting;
    bool any = false, was_any = false;  // of the predicates so far, of those of the last time
};

// A store that other blocks cannot count on yet.
struct Store {
    unsigned char* to;
    float4 value;
    int block, thread;
    bool past_barrier;  // known to all threads of the block: a fence of any of them makes it land
};

// A warp operation that some lanes of its mask have reached.
struct Collective {
    unsigned mask, arrived;
    const char* what;
    Site site;
    void* slots[warpSize];
    Fiber* fibers[warpSize];
};

struct Cluster;

struct Block {
    uint3 index{};
    int number = 0, rank = 0, threads = 0, running = 0;
    Cluster* cluster = nullptr;
    std::unique_ptr<Guarded> shared;
    std::vector<Fiber*> fibers;
    Barrier barrier;
    std::vector<std::vector<Collective>> warps;
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    int running = 0, arrived = 0, phase = 0;
    std::map<Fiber*, int> arrivals;  // the phase that each thread has arrived in and not yet waited for
    std::vector<Fiber*> waiting;
};

class Machine {
public:
    unsigned seed = 0;
    int multiprocessors = 3;  // few, so that persistent grids go round
    Fiber* current = nullptr;

    // Runs a grid to its end, or throws an Error.
    void run(dim3 grid, dim3 block, std::size_t shared, int cluster, std::function<void()> body);

    void wait(const char* what, Site site) {
        current->waits_for = what;
        current->site = site;
        leave();
    }
    void wake(Fiber* fiber) {
        fiber->waits_for = nullptr;
        runnable_.push_back(fiber);
        idle_ = 0;
    }
    // The running thread goes on later; `idly` if it spins until another one has done something.
    void yield(bool idly) {
        if (!idly) idle_ = 0;
        runnable_.push_back(current);
        if (++idle_ > 1'000'000) fail("spins for ever");
        leave();
    }
    // What threads of different blocks know of one another's stores. As in the PTX memory model, a store is known to whoever
    // reads an atomic that was written after a fence after it, and then has a fence. Barriers pass on to the block.
    void store(float4* to, const float4& value) {
        if (reinterpret_cast<std::uintptr_t>(to) % sizeof value) fail("__stcg: the place is not aligned");
        std::memset(static_cast<void*>(to), kPoison, sizeof value);
        stores_.push_back({reinterpret_cast<unsigned char*>(to), value, current->block->number, current->linear, false});
    }
    float4 load(const float4* from) const {
        const auto* place = reinterpret_cast<const unsigned char*>(from);
        for (const Store& store : stores_)
            if (store.to == place && known(store)) return store.value;
        const auto landed = landed_.find(place);
        float4 value = *from;
        if (landed != landed_.end() && landed->second.block != current->block->number &&
            landed->second.when > current->seen)
            std::memset(&value, kPoison, sizeof value);
        return value;
    }
    void fence() {
        const auto pending =
            std::stable_partition(stores_.begin(), stores_.end(), [&](const Store& store) { return known(store); });
        for (auto store = stores_.begin(); store != pending; ++store) land(*store);
        stores_.erase(stores_.begin(), pending);
        current->seen = current->observed;
        perhaps_yield();
    }
    void observe() { current->observed = landed_count_; }
    void barrier_passed(const Block& block) {
        for (Store& store : stores_) store.past_barrier |= store.block == block.number;
        std::size_t observed = 0, seen = 0;
        for (const Fiber* fiber : block.fibers) {
            observed = std::max(observed, fiber->observed);
            seen = std::max(seen, fiber->seen);
        }
        for (Fiber* fiber : block.fibers) fiber->observed = observed, fiber->seen = seen;
    }
    void perhaps_yield() {
        if (random_() % 4 == 0) yield(false);
    }
    [[noreturn]] void fail(const std::string& what, Site site) { fail(what + " at " + site.text()); }
    [[noreturn]] void fail(const std::string& what) {
        error_ = what + whose();
        _longjmp(scheduler_, 1);
    }

    Guarded* allocate(std::size_t size) {
        arrays_.push_back(std::make_unique<Guarded>(size, seed % 2 == 0));
        return arrays_.back().get();
    }
    void release_all() { arrays_.clear(); }
    void check_arrays() const {
        for (const auto& array : arrays_)
            if (!array->intact()) throw Error(text("global memory: written outside an array of ", array->size(), " bytes"));
    }

private:
    // Whether a store comes before what the running thread does.
    bool known(const Store& store) const {
        return store.block == current->block->number && (store.past_barrier || store.thread == current->linear);
    }
    void land(const Store& store) {
        std::memcpy(store.to, &store.value, sizeof store.value);
        landed_[store.to] = {++landed_count_, store.block};
    }
    static void enter();
    static void on_fault(int, siginfo_t* info, void*);
    void leave() {
        if (!_setjmp(current->context)) _longjmp(scheduler_, 1);
    }
    // The scheduler's only way into a fiber; returns when the fiber leaves.
    __attribute__((noinline)) void resume(Fiber* fiber) {
        current = fiber;
        threadIdx = fiber->thread;
        blockIdx = fiber->block->index;
        if (_setjmp(scheduler_)) return;
        if (fiber->started) _longjmp(fiber->context, 1);
        fiber->started = true;
        setcontext(&fiber->start);
    }
    Fiber* fresh_fiber();
    void start_cluster(int index, dim3 grid, dim3 block, std::size_t shared, int size);
    void end_thread(Fiber* fiber);
    std::string whose() const {
        if (!current) return "";
        const uint3 b = current->block->index, t = current->thread;
        return text(" (block ", b.x, ",", b.y, ",", b.z, " thread ", t.x, ",", t.y, ",", t.z, ")");
    }
    std::string stuck() const;
    void abandon();

    std::mt19937 random_;
    std::jmp_buf scheduler_;
    std::string error_;
    int idle_ = 0;
    std::function<void()> body_;
    std::vector<Fiber*> runnable_, spare_;
    std::vector<std::unique_ptr<Cluster>> active_;
    std::vector<std::unique_ptr<Guarded>> arrays_;
    std::vector<Store> stores_;
    struct Landed {
        std::size_t when;
        int block;
    };
    std::unordered_map<const unsigned char*, Landed> landed_;  // in this grid
    std::size_t landed_count_ = 0;
};

inline Machine machine;

inline void Machine::enter() {
    for (;;) {  // a fiber outlives its thread and is used for another
        machine.body_();
        machine.current->finished = true;
        machine.leave();
    }
}

inline Fiber* Machine::fresh_fiber() {
    if (spare_.empty()) {
        auto* fiber = new Fiber;  // never returned: a later grid uses it again
        fiber->stack = static_cast<unsigned char*>(
            mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (fiber->stack == MAP_FAILED) throw std::bad_alloc();
        mprotect(fiber->stack, kPage, PROT_NONE);
        spare_.push_back(fiber);
    }
    Fiber* fiber = spare_.back();
    spare_.pop_back();
    if (!fiber->started) {
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = fiber->stack + kPage;
        fiber->start.uc_stack.ss_size = kStack;
        fiber->start.uc_link = nullptr;
        makecontext(&fiber->start, &Machine::enter, 0);
    }
    fiber->finished = false;
    fiber->observed = fiber->seen = 0;
    fiber->waits_for = nullptr;
    return fiber;
}

inline void Machine::start_cluster(int index, dim3 grid, dim3 block, std::size_t shared, int size) {
    auto cluster = std::make_unique<Cluster>();
    for (int rank = 0; rank < size; ++rank) {
        auto made = std::make_unique<Block>();
        const unsigned linear = index * size + rank;
        made->index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
        made->number = static_cast<int>(linear);
        made->rank = rank;
        made->cluster = cluster.get();
        made->shared = std::make_unique<Guarded>(shared, random_() % 2 == 0);
        made->threads = made->running = block.x * block.y * block.z;
        made->warps.resize((made->threads + warpSize - 1) / warpSize);
        for (int thread = 0; thread < made->threads; ++thread) {
            Fiber* fiber = fresh_fiber();
            fiber->block = made.get();
            fiber->linear = thread;
            fiber->thread = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
            made->fibers.push_back(fiber);
            runnable_.push_back(fiber);
        }
        cluster->blocks.push_back(std::move(made));
    }
    cluster->running = size * static_cast<int>(block.x * block.y * block.z);
    active_.push_back(std::move(cluster));
}

inline void Machine::end_thread(Fiber* fiber) {
    Block& block = *fiber->block;
    for (const auto& group : fiber->copy_groups)
        if (!group.empty()) error_ = "cp.async: a thread ends without waiting for it" + whose();
    if (!fiber->open_copies.empty()) error_ = "cp.async: a thread ends without committing and waiting for it" + whose();
    fiber->copy_groups.clear();
    spare_.push_back(fiber);
    if (--block.running == 0) {
        if (!block.shared->intact()) error_ = "shared memory: written outside the block's" + whose();
        block.shared->forbid();  // no other block of the cluster may look at it any more
    }
    Cluster* cluster = block.cluster;
    if (--cluster->running == 0)
        active_.erase(std::find_if(active_.begin(), active_.end(), [&](auto& one) { return one.get() == cluster; }));
}

inline std::string Machine::stuck() const {
    std::map<std::string, int> waits;
    for (const auto& cluster : active_)
        for (const auto& block : cluster->blocks) {
            for (const Fiber* fiber : block->fibers)
                if (fiber->block == block.get() && fiber->waits_for)
                    ++waits[text(fiber->waits_for, " at ", fiber->site.text())];
            if (block->running < block->threads) waits["their end, reached"] += block->threads - block->running;
        }
    std::string message = "threads wait for ever:";
    for (const auto& [what, count] : waits) message += text(" ", count, " for ", what, ";");
    return message;
}

// After an error: fibers that are in the middle of a kernel start afresh the next time.
inline void Machine::abandon() {
    for (auto& cluster : active_)
        for (auto& block : cluster->blocks)
            for (Fiber* fiber : block->fibers)
                if (fiber->block == block.get() && !fiber->finished) {
                    fiber->started = false;
                    fiber->finished = true;
                    fiber->open_copies.clear();
                    fiber->copy_groups.clear();
                    spare_.push_back(fiber);
                }
    active_.clear();
    runnable_.clear();
}

inline void Machine::on_fault(int, siginfo_t* info, void*) {
    if (!machine.current) {
        std::signal(SIGSEGV, SIG_DFL);
        return;
    }
    std::string where = text("memory that belongs to nobody, ", info->si_addr);
    for (const auto& cluster : machine.active_)
        for (const auto& block : cluster->blocks)
            if (block->shared->covers(info->si_addr))
                where = text("shared memory of block ", block->index.x, " (", block->shared->size(), " bytes), at byte ",
                             static_cast<unsigned char*>(info->si_addr) - block->shared->data(),
                             block->running ? "" : ", after the block's end");
    for (const auto& array : machine.arrays_)
        if (array->covers(info->si_addr))
            where = text("a global array of ", array->size(), " bytes, at byte ",
                         static_cast<unsigned char*>(info->si_addr) - array->data());
    machine.fail("out of bounds: " + where);
}

inline void Machine::run(dim3 grid, dim3 block, std::size_t shared, int cluster, std::function<void()> body) {
    const int blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
    if (blocks == 0 || threads == 0 || threads > 1024) throw Error(text("launch: ", blocks, " blocks of ", threads, " threads"));
    if (grid.x % cluster) throw Error(text("launch: a grid of ", grid.x, " blocks in clusters of ", cluster));
    if (shared > 227 * 1024) throw Error(text("launch: ", shared, " bytes of shared memory, at most 227 KiB"));
    static unsigned char signal_stack[64 * 1024];
    stack_t ours{}, theirs{};
    ours.ss_sp = signal_stack;
    ours.ss_size = sizeof signal_stack;
    sigaltstack(&ours, &theirs);
    struct sigaction action{}, before_segv, before_bus;
    action.sa_sigaction = &Machine::on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);

    random_.seed(seed);
    error_.clear();
    idle_ = 0;
    body_ = std::move(body);
    gridDim = grid;
    blockDim = block;
    std::vector<int> order(blocks / cluster);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::shuffle(order.begin(), order.end(), random_);
    const std::size_t resident = 1 + random_() % 3;  // clusters at a time
    // How often the thread that was woken last goes on: a warp then runs far ahead of the others.
    const unsigned persistence = std::vector<unsigned>{0, 50, 97}[random_() % 3];
    while (error_.empty() && (!order.empty() || !active_.empty())) {
        if (!order.empty() && active_.size() < resident) {
            start_cluster(order.back(), grid, block, shared, cluster);
            order.pop_back();
            continue;
        }
        if (runnable_.empty()) {
            error_ = stuck();
            break;
        }
        if (random_() % 100 >= persistence) std::swap(runnable_[random_() % runnable_.size()], runnable_.back());
        Fiber* fiber = runnable_.back();
        runnable_.pop_back();
        resume(fiber);
        if (error_.empty() && fiber->finished) end_thread(fiber);
        current = nullptr;
    }
    if (!error_.empty()) abandon();
    for (const Store& store : stores_) land(store);
    stores_.clear();
    landed_.clear();
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    sigaltstack(&theirs, nullptr);
    if (!error_.empty()) throw Error(error_);
    check_arrays();
}

// ---- barriers

// Whether the predicate holds for any thread of the block.
inline bool syncthreads(Site site, bool predicate = false) {
    Block& block = *machine.current->block;
    Barrier& barrier = block.barrier;
    if (barrier.waiting.empty()) barrier.site = site;
    if (!(barrier.site == site))
        machine.fail(text("divergent barrier: other threads of the block wait at ", barrier.site.text()), site);
    barrier.any |= predicate;
    if (static_cast<int>(barrier.waiting.size()) + 1 < block.threads) {
        barrier.waiting.push_back(machine.current);
        machine.wait("a barrier", site);
        return barrier.was_any;
    }
    barrier.was_any = barrier.any;
    barrier.any = false;
    machine.barrier_passed(block);
    for (Fiber* fiber : barrier.waiting) machine.wake(fiber);
    barrier.waiting.clear();
    machine.yield(false);
    return barrier.was_any;
}

inline void cluster_arrive(Site site) {
    Cluster& cluster = *machine.current->block->cluster;
    if (!cluster.arrivals.emplace(machine.current, cluster.phase).second)
        machine.fail("cluster barrier: arrived twice without waiting", site);
    int threads = 0;
    for (const auto& block : cluster.blocks) threads += block->threads;
    if (++cluster.arrived == threads) {
        cluster.arrived = 0;
        ++cluster.phase;
        for (Fiber* fiber : cluster.waiting) machine.wake(fiber);
        cluster.waiting.clear();
    }
}

inline void cluster_wait(Site site) {
    Cluster& cluster = *machine.current->block->cluster;
    const auto arrival = cluster.arrivals.find(machine.current);
    if (arrival == cluster.arrivals.end()) machine.fail("cluster barrier: waits without having arrived", site);
    const int phase = arrival->second;
    cluster.arrivals.erase(arrival);
    if (cluster.phase == phase) {
        cluster.waiting.push_back(machine.current);
        machine.wait("a cluster barrier", site);
    } else {
        machine.yield(false);
    }
}

inline int cluster_rank() { return machine.current->block->rank; }
inline int cluster_size() { return static_cast<int>(machine.current->block->cluster->blocks.size()); }

// ---- shared memory

inline unsigned char* shared_memory() { return machine.current->block->shared->data(); }

inline void check_shared(const void* address, std::size_t bytes, const char* what, Site site) {
    const Guarded& shared = *machine.current->block->shared;
    const auto offset = static_cast<const unsigned char*>(address) - shared.data();
    if (!shared.holds(address, bytes))
        machine.fail(text(what, ": byte ", offset, " of ", shared.size(), " bytes of shared memory"), site);
    if (reinterpret_cast<std::uintptr_t>(address) % bytes)
        machine.fail(text(what, ": byte ", offset, " of shared memory is not aligned to ", bytes), site);
}

// Where `own`, an address in this block's shared memory, lies in that of another block of the cluster.
inline void* peer(void* own, int rank, Site site) {
    Block& block = *machine.current->block;
    if (rank < 0 || rank >= cluster_size()) machine.fail(text("mapa: block ", rank, " of ", cluster_size()), site);
    if (!block.shared->holds(own, 1)) machine.fail("mapa: not an address in this block's shared memory", site);
    Block& other = *block.cluster->blocks[rank];
    return other.shared->data() + (static_cast<unsigned char*>(own) - block.shared->data());
}

// ---- warps

// The lanes of `mask` meet. Each leaves a slot; the last one to come calls complete(slots), slots[lane] null outside
// of the mask, and they all go on.
template <typename Complete>
void collective(unsigned mask, const char* what, void* slot, Site site, Complete complete) {
    Fiber* self = machine.current;
    Block& block = *self->block;
    const int lane = self->lane();
    if (!(mask >> lane & 1)) machine.fail(text(what, ": the mask leaves out the calling lane ", lane), site);
    const int lanes = std::min(warpSize, block.threads - self->linear / warpSize * warpSize);
    if (lanes < warpSize && mask >> lanes) machine.fail(text(what, ": the mask names lanes that do not exist"), site);
    auto& pending = block.warps[self->linear / warpSize];
    auto found = std::find_if(pending.begin(), pending.end(), [&](const Collective& one) { return one.mask & mask; });
    if (found == pending.end()) {
        pending.push_back({mask, 0, what, site, {}, {}});
        found = pending.end() - 1;
    }
    if (found->mask != mask || found->what != what || !(found->site == site))
        machine.fail(text(what, ": other lanes of the warp are in ", found->what, " at ", found->site.text()), site);
    found->arrived |= 1u << lane;
    found->slots[lane] = slot;
    found->fibers[lane] = self;
    if (found->arrived != mask) return machine.wait(what, site);
    const Collective all = *found;
    pending.erase(found);
    complete(all.slots);
    for (Fiber* fiber : all.fibers)
        if (fiber && fiber != self) machine.wake(fiber);
    machine.yield(false);
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* what, Site site) {
    static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    struct Slot {
        T value, result;
        int source;
    } slot{value, value, source};
    collective(mask, what, &slot, site, [](void* const* slots) {
        for (int lane = 0; lane < warpSize; ++lane) {
            if (!slots[lane]) continue;
            Slot& to = *static_cast<Slot*>(slots[lane]);
            if (to.source < 0 || to.source >= warpSize || !slots[to.source])
                std::memset(&to.result, kPoison, sizeof(T));  // undefined on hardware
            else
                to.result = static_cast<Slot*>(slots[to.source])->value;
        }
    });
    return slot.result;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* what, Site site) {
    struct Slot {
        bool predicate;
        unsigned result;
    } slot{predicate, 0};
    collective(mask, what, &slot, site, [](void* const* slots) {
        unsigned result = 0;
        for (int lane = 0; lane < warpSize; ++lane)
            if (slots[lane] && static_cast<Slot*>(slots[lane])->predicate) result |= 1u << lane;
        for (int lane = 0; lane < warpSize; ++lane)
            if (slots[lane]) static_cast<Slot*>(slots[lane])->result = result;
    });
    return slot.result;
}

// ldmatrix.x4: four 8x8 matrices of 16-bit values; lane 8 j + r holds the address of row r of matrix j.
inline void ldmatrix_x4(const void* row, unsigned* result, Site site) {
    struct Slot {
        const void* row;
        unsigned* result;
    } slot{row, result};
    check_shared(row, 16, "ldmatrix", site);
    collective(~0u, "ldmatrix", &slot, site, [](void* const* slots) {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int lane = 0; lane < warpSize; ++lane) {
                const Slot& holder = *static_cast<Slot*>(slots[8 * matrix + lane / 4]);
                std::memcpy(static_cast<Slot*>(slots[lane])->result + matrix,
                            static_cast<const unsigned char*>(holder.row) + lane % 4 * 4, 4);
            }
    });
}

// What a lane brings to an mma.sync: its fragments of d, a and b, laid out as the PTX ISA says.
struct Fragments {
    float* d;
    const unsigned *a, *b;
};

// d += lhs rhs; d's layout does not depend on K.
template <int K>
void add_products(void* const* slots, const float (&lhs)[16][K], const float (&rhs)[K][8]) {
    float sums[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int column = 0; column < 8; ++column) sums[row][column] += lhs[row][k] * rhs[k][column];
    for (int lane = 0; lane < warpSize; ++lane) {
        float* to = static_cast<Fragments*>(slots[lane])->d;
        const int group = lane / 4, pair = lane % 4 * 2;
        to[0] += sums[group][pair];
        to[1] += sums[group][pair + 1];
        to[2] += sums[group + 8][pair];
        to[3] += sums[group + 8][pair + 1];
    }
}

// mma.sync.m16n8k8, d = a b + d, of values with TF32's 10 bits of fraction: their products are exact in float32.
inline void mma_m16n8k8_tf32(float* d, const unsigned* a, const unsigned* b, Site site) {
    Fragments own{d, a, b};
    for (int i = 0; i < 4; ++i)
        if (a[i] & 0x1fff || b[i % 2] & 0x1fff) machine.fail("mma.sync: an operand has not been rounded to TF32", site);
    collective(~0u, "mma.sync", &own, site, [](void* const* slots) {
        const auto as_float = [](unsigned bits) {
            float value;
            std::memcpy(&value, &bits, sizeof value);
            return value;
        };
        float lhs[16][8], rhs[8][8];
        for (int lane = 0; lane < warpSize; ++lane) {
            const Fragments& from = *static_cast<Fragments*>(slots[lane]);
            const int group = lane / 4, place = lane % 4;
            lhs[group][place] = as_float(from.a[0]);
            lhs[group + 8][place] = as_float(from.a[1]);
            lhs[group][place + 4] = as_float(from.a[2]);
            lhs[group + 8][place + 4] = as_float(from.a[3]);
            rhs[place][group] = as_float(from.b[0]);
            rhs[place + 4][group] = as_float(from.b[1]);
        }
        add_products(slots, lhs, rhs);
    });
}

// mma.sync.m16n8k16, d = a b + d. Products of 16-bit values are exact in float32.
template <typename ToFloat>
void mma_m16n8k16(float* d, const unsigned* a, const unsigned* b, ToFloat to_float, Site site) {
    Fragments own{d, a, b};
    collective(~0u, "mma.sync", &own, site, [=](void* const* slots) {
        float lhs[16][16], rhs[16][8];
        for (int lane = 0; lane < warpSize; ++lane) {
            const Fragments& from = *static_cast<Fragments*>(slots[lane]);
            const int group = lane / 4, pair = lane % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                const auto value = [half](unsigned both) { return static_cast<std::uint16_t>(both >> 16 * half); };
                lhs[group][pair + half] = to_float(value(from.a[0]));
                lhs[group + 8][pair + half] = to_float(value(from.a[1]));
                lhs[group][pair + 8 + half] = to_float(value(from.a[2]));
                lhs[group + 8][pair + 8 + half] = to_float(value(from.a[3]));
                rhs[pair + half][group] = to_float(value(from.b[0]));
                rhs[pair + 8 + half][group] = to_float(value(from.b[1]));
            }
        }
        add_products(slots, lhs, rhs);
    });
}

// ---- cp.async

inline void cp_async(void* to, const void* from, int bytes, bool filled, Site site) {
    check_shared(to, bytes, "cp.async", site);
    if (filled && reinterpret_cast<std::uintptr_t>(from) % bytes)
        machine.fail(text("cp.async: the source is not aligned to ", bytes), site);
    std::memset(to, kPoison, bytes);
    machine.current->open_copies.push_back(
        {static_cast<unsigned char*>(to), filled ? static_cast<const unsigned char*>(from) : nullptr, bytes});
}

inline void cp_async_commit() {
    Fiber& self = *machine.current;
    self.copy_groups.push_back(std::move(self.open_copies));
    self.open_copies.clear();
}

// Lands all of the thread's groups but the `pending` newest.
inline void cp_async_wait(int pending) {
    auto& groups = machine.current->copy_groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front())
            if (copy.from)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
        groups.erase(groups.begin());
    }
}

// ---- atomics: fibers are never interrupted, so each is one step; but others may come in between

template <typename T, typename Update>
T atomic(T* address, Update update) {
    machine.perhaps_yield();
    const T before = *const_cast<volatile T*>(address);
    *const_cast<volatile T*>(address) = update(before);
    machine.observe();
    machine.perhaps_yield();
    return before;
}

// What a spinning thread reads: the others get their turn.
template <typename T>
T load(const T* address) {
    machine.yield(true);
    machine.observe();
    return *const_cast<const volatile T*>(address);
}

// ---- what a library of tests exports

// Runs a test's entry; null, or what went wrong.
template <typename Body>
const char* report(Body body) {
    static std::string message;
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace simt

extern "C" {
__attribute__((used)) inline void simt_configure(unsigned seed, int multiprocessors) {
    simt::machine.seed = seed;
    simt::machine.multiprocessors = multiprocessors;
}
__attribute__((used)) inline void* simt_allocate(std::size_t size) { return simt::machine.allocate(size)->data(); }
__attribute__((used)) inline void simt_release() { simt::machine.release_all(); }
}

// ---- CUDA's own functions

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::syncthreads(site); }
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
    return simt::syncthreads(site, predicate != 0);
}
inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::here()) {
    char slot;
    simt::collective(mask, "__syncwarp", &slot, site, [](void* const*) {});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, simt::Site site = simt::Site::here()) {
    return simt::shuffle(mask, value, lane & 31, "__shfl_sync", site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt::Site site = simt::Site::here()) {
    return simt::shuffle(mask, value, simt::machine.current->lane() ^ lanes, "__shfl_xor_sync", site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, simt::Site site = simt::Site::here()) {
    const int lane = simt::machine.current->lane();
    return simt::shuffle(mask, value, lane < delta ? lane : lane - delta, "__shfl_up_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot(mask, predicate, "__ballot_sync", site);
}
template <typename T>
T atomicAdd(T* address, T value) {
    return simt::atomic(address, [=](T before) { return before + value; });
}
template <typename T>
T atomicExch(T* address, T value) {
    return simt::atomic(address, [=](T) { return value; });
}
inline void __threadfence() { simt::machine.fence(); }
inline void __stcg(float4* to, const float4& value) { simt::machine.store(to, value); }
inline float4 __ldcg(const float4* from) { return simt::machine.load(from); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
