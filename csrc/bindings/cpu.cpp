// Python's view of the CPU engine. Arrays come in as NumPy views of the caller's memory; nothing is copied on a call.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <variant>
#include <vector>

#include "../check.h"
#include "../cpu/compacted/compacted.h"
#include "../cpu/resident/resident.h"
#include "../cpu/standalone.h"
#include "../cpu/thread_team.h"
#include "bindings.h"

namespace py = pybind11;
using namespace skipnet;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
void check_shape(const Array<T>& array, const char* name, const std::vector<py::ssize_t>& shape) {
    const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
    if (got == shape) return;
    std::ostringstream expected, came;
    for (auto side : shape) expected << side << ' ';
    for (auto side : got) came << side << ' ';
    fail(name, ": expected shape [ ", expected.str(), "], got [ ", came.str(), "]");
}

// A convolution from Python: (weight [out, in, kernel, kernel], bias [out], stride).
using Layer = std::tuple<Array<float>, Array<float>, int>;

cpu::ConvolutionWeights convolution_of(const Layer& layer, bool stem = false) {
    const auto& [weight, bias, stride] = layer;
    check(weight.ndim() == 4 && weight.shape(2) == weight.shape(3) &&
              (weight.shape(2) == 1 || weight.shape(2) == 3 || (stem && weight.shape(2) == 7)),
          "weight: expected [out, in, kernel, kernel] with a kernel of 1 or 3, or of 7 in the stem");
    check(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
    check_shape(bias, "bias", {weight.shape(0)});
    return {static_cast<int>(weight.shape(1)),
            static_cast<int>(weight.shape(0)),
            static_cast<int>(weight.shape(2)),
            stride,
            weight.data(),
            bias.data()};
}

bool is_compacted(const std::string& strategy) {
    check(strategy == "resident" || strategy == "compacted", "strategy: expected 'resident' or 'compacted', got '",
          strategy, "'");
    return strategy == "compacted";
}

// Holds a packed network and what its calls have to be checked against.
class Network {
public:
    Network(const std::string& strategy, std::pair<int, int> image_size, const Layer& stem, bool max_pool,
            const std::vector<std::pair<std::vector<Layer>, std::optional<Layer>>>& blocks,
            const std::vector<std::pair<Array<float>, Array<float>>>& embeddings,
            const std::optional<std::tuple<Array<float>, Array<float>, Array<float>, Array<float>, float>>& lstm,
            const std::vector<std::tuple<bool, std::vector<Layer>, Array<float>, float>>& gates,
            const Array<float>& head_weight, const Array<float>& head_bias, bool bfloat16,
            const std::string& instruction_set)
        : in_(static_cast<int>(std::get<0>(stem).shape(1))), height_(image_size.first), width_(image_size.second),
          blocks_(static_cast<int>(blocks.size())), classes_(static_cast<int>(head_bias.size())),
          gated_(lstm || !gates.empty()) {
        const bool resident = !is_compacted(strategy);
        check(!blocks.empty(), "blocks: expected at least one");
        cpu::NetworkWeights network{};
        network.bfloat16 = bfloat16_ = bfloat16;
        network.height = height_;
        network.width = width_;
        network.classes = classes_;
        network.stem = convolution_of(stem, true);
        network.max_pool = max_pool;
        int channels = network.stem.out;
        for (const auto& [layers, projection] : blocks) channels = add_block(network, layers, projection, channels);
        check(!resident ||
                  (!network.blocks[0].bottleneck && !max_pool && network.stem.kernel == 3 && network.stem.stride == 1),
              "strategy: resident takes basic blocks after a stem of 3x3");
        if (lstm) {
            const auto& [input_weight, hidden_weight, bias, projection_weight, projection_bias] = *lstm;
            hidden_ = static_cast<int>(projection_weight.size());
            check(input_weight.ndim() == 2, "input_weight: expected [4 * hidden, embed]");
            const int embed = static_cast<int>(input_weight.shape(1));
            check_shape(input_weight, "input_weight", {4 * hidden_, embed});
            check_shape(hidden_weight, "hidden_weight", {4 * hidden_, hidden_});
            check_shape(bias, "bias", {4 * hidden_});
            network.lstm = {embed,
                            hidden_,
                            input_weight.data(),
                            hidden_weight.data(),
                            bias.data(),
                            projection_weight.data(),
                            projection_bias};
            check(static_cast<int>(embeddings.size()) == blocks_, "embeddings: expected one per block");
            for (int i = 0; i < blocks_; ++i) {
                const int out = network.blocks[i].last.out;
                check_shape(embeddings[i].first, "embedding", {embed, out});
                check_shape(embeddings[i].second, "embedding's bias", {embed});
                network.embeddings.push_back({out, embeddings[i].first.data(), embeddings[i].second.data()});
            }
        }
        check(gates.empty() || (static_cast<int>(gates.size()) == blocks_ && !lstm), "gates: expected one per block");
        for (int i = 0; i < static_cast<int>(gates.size()); ++i) {
            const auto& [max_pool, layers, weight, bias] = gates[i];
            const int out = network.blocks[i].last.out;
            cpu::GateConvolutions gate{max_pool, {}};
            for (const Layer& layer : layers) {
                gate.layers.push_back(convolution_of(layer));
                check(gate.layers.back().in == out && gate.layers.back().out == out && gate.layers.back().kernel == 3,
                      "gates: channels do not fit");
            }
            check(gate.layers.size() == (max_pool ? 2u : 1u) && gate.layers.front().stride == (max_pool ? 1 : 2) &&
                      gate.layers.back().stride == 2,
                  "gates: expected FFGate-I or FFGate-II");
            check_shape(weight, "gate's weight", {out});
            network.gates.push_back(gate);
            network.tails.push_back({out, weight.data(), bias});
        }
        check_shape(head_weight, "head_weight", {classes_, channels});
        network.head_weight = head_weight.data();
        network.head_bias = head_bias.data();
        engine_ = (resident ? cpu::make_resident : cpu::make_compacted)(network, instruction_set);
    }

    // images: float32, or bfloat16 seen as uint16.
    void run(const std::variant<Array<float>, Array<std::uint16_t>>& images, Array<float> logits,
             Array<float> gate_logits, Array<float> probabilities, Array<bool> executed,
             const std::optional<Array<bool>>& forced, Array<float> hidden, Array<float> cell, int threads) {
        const auto* in_float32 = std::get_if<Array<float>>(&images);
        const auto* in_bfloat16 = std::get_if<Array<std::uint16_t>>(&images);
        const py::ssize_t batch = logits.shape(0), num_gates = gate_logits.shape(0);
        std::visit([&](const auto& array) { check_shape(array, "images", {batch, in_, height_, width_}); }, images);
        check_shape(logits, "logits", {batch, classes_});
        check(num_gates == (gated_ ? blocks_ - 1 : 0) || (gated_ && num_gates == blocks_), "gate_logits: expected ",
              blocks_ - 1, " or ", blocks_, " rows, got ", num_gates);
        check_shape(gate_logits, "gate_logits", {num_gates, batch});
        check_shape(probabilities, "probabilities", {num_gates, batch});
        check_shape(executed, "executed", {num_gates, batch});
        check_shape(hidden, "hidden", {batch, hidden_});
        check_shape(cell, "cell", {batch, hidden_});
        if (forced) check_shape(*forced, "forced", {gated_ ? blocks_ - 1 : 0, batch});
        if (batch == 0) return;
        const cpu::Call call{
            static_cast<int>(batch),
            static_cast<int>(num_gates),
            threads,
            {in_float32 ? in_float32->data() : nullptr, in_bfloat16 ? in_bfloat16->data() : nullptr, bfloat16_},
            forced ? forced->data() : nullptr,
            logits.mutable_data(),
            gate_logits.mutable_data(),
            probabilities.mutable_data(),
            executed.mutable_data(),
            hidden.mutable_data(),
            cell.mutable_data()};
        py::gil_scoped_release released;
        engine_->run(call);
    }

private:
    // Checks a block's layers and adds them; returns the channels that come out.
    static int add_block(cpu::NetworkWeights& network, const std::vector<Layer>& layers,
                         const std::optional<Layer>& projection, int channels) {
        check(layers.size() == 2 || layers.size() == 3, "blocks: expected two or three convolutions, got ",
              layers.size());
        cpu::BlockWeights block{};
        block.bottleneck = layers.size() == 3;
        check(network.blocks.empty() || network.blocks[0].bottleneck == block.bottleneck,
              "blocks: expected all of one kind");
        block.first = convolution_of(layers.front());
        block.last = convolution_of(layers.back());
        if (block.bottleneck) block.middle = convolution_of(layers[1]);
        const cpu::ConvolutionWeights& strided = block.bottleneck ? block.middle : block.first;
        const int side = block.bottleneck ? 1 : 3;  // the kernel of first and last
        check(block.first.in == channels && strided.in == (block.bottleneck ? block.first.out : channels) &&
                  block.last.in == strided.out && strided.kernel == 3 && block.first.kernel == side &&
                  block.last.kernel == side && block.last.stride == 1 && (!block.bottleneck || block.first.stride == 1),
              "blocks: expected basic blocks or bottlenecks whose channels fit");
        block.projects = projection.has_value();
        if (projection) block.projection = convolution_of(*projection);
        check(block.projects ? block.projection.out == block.last.out && block.projection.in == channels &&
                                   block.projection.kernel == 1 && block.projection.stride == strided.stride
                             : strided.stride == 1 && block.last.out == channels,
              "blocks: expected shortcuts that fit");
        network.blocks.push_back(block);
        return block.last.out;
    }

    int in_, height_, width_, blocks_, classes_, hidden_ = 0;
    bool bfloat16_;
    bool gated_;
    std::unique_ptr<cpu::Engine> engine_;
};

// One convolution by itself.
class Convolution {
public:
    Convolution(const std::string& strategy, const Layer& layer, bool bfloat16, int batch,
                std::pair<int, int> image_size, const std::string& instruction_set)
        : weights_(convolution_of(layer, strategy == "compacted")), batch_(batch), height_(image_size.first),
          width_(image_size.second) {
        check(batch >= 1 && height_ >= 1 && width_ >= 1, "batch and image_size: expected 1 or more");
        standalone_ = cpu::make_standalone_conv(weights_, is_compacted(strategy), bfloat16, batch, height_, width_,
                                                instruction_set);
    }
    void load(const Array<float>& x) {
        check_shape(x, "x", {batch_, height_, width_, weights_.in});
        standalone_->load(x.data());
    }
    void run() {
        py::gil_scoped_release released;
        standalone_->run();
    }
    Array<float> read() const {
        Array<float> y({batch_, standalone_->out_height(), standalone_->out_width(), weights_.out});
        standalone_->read(y.mutable_data());
        return y;
    }

private:
    cpu::ConvolutionWeights weights_;  // its pointers are not used after construction
    int batch_, height_, width_;
    std::unique_ptr<cpu::StandaloneConv> standalone_;
};

// RNNGate by itself.
class RnnGate {
public:
    RnnGate(const Array<float>& weight, const Array<float>& bias, const Array<float>& input_weight,
            const Array<float>& hidden_weight, const Array<float>& lstm_bias, const Array<float>& projection_weight,
            float projection_bias, const std::string& instruction_set)
        : hidden_(projection_weight.size()) {
        check(weight.ndim() == 2, "weight: expected [embed, channels], got ", weight.ndim(), " dimensions");
        const py::ssize_t embed = weight.shape(0);
        channels_ = weight.shape(1);
        check_shape(bias, "bias", {embed});
        check_shape(input_weight, "input_weight", {4 * hidden_, embed});
        check_shape(hidden_weight, "hidden_weight", {4 * hidden_, hidden_});
        check_shape(lstm_bias, "lstm_bias", {4 * hidden_});
        gate_ = cpu::make_gate({static_cast<int>(channels_), weight.data(), bias.data()},
                               {static_cast<int>(embed), static_cast<int>(hidden_), input_weight.data(),
                                hidden_weight.data(), lstm_bias.data(), projection_weight.data(), projection_bias},
                               instruction_set);
    }
    void step(const Array<float>& pooled, Array<float> hidden, Array<float> cell, Array<float> logit) {
        const py::ssize_t batch = pooled.shape(0);
        check_shape(pooled, "pooled", {batch, channels_});
        check_shape(hidden, "hidden", {batch, hidden_});
        check_shape(cell, "cell", {batch, hidden_});
        check_shape(logit, "logit", {batch});
        gate_->step(static_cast<int>(batch), pooled.data(), hidden.mutable_data(), cell.mutable_data(),
                    logit.mutable_data());
    }

private:
    py::ssize_t channels_, hidden_;
    std::unique_ptr<cpu::StandaloneGate> gate_;
};

}  // namespace

void bind_cpu(py::module_& module) {
    py::class_<Network>(module, "Network", "A whole network in one call, by the resident or the compacted strategy.")
        .def(py::init<const std::string&, std::pair<int, int>, const Layer&, bool,
                      const std::vector<std::pair<std::vector<Layer>, std::optional<Layer>>>&,
                      const std::vector<std::pair<Array<float>, Array<float>>>&,
                      const std::optional<std::tuple<Array<float>, Array<float>, Array<float>, Array<float>, float>>&,
                      const std::vector<std::tuple<bool, std::vector<Layer>, Array<float>, float>>&,
                      const Array<float>&, const Array<float>&, bool, const std::string&>(),
             py::arg("strategy"), py::arg("image_size"), py::arg("stem"), py::arg("max_pool"), py::arg("blocks"),
             py::arg("embeddings"), py::arg("lstm"), py::arg("gates"), py::arg("head_weight"), py::arg("head_bias"),
             py::arg("bfloat16"), py::arg("instruction_set"))
        .def("run", &Network::run, py::arg("images").noconvert(), py::arg("logits").noconvert(),
             py::arg("gate_logits").noconvert(), py::arg("probabilities").noconvert(), py::arg("executed").noconvert(),
             py::arg("forced").noconvert().none(true), py::arg("hidden").noconvert(), py::arg("cell").noconvert(),
             py::arg("threads"), "Images to logits and decisions, all written in place.");
    py::class_<Convolution>(module, "Convolution",
                            "relu(convolution(x) + bias) by itself, on one thread, to be tested and measured.")
        .def(py::init<const std::string&, const Layer&, bool, int, std::pair<int, int>, const std::string&>(),
             py::arg("strategy"), py::arg("layer"), py::arg("bfloat16"), py::arg("batch"), py::arg("image_size"),
             py::arg("instruction_set"))
        .def("load", &Convolution::load, py::arg("x").noconvert(), "Set the input, [batch, height, width, in].")
        .def("run", &Convolution::run)
        .def("read", &Convolution::read, "The output, [batch, height, width, out].");
    py::class_<RnnGate>(module, "RNNGate", "RNNGate after one block by itself, to be tested and measured.")
        .def(py::init<const Array<float>&, const Array<float>&, const Array<float>&, const Array<float>&,
                      const Array<float>&, const Array<float>&, float, const std::string&>(),
             py::arg("weight"), py::arg("bias"), py::arg("input_weight"), py::arg("hidden_weight"),
             py::arg("lstm_bias"), py::arg("projection_weight"), py::arg("projection_bias"), py::arg("instruction_set"))
        .def("step", &RnnGate::step, py::arg("pooled").noconvert(), py::arg("hidden").noconvert(),
             py::arg("cell").noconvert(), py::arg("logit").noconvert(),
             "Advance hidden and cell in place and write the execute logits.");
    module.def("multiply_add", &cpu::multiply_add, py::arg("rounds"), py::arg("instruction_set"),
               py::call_guard<py::gil_scoped_release>(),
               "Fused multiply-adds and nothing else, on one thread; returns the number of operations, for the peak.");
    module.def("allowed_processors", &cpu::allowed_processors, "How many the calling thread may run on.");
    module.def("set_spin_microseconds", &cpu::set_spin_microseconds, py::arg("most"),
               "For how long a thread may spin for the next call before it sleeps; 0: never.");
    module.def("instruction_sets", &cpu::instruction_sets, "What this machine can run of what was built, best first.");
}
