// What a running grid consists of: threads, thread blocks, clusters, and who waits for whom in them.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "guarded_memory.h"
#include "site.h"

namespace simt {

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
    std::vector<Copy> open_copies;               // not yet committed
    std::vector<std::vector<Copy>> copy_groups;  // committed, oldest first
    std::size_t observed = 0, seen = 0;          // what weak_memory.h knows of it
    int lane() const { return linear % warpSize; }
};

struct Barrier {
    Site site{};
    std::vector<Fiber*> waiting;
    bool any = false, was_any = false;  // of the predicates so far, of those of the last time
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

// A grid on its way. Its blocks' numbers begin with `first`, so that no two grids' are the same.
struct Launch {
    std::string name;
    dim3 grid, block;
    std::size_t shared;
    int cluster;
    std::function<void()> body;
    Launch* before;  // that it may begin before the end of; null: all others have ended
    int first, blocks;
    std::vector<int> order;                 // of the clusters that have not started
    std::size_t resident = 0, running = 0;  // clusters at a time
    int let_next = 0, ended = 0;            // blocks
    std::vector<Fiber*> waiting;            // for the end of the grid before
    bool complete() const { return ended == blocks; }
};

// What other blocks of the cluster have stored to a block and has not come yet.
struct ComingStore {
    unsigned char* to;
    unsigned value;
};

// Counts the bytes of such stores, phase after phase.
struct StoreCounterState {
    int known_after = std::numeric_limits<int>::max();  // which barrier of the cluster others know of it
    bool expected = false;                              // whether the phase's bytes have been announced
    int bytes = 0, phase = 0;                           // still to come; below zero before they are announced
    std::vector<ComingStore> coming;
    std::vector<Fiber*> waiting;
};

struct Block {
    uint3 index{};
    int number = 0, rank = 0, threads = 0, running = 0;
    Launch* launch = nullptr;
    bool let_next = false;  // a thread has said that the next grid may begin
    Cluster* cluster = nullptr;
    std::unique_ptr<Guarded> shared;
    std::vector<Fiber*> fibers;
    Barrier barrier;
    std::vector<std::vector<Collective>> warps;
    std::map<const void*, StoreCounterState> counters;  // by their place in shared memory
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    int running = 0, arrived = 0, phase = 0;
    std::map<Fiber*, int> arrivals;  // the phase that each thread has arrived in and not yet waited for
    std::vector<Fiber*> waiting;
};

}  // namespace simt
