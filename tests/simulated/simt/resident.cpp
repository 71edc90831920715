// Entries for tests/simulated/test_simt_resident.py.
#include <utility>

#include "simt.h"

#include "cuda/resident.cu"

using namespace skipnet::cuda;

namespace {

// bfloat16, in, height, width, classes, embed, hidden, stages, blocks of each.
ResidentNetwork network_of(const int* numbers) {
    ResidentNetwork network{};
    network.element = numbers[0] ? ElementType::bfloat16 : ElementType::float16;
    network.in = numbers[1], network.height = numbers[2], network.width = numbers[3];
    network.classes = numbers[4], network.embed = numbers[5], network.hidden = numbers[6];
    network.stages = numbers[7];
    for (int stage = 0; stage < network.stages; ++stage) network.stage[stage].blocks = numbers[8 + stage];
    return network;
}

}  // namespace

extern "C" const char* shared_memory_of(const int* numbers, int images, int* bytes) {
    return simt::report([=] {
        ResidentNetwork network = network_of(numbers);
        lay_out(network, nullptr, nullptr);
        *bytes = resident_shared_memory(network, images);
    });
}

// Phases of ldmatrix since the last call, and how many of them met a bank twice.
extern "C" const char* bank_conflicts(int* phases, int* conflicts) {
    return simt::report([=] {
        *phases = std::exchange(simt::ldmatrix_phases, 0);
        *conflicts = std::exchange(simt::ldmatrix_conflicts, 0);
    });
}

// What a logit decides, and its probability.
extern "C" const char* decide_by_logit(const float* logits, int count, bool* executed, float* probabilities) {
    return simt::report([=] {
        for (int i = 0; i < count; ++i) {
            executed[i] = skipnet::executes_logit(logits[i]);
            probabilities[i] = skipnet::sigmoid(logits[i]);
        }
    });
}

// Launches without placing the network first, as no caller may.
extern "C" const char* run_unplaced(const int* numbers) {
    return simt::report([=] {
        ResidentNetwork network = network_of(numbers);
        lay_out(network, nullptr, nullptr);
        allowed_shared_memory.clear();
        ResidentCall call{};
        call.batch = 1;
        run_resident(network, call, {1, 1, false, 1}, nullptr);
    });
}

extern "C" const char* plan_of(const int* numbers, const int* device /* [2] */, int batch, int* plan /* [4] */) {
    return simt::report([=] {
        ResidentNetwork network = network_of(numbers);
        lay_out(network, nullptr, nullptr);
        const ResidentPlan planned = plan_resident(network, batch, {device[0], device[1]});
        plan[0] = planned.images, plan[1] = planned.blocks, plan[2] = planned.dynamic, plan[3] = planned.cluster;
    });
}

// How many images the first worker takes, turn after turn, if it takes every workers-th one; 0 ends them.
extern "C" const char* turns_of_plan(int batch, int images, int blocks, int* sizes /* [batch + 1] */) {
    return simt::report([=] {
        const Turns turns = turns_of(batch, {images, blocks, true, 1});
        for (int round = 0, taken = 0; taken < batch; ++round) {
            sizes[round] = turns.least + (round < turns.larger);
            taken += sizes[round] * turns.workers;
        }
    });
}

// Runs a network; `images_at_a_time` 0 leaves the plan to the launcher, `cluster` thread blocks share an image. `sizes`
// is what the weights have to take.
extern "C" const char* run(const int* numbers, const void* fragments, const float* floats, const int* sizes /* [2] */,
                           int shared_memory, int images_at_a_time, int cluster, int batch, int num_gates,
                           const void* images, const bool* forced, int forced_image, int forced_gate, void* logits,
                           float* gate_logits, float* probabilities, bool* executed, float* hidden, float* cell,
                           int* work_counter) {
    return simt::report([=] {
        ResidentNetwork network = network_of(numbers);
        const ResidentWeights needed = lay_out(network, fragments, floats);
        skipnet::check(static_cast<int>(needed.fragments) == sizes[0] && static_cast<int>(needed.floats) == sizes[1],
                       "weights: expected ", needed.fragments, " bytes and ", needed.floats, " floats, got ", sizes[0],
                       " and ", sizes[1]);
        ResidentDevice device = place_resident(network);
        device.shared_memory = shared_memory;
        ResidentPlan plan = plan_resident(network, batch, device);
        if (images_at_a_time) {
            plan.images = images_at_a_time;
            plan.blocks = min(multiprocessors(), (batch + plan.images - 1) / plan.images);
            plan.dynamic = plan.blocks * plan.images < batch;
        }
        if (cluster > 1) plan = {1, batch * cluster, false, cluster};
        run_resident(network,
                     {batch, num_gates, images, forced, forced_image, forced_gate, logits, gate_logits, probabilities,
                      executed, hidden, cell, work_counter},
                     plan, nullptr);
    });
}
