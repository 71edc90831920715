// A golden case without Python: every strategy and instruction set of this build has to give what the published code
// gave. For processors and compilers that the rest of the suite does not run on.
//
//     golden_case FILE...    written by tests/build/test_other_builds.py: numbers of 32 bits, in the order of read()
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "compacted/compacted.h"
#include "resident/resident.h"

using namespace skipnet;
using namespace skipnet::cpu;

namespace {

constexpr double kTolerance = 1e-4;  // relative norm, as promised for float32

class Reader {
public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) { file_.exceptions(std::ios::failbit); }

    int integer() {
        std::int32_t value;
        file_.read(reinterpret_cast<char*>(&value), sizeof value);
        return value;
    }
    // As many floats as the file says; they live as long as the reader.
    const float* floats() {
        const int count = integer();
        arrays_.emplace_back(new std::vector<float>(count));
        file_.read(reinterpret_cast<char*>(arrays_.back()->data()), count * sizeof(float));
        return arrays_.back()->data();
    }
    ConvolutionWeights convolution() {
        const int in = integer(), out = integer(), kernel = integer(), stride = integer();
        const float* weight = floats();
        return {in, out, kernel, stride, weight, floats()};
    }

private:
    std::ifstream file_;
    std::vector<std::unique_ptr<std::vector<float>>> arrays_;
};

struct Case {
    NetworkWeights weights{};
    int batch, gates;
    const float *images, *logits, *executed;  // [batch, in, height, width], [batch, classes], [gates, batch] of 0 and 1
};

Case read(Reader& reader) {
    Case golden;
    NetworkWeights& weights = golden.weights;
    weights.height = reader.integer();
    weights.width = reader.integer();
    weights.classes = reader.integer();
    weights.stem = reader.convolution();
    const int blocks = reader.integer();
    for (int i = 0; i < blocks; ++i) {
        BlockWeights block{};
        block.first = reader.convolution();
        block.last = reader.convolution();
        block.projects = reader.integer();
        if (block.projects) block.projection = reader.convolution();
        const float* weight = reader.floats();
        weights.embeddings.push_back({block.last.out, weight, reader.floats()});
        weights.blocks.push_back(block);
    }
    weights.lstm.embed = reader.integer();
    weights.lstm.hidden = reader.integer();
    weights.lstm.input_weight = reader.floats();
    weights.lstm.hidden_weight = reader.floats();
    weights.lstm.bias = reader.floats();
    weights.lstm.projection_weight = reader.floats();
    weights.lstm.projection_bias = *reader.floats();
    weights.head_weight = reader.floats();
    weights.head_bias = reader.floats();
    golden.batch = reader.integer();
    golden.gates = blocks - 1;
    golden.images = reader.floats();
    golden.logits = reader.floats();
    golden.executed = reader.floats();
    return golden;
}

// How far the logits are off, or infinity where a decision differs.
double error(const Case& golden, Engine& engine, int threads) {
    const NetworkWeights& weights = golden.weights;
    const int batch = golden.batch, gates = golden.gates, hidden = weights.lstm.hidden;
    std::vector<float> logits(batch * weights.classes), gate_logits(gates * batch), probabilities(gates * batch);
    std::vector<float> state(batch * hidden), cell(batch * hidden);
    const std::unique_ptr<bool[]> executed(new bool[gates * batch]);
    engine.run({batch,
                gates,
                threads,
                {golden.images, nullptr, false},
                nullptr,
                logits.data(),
                gate_logits.data(),
                probabilities.data(),
                executed.get(),
                state.data(),
                cell.data()});
    for (int i = 0; i < gates * batch; ++i)
        if (executed[i] != (golden.executed[i] != 0)) return INFINITY;
    double difference = 0, norm = 0;
    for (int i = 0; i < batch * weights.classes; ++i) {
        difference += std::pow(static_cast<double>(logits[i]) - golden.logits[i], 2);
        norm += std::pow(golden.logits[i], 2);
    }
    return std::sqrt(difference / norm);
}

}  // namespace

int main(int count, char** arguments) {
    bool failed = count < 2;
    for (int i = 1; i < count; ++i) {
        Reader reader(arguments[i]);
        const Case golden = read(reader);
        for (const std::string& set : instruction_sets())
            for (const bool compacted : {false, true})
                for (const int threads : {1, 2}) {
                    const auto engine = (compacted ? make_compacted : make_resident)(golden.weights, set);
                    const double off = error(golden, *engine, threads);
                    std::printf("%s, %s, %d threads: off by %.1e\n", set.c_str(), compacted ? "compacted" : "resident",
                                threads, off);
                    failed |= !(off < kTolerance);
                }
    }
    return failed;
}
