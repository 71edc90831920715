// A thread of a grid is a fiber. Fibers run one at a time, each until it has to wait for others; which one is next, and
// in which order thread blocks start, comes from a seed.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "grid.h"
#include "weak_memory.h"

namespace simt {

// Of a launch; shared memory in bytes.
struct Shape {
    int blocks, threads, shared;
};

constexpr std::size_t kStack = 128 * 1024;

// The simulated GPU, with one stream: a grid runs after the one before it. A dependent one's threads already run once
// all thread blocks of that have let them, or have ended, but wait for its end where they say so.
class Machine {
public:
    unsigned seed = 0;
    int multiprocessors = 3;  // few, so that persistent grids go round
    Fiber* current = nullptr;
    std::vector<Shape> launched;  // since the last time that somebody cleared it

    // Puts a grid into the stream.
    void launch(const char* name, dim3 grid, dim3 block, std::size_t shared, int cluster, bool dependent,
                std::function<void()> body);
    // Runs all grids to their end, or throws an Error.
    void synchronize();
    void discard() { stream_.clear(); }

    void let_next_grid() {
        Block& block = *current->block;
        if (!block.let_next) ++block.launch->let_next;
        block.let_next = true;
        perhaps_yield();
    }
    void wait_for_previous_grid(Site site) {
        Launch& launch = *current->block->launch;
        if (!launch.before || launch.before->complete()) return;
        launch.waiting.push_back(current);
        wait("the end of the grid before", site);
    }

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
    std::size_t random(std::size_t below) { return random_() % below; }
    void perhaps_yield() {
        if (random_() % 4 == 0) yield(false);
    }
    [[noreturn]] void fail(const std::string& what, Site site) { fail(what + " at " + site.text()); }
    [[noreturn]] void fail(const std::string& what) {
        error_ = what + whose();
        _longjmp(scheduler_, 1);
    }

private:
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
        gridDim = fiber->block->launch->grid;
        blockDim = fiber->block->launch->block;
        if (_setjmp(scheduler_)) return;
        if (fiber->started) _longjmp(fiber->context, 1);
        fiber->started = true;
        setcontext(&fiber->start);
    }
    Fiber* fresh_fiber();
    void start_cluster(Launch& launch);
    bool start_clusters();
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
    unsigned persistence_ = 0;  // how often the thread that was woken last goes on: a warp then runs far ahead
    std::vector<std::unique_ptr<Launch>> stream_;
    std::vector<Fiber*> runnable_, spare_;
    std::vector<std::unique_ptr<Cluster>> active_;
};

inline Machine machine;

inline void Machine::enter() {
    for (;;) {  // a fiber outlives its thread and is used for another
        machine.current->block->launch->body();
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

inline void Machine::start_cluster(Launch& launch) {
    auto cluster = std::make_unique<Cluster>();
    const dim3 grid = launch.grid, block = launch.block;
    const int size = launch.cluster, index = launch.order.back();
    launch.order.pop_back();
    ++launch.running;
    for (int rank = 0; rank < size; ++rank) {
        auto made = std::make_unique<Block>();
        const unsigned linear = index * size + rank;
        made->index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
        made->number = launch.first + static_cast<int>(linear);
        made->rank = rank;
        made->launch = &launch;
        made->cluster = cluster.get();
        made->shared = std::make_unique<Guarded>(launch.shared, random_() % 2 == 0);
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

// Of every grid that has begun or may begin. Whether there is anything left to do.
inline bool Machine::start_clusters() {
    bool left = false;
    for (const auto& launch : stream_) {
        if (launch->before && launch->before->let_next < launch->before->blocks) break;
        while (!launch->order.empty() && launch->running < launch->resident) start_cluster(*launch);
        left |= !launch->complete();
    }
    return left;
}

inline void Machine::end_thread(Fiber* fiber) {
    Block& block = *fiber->block;
    for (const auto& group : fiber->copy_groups)
        if (!group.empty()) error_ = "cp.async: a thread ends without waiting for it" + whose();
    if (!fiber->open_copies.empty()) error_ = "cp.async: a thread ends without committing and waiting for it" + whose();
    fiber->copy_groups.clear();
    spare_.push_back(fiber);
    if (--block.running == 0) {
        for (const auto& [place, counter] : block.counters)
            if (!counter.coming.empty())
                error_ = "st.async: a block ends before what is stored to it has come" + whose();
        block.shared->permit();
        if (!block.shared->intact()) error_ = "shared memory: written outside the block's" + whose();
        block.shared->forbid();  // no other block of the cluster may look at it any more
        Launch& launch = *block.launch;
        if (!block.let_next) ++launch.let_next;
        if (++launch.ended == launch.blocks) {
            weak_memory.end_of_grid(launch);
            for (const auto& next : stream_)
                if (next->before == &launch)
                    for (Fiber* waiting : std::exchange(next->waiting, {})) wake(waiting);
        }
    }
    Cluster* cluster = block.cluster;
    Launch* launch = block.launch;
    if (--cluster->running > 0) return;
    --launch->running;
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
                where = text("shared memory of block ", block->index.x, " (", block->shared->size(),
                             " bytes), at byte ", static_cast<unsigned char*>(info->si_addr) - block->shared->data(),
                             block->running ? "" : ", after the block's end");
    if (const Guarded* array = global_memory.around(info->si_addr))
        where = text("a global array of ", array->size(), " bytes, at byte ",
                     static_cast<unsigned char*>(info->si_addr) - array->data());
    machine.fail("out of bounds: " + where);
}

inline void Machine::launch(const char* name, dim3 grid, dim3 block, std::size_t shared, int cluster, bool dependent,
                            std::function<void()> body) {
    const int blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
    const auto refuse = [&](const std::string& why) { throw Error(text(name, ": launch: ", why)); };
    if (blocks == 0 || threads == 0 || threads > 1024) refuse(text(blocks, " blocks of ", threads, " threads"));
    if (grid.x % cluster) refuse(text("a grid of ", grid.x, " blocks in clusters of ", cluster));
    if (shared > 227 * 1024) refuse(text(shared, " bytes of shared memory, at most 227 KiB"));
    launched.push_back({blocks, threads, static_cast<int>(shared)});
    if (!dependent) synchronize();
    Launch* before = stream_.empty() ? nullptr : stream_.back().get();
    const int first = before ? before->first + before->blocks : 0;
    stream_.push_back(std::make_unique<Launch>(
        Launch{name, grid, block, shared, cluster, std::move(body), before, first, blocks, {}, 0, 0, 0, 0, {}}));
}

inline void Machine::synchronize() {
    if (stream_.empty()) return;
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
    persistence_ = std::vector<unsigned>{0, 50, 97}[random_() % 3];
    for (const auto& launch : stream_) {
        for (int i = 0; i < launch->blocks / launch->cluster; ++i) launch->order.push_back(i);
        std::shuffle(launch->order.begin(), launch->order.end(), random_);
        launch->resident = 1 + random_() % 3;
    }
    while (error_.empty() && start_clusters()) {
        if (runnable_.empty()) {
            error_ = stuck();
            break;
        }
        if (random_() % 100 >= persistence_) std::swap(runnable_[random_() % runnable_.size()], runnable_.back());
        Fiber* fiber = runnable_.back();
        runnable_.pop_back();
        resume(fiber);
        if (error_.empty() && fiber->finished) end_thread(fiber);
        if (!error_.empty()) error_ = fiber->block->launch->name + ": " + error_;
        current = nullptr;
    }
    if (!error_.empty()) abandon();
    stream_.clear();
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    sigaltstack(&theirs, nullptr);
    if (!error_.empty()) throw Error(error_);
    global_memory.check();
}

}  // namespace simt
