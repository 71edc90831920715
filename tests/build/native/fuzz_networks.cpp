// Random networks, batches, routes and threads: both strategies against a plain reference in double precision.
// Built with sanitizers by tests/build/test_sanitizers.py.   fuzz_networks SEED ROUNDS INSTRUCTION_SET
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/compacted/compacted.h"
#include "../../../csrc/cpu/resident/resident.h"

using namespace skipnet;
using namespace skipnet::cpu;

namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

struct Random {
    std::mt19937 engine;
    int within(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
    bool coin(double p = 0.5) { return std::bernoulli_distribution(p)(engine); }
    Floats normal(std::size_t size, double scale) {
        std::normal_distribution<float> distribution(0, static_cast<float>(scale));
        Floats values(size);
        for (float& value : values) value = distribution(engine);
        return values;
    }
};

// A network and the memory that its weights point into.
struct Network {
    NetworkWeights weights;
    std::vector<std::unique_ptr<Floats>> owned;
    bool max_pool = false;

    const float* own(Floats values) {
        owned.push_back(std::make_unique<Floats>(std::move(values)));
        return owned.back()->data();
    }
    ConvolutionWeights layer(Random& random, int in, int out, int kernel, int stride) {
        const double scale = std::sqrt(1.5 / (in * kernel * kernel));
        return {in,
                out,
                kernel,
                stride,
                own(random.normal(static_cast<std::size_t>(in) * out * kernel * kernel, scale)),
                own(random.normal(out, 0.1))};
    }
};

enum class Gates { none, rnn, first, second };

// The compacted strategy takes every network, the resident one those of basic blocks after a stem of 3x3.
Network make_network(Random& random, bool compacted) {
    Network network;
    NetworkWeights& weights = network.weights;
    const auto gates = static_cast<Gates>(random.within(0, 3));
    weights.bfloat16 = random.coin();
    network.max_pool = gates == Gates::first;
    const bool bottleneck = compacted && random.coin();
    weights.max_pool = compacted && random.coin();
    weights.height = weights.max_pool ? random.within(33, 45) : random.within(8, 21);
    weights.width = weights.max_pool ? random.within(33, 45) : random.within(8, 21);
    weights.classes = random.within(1, 37);
    int channels = random.within(1, 40);
    weights.stem =
        network.layer(random, random.within(1, 4), channels, weights.max_pool ? 7 : 3, weights.max_pool ? 2 : 1);
    const int embed = random.within(1, 20), hidden = random.within(1, 20);
    for (int group = 0, groups = random.within(1, 3); group < groups; ++group)
        for (int i = 0, count = random.within(1, 3); i < count; ++i) {
            BlockWeights block{};
            const int stride = group > 0 && i == 0 ? 2 : 1;
            block.projects = stride == 2 || (bottleneck && i == 0);
            block.bottleneck = bottleneck;
            const int out = block.projects ? random.within(1, 40) : channels;
            const int inner = bottleneck ? random.within(1, 40) : out;
            block.first = network.layer(random, channels, inner, bottleneck ? 1 : 3, bottleneck ? 1 : stride);
            if (bottleneck) block.middle = network.layer(random, inner, inner, 3, stride);
            block.last = network.layer(random, inner, out, bottleneck ? 1 : 3, 1);
            if (block.projects) block.projection = network.layer(random, channels, out, 1, stride);
            channels = out;
            weights.blocks.push_back(block);
            if (gates == Gates::rnn)
                weights.embeddings.push_back(
                    {out, network.own(random.normal(embed * out, 1.0)), network.own(random.normal(embed, 0.3))});
            if (gates == Gates::first || gates == Gates::second) {
                GateConvolutions gate{network.max_pool, {}};
                if (network.max_pool) gate.layers.push_back(network.layer(random, out, out, 3, 1));
                gate.layers.push_back(network.layer(random, out, out, 3, 2));
                weights.gates.push_back(gate);
                weights.tails.push_back({out, network.own(random.normal(out, 2.0)), 0.1f});
            }
        }
    if (gates == Gates::rnn)
        weights.lstm = {embed,
                        hidden,
                        network.own(random.normal(4 * hidden * embed, 0.8)),
                        network.own(random.normal(4 * hidden * hidden, 0.8)),
                        network.own(random.normal(4 * hidden, 0.5)),
                        network.own(random.normal(hidden, 3.0)),
                        0.05f};
    weights.head_weight = network.own(random.normal(static_cast<std::size_t>(weights.classes) * channels, 0.3));
    weights.head_bias = network.own(random.normal(weights.classes, 0.1));
    return network;
}

// One image's activation, channels first.
struct Map {
    int channels, height, width;
    Doubles values;
    double at(int c, int y, int x) const {
        return y < 0 || x < 0 || y >= height || x >= width ? 0 : values[(c * height + y) * width + x];
    }
};

Map convolve(const Map& x, const ConvolutionWeights& layer) {
    const int pad = layer.kernel / 2, k = layer.kernel;
    Map y{layer.out, (x.height - 1) / layer.stride + 1, (x.width - 1) / layer.stride + 1, {}};
    for (int o = 0; o < y.channels; ++o)
        for (int i = 0; i < y.height; ++i)
            for (int j = 0; j < y.width; ++j) {
                double sum = layer.bias[o];
                for (int c = 0; c < layer.in; ++c)
                    for (int a = 0; a < k; ++a)
                        for (int b = 0; b < k; ++b)
                            sum += layer.weight[((o * layer.in + c) * k + a) * k + b] *
                                   x.at(c, i * layer.stride + a - pad, j * layer.stride + b - pad);
                y.values.push_back(sum);
            }
    return y;
}

Map relu(Map x) {
    for (double& value : x.values) value = value > 0 ? value : 0;
    return x;
}

// 3x3 with stride 2; what is pooled is not negative.
Map max_pool(const Map& x) {
    Map y{x.channels, (x.height + 1) / 2, (x.width + 1) / 2, {}};
    for (int c = 0; c < y.channels; ++c)
        for (int i = 0; i < y.height; ++i)
            for (int j = 0; j < y.width; ++j) {
                double most = 0;
                for (int a = -1; a <= 1; ++a)
                    for (int b = -1; b <= 1; ++b) most = std::max(most, x.at(c, 2 * i + a, 2 * j + b));
                y.values.push_back(most);
            }
    return y;
}

Doubles pool(const Map& x) {
    Doubles means(x.channels);
    for (int c = 0; c < x.channels; ++c) {
        for (int i = 0; i < x.height * x.width; ++i) means[c] += x.values[c * x.height * x.width + i];
        means[c] /= x.height * x.width;
    }
    return means;
}

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// One image, its decisions forced; returns the logits and every gate's execute logit.
std::pair<Doubles, Doubles> reference(const Network& network, const float* image, const std::vector<bool>& forced) {
    const NetworkWeights& weights = network.weights;
    Map x{weights.stem.in, weights.height, weights.width, {}};
    x.values.assign(image, image + static_cast<std::size_t>(x.channels) * x.height * x.width);
    x = relu(convolve(x, weights.stem));
    if (weights.max_pool) x = max_pool(x);
    Doubles gate_logits, hidden(weights.lstm.hidden), cell(weights.lstm.hidden);
    for (std::size_t index = 0; index < weights.blocks.size(); ++index) {
        const BlockWeights& block = weights.blocks[index];
        Map shortcut = block.projects ? convolve(x, block.projection) : x;
        if (index == 0 || forced.empty() || forced[index - 1]) {
            Map y = relu(convolve(x, block.first));
            if (block.bottleneck) y = relu(convolve(y, block.middle));
            y = convolve(y, block.last);
            for (std::size_t i = 0; i < y.values.size(); ++i) shortcut.values[i] += y.values[i];
            shortcut = relu(std::move(shortcut));
        }
        x = std::move(shortcut);
        if (!weights.embeddings.empty()) {
            const Lstm& lstm = weights.lstm;
            const Doubles pooled = pool(x), before = hidden;
            Doubles feature(lstm.embed), gates(4 * lstm.hidden);
            for (int k = 0; k < lstm.embed; ++k) {
                feature[k] = weights.embeddings[index].bias[k];
                for (int c = 0; c < x.channels; ++c)
                    feature[k] += weights.embeddings[index].weight[k * x.channels + c] * pooled[c];
            }
            for (int k = 0; k < 4 * lstm.hidden; ++k) {
                gates[k] = lstm.bias[k];
                for (int i = 0; i < lstm.embed; ++i) gates[k] += lstm.input_weight[k * lstm.embed + i] * feature[i];
                for (int i = 0; i < lstm.hidden; ++i) gates[k] += lstm.hidden_weight[k * lstm.hidden + i] * before[i];
            }
            double logit = lstm.projection_bias;
            for (int k = 0; k < lstm.hidden; ++k) {
                const int n = lstm.hidden;
                cell[k] = sigmoid(gates[n + k]) * cell[k] + sigmoid(gates[k]) * std::tanh(gates[2 * n + k]);
                hidden[k] = sigmoid(gates[3 * n + k]) * std::tanh(cell[k]);
                logit += lstm.projection_weight[k] * hidden[k];
            }
            gate_logits.push_back(logit);
        } else if (!weights.gates.empty()) {
            Map y = x;
            if (network.max_pool) {
                y = {x.channels, x.height / 2, x.width / 2, {}};
                for (int c = 0; c < y.channels; ++c)
                    for (int i = 0; i < y.height; ++i)
                        for (int j = 0; j < y.width; ++j)
                            y.values.push_back(
                                std::max(std::max(x.at(c, 2 * i, 2 * j), x.at(c, 2 * i, 2 * j + 1)),
                                         std::max(x.at(c, 2 * i + 1, 2 * j), x.at(c, 2 * i + 1, 2 * j + 1))));
            }
            for (const ConvolutionWeights& layer : weights.gates[index].layers) y = relu(convolve(y, layer));
            const Doubles pooled = pool(y);
            double logit = weights.tails[index].bias;
            for (int c = 0; c < y.channels; ++c) logit += weights.tails[index].weight[c] * pooled[c];
            gate_logits.push_back(logit);
        }
    }
    const Doubles pooled = pool(x);
    Doubles logits(weights.classes);
    for (int k = 0; k < weights.classes; ++k) {
        logits[k] = weights.head_bias[k];
        for (int c = 0; c < x.channels; ++c) logits[k] += weights.head_weight[k * x.channels + c] * pooled[c];
    }
    return {logits, gate_logits};
}

// What a call writes. Everything begins as garbage that must be overwritten.
struct Results {
    Floats logits, gate_logits, probabilities, hidden, cell;
    std::unique_ptr<bool[]> executed;

    Results(const NetworkWeights& weights, int batch, int steps)
        : logits(batch * weights.classes, NAN), gate_logits(steps * batch, NAN), probabilities(steps * batch, NAN),
          hidden(batch * weights.lstm.hidden, NAN), cell(batch * weights.lstm.hidden, NAN),
          executed(new bool[steps * batch + 1]()) {}

    Call call(int batch, int steps, int threads, const float* images, const bool* forced) {
        return {batch,
                steps,
                threads,
                {images, nullptr, false},
                forced,
                logits.data(),
                gate_logits.data(),
                probabilities.data(),
                executed.get(),
                hidden.data(),
                cell.data()};
    }
};

void expect(bool condition, const char* what, int round) {
    if (condition) return;
    std::fprintf(stderr, "round %d: %s\n", round, what);
    std::exit(1);
}

void expect_close(const Floats& got, std::size_t from, const Doubles& expected, double tolerance, const char* what,
                  int round) {
    double difference = 0, norm = 1e-3;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        difference += std::pow(got[from + i] - expected[i], 2);
        norm += std::pow(expected[i], 2);
    }
    expect(std::sqrt(difference / norm) < tolerance, what, round);
}

void fuzz(Random& random, int round, const std::string& instruction_set) {
    const bool compacted = random.coin();
    const Network network = make_network(random, compacted);
    const NetworkWeights& weights = network.weights;
    const auto engine = (compacted ? make_compacted : make_resident)(weights, instruction_set);
    const int blocks = static_cast<int>(weights.blocks.size()), batch = random.within(1, 11);
    const bool gated = !weights.embeddings.empty() || !weights.gates.empty();
    const int gates = gated ? blocks - 1 : 0, steps = gated ? gates + random.coin() : 0;
    const std::size_t image_size = static_cast<std::size_t>(weights.stem.in) * weights.height * weights.width;
    const Floats images = random.normal(batch * image_size, 1.0);
    std::unique_ptr<bool[]> forced(new bool[gates * batch + 1]());
    for (int i = 0; i < gates * batch; ++i) forced[i] = random.coin();

    Results results(weights, batch, steps);
    engine->run(results.call(batch, steps, random.within(1, 4), images.data(), forced.get()));
    for (int i = 0; i < batch; ++i) {
        std::vector<bool> route;
        for (int gate = 0; gate < gates; ++gate) route.push_back(forced[gate * batch + i]);
        const auto [logits, gate_logits] = reference(network, images.data() + i * image_size, route);
        expect_close(results.logits, static_cast<std::size_t>(i) * weights.classes, logits,
                     weights.bfloat16 ? 0.05 : 1e-4, "logits differ", round);
        for (int step = 0; step < steps; ++step) {
            expect(std::abs(results.gate_logits[step * batch + i] - gate_logits[step]) <
                       (weights.bfloat16 ? 0.2 : 1e-3) * (1 + std::abs(gate_logits[step])),
                   "a gate's logit differs", round);
            expect(step == gates || results.executed[step * batch + i] == forced[step * batch + i],
                   "a forced decision was not kept", round);
        }
    }

    // The gates' own decisions, from two threads at once, in parts: the same bits every time.
    Results whole(weights, batch, steps);
    engine->run(whole.call(batch, steps, 1, images.data(), nullptr));
    const auto again = [&](int first, int count, int threads) {
        Results part(weights, count, steps);
        engine->run(part.call(count, steps, threads, images.data() + first * image_size, nullptr));
        for (int i = 0; i < count * weights.classes; ++i)
            expect(part.logits[i] == whole.logits[first * weights.classes + i], "logits depend on the company", round);
        for (int step = 0; step < steps; ++step)
            for (int i = 0; i < count; ++i)
                expect(part.executed[step * count + i] == whole.executed[step * batch + first + i],
                       "decisions depend on the company", round);
    };
    const int middle = random.within(0, batch - 1), threads = random.within(2, 4);
    std::thread other([&] { again(0, batch, threads); });
    again(middle, 1, threads);
    again(middle, batch - middle, 2);
    other.join();
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::fprintf(stderr, "usage: %s SEED ROUNDS INSTRUCTION_SET\n", arguments[0]);
        return 2;
    }
    Random random{std::mt19937(std::atoi(arguments[1]))};
    const int rounds = std::atoi(arguments[2]);
    for (int round = 0; round < rounds; ++round) fuzz(random, round, arguments[3]);
    std::printf("%d rounds passed\n", rounds);
}
