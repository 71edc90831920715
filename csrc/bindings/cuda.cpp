// Python's view of the CUDA engine. Arrays come in as addresses of device memory; their owner is the caller.
#include <pybind11/stl.h>

#include <vector>

#include "../check.h"
#include "../cuda/compacted.h"
#include "../cuda/devices.h"
#include "../cuda/gate_step.h"
#include "../cuda/gathered_conv.h"
#include "../cuda/resident.h"
#include "bindings.h"

namespace py = pybind11;
using namespace skipnet;

namespace {

using Address = std::uintptr_t;  // of device memory

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

cuda::ElementType element_of(const std::string& name) {
    if (name == "float32") return cuda::ElementType::float32;
    if (name == "tf32") return cuda::ElementType::tf32;
    if (name == "float16") return cuda::ElementType::float16;
    check(name == "bfloat16", "element: expected float32, tf32, float16 or bfloat16, got ", name);
    return cuda::ElementType::bfloat16;
}

// A packed network on a GPU. Its weights belong to the caller.
class CudaResident {
public:
    CudaResident(const std::string& element, int in, std::pair<int, int> image_size, int classes,
                 const std::vector<int>& blocks, int embed, int hidden) {
        check(!blocks.empty() && blocks.size() <= cuda::kMaxStages, "blocks: expected 1 to ", cuda::kMaxStages,
              " groups, got ", blocks.size());
        check(in >= 1 && in <= 16, "in: expected 1 to 16 channels, got ", in);
        check(image_size.first >= 1 && image_size.second >= 1 && classes >= 1,
              "image_size, classes: expected 1 or more");
        check(embed >= 0 && embed <= cuda::kMaxUnits && hidden >= 0 && hidden <= cuda::kMaxUnits && !embed == !hidden,
              "embed, hidden: expected up to ", cuda::kMaxUnits, ", got ", embed, " and ", hidden);
        network_.element = element_of(element);
        check(cuda::element_bytes(network_.element) == 2, "element: expected float16 or bfloat16, got ", element);
        network_.in = in, network_.height = image_size.first, network_.width = image_size.second;
        network_.classes = classes, network_.embed = embed, network_.hidden = hidden;
        network_.stages = static_cast<int>(blocks.size());
        for (std::size_t stage = 0; stage < blocks.size(); ++stage) {
            check(blocks[stage] >= 1, "blocks: expected 1 or more in a group, got ", blocks[stage]);
            network_.stage[stage].blocks = blocks[stage];
        }
        cuda::lay_out(network_, nullptr, nullptr);
    }

    int shared_memory(int images) const { return cuda::resident_shared_memory(network_, images); }

    void place(int device, Address fragments, std::size_t bytes, Address floats, std::size_t count) {
        const cuda::ResidentWeights needed =
            cuda::lay_out(network_, pointer<const void>(fragments), pointer<const float>(floats));
        check(needed.fragments == bytes && needed.floats == count, "weights: expected ", needed.fragments,
              " bytes and ", needed.floats, " floats, got ", bytes, " and ", count);
        device_ = device;
        const cuda::CurrentDevice current(device_);
        limits_ = cuda::place_resident(network_);
    }

    cuda::ResidentPlan plan(int batch) const { return cuda::plan_resident(network_, batch, limits_); }

    void run(const cuda::ResidentPlan& plan, const cuda::ResidentCall& call, Address stream) const {
        check(device_ >= 0, "place: not called yet");
        const cuda::CurrentDevice current(device_);
        cuda::run_resident(network_, call, plan, pointer<CUstream_st>(stream));
    }

private:
    cuda::ResidentNetwork network_{};
    int device_ = -1;
    cuda::ResidentDevice limits_{};
};

// A convolution of which only the shape is known yet: (in, out, kernel, stride).
using Shape = std::tuple<int, int, int, int>;

cuda::Convolution shaped(const Shape& shape) {
    const auto [in, out, kernel, stride] = shape;
    return {in, out, kernel, stride, nullptr, nullptr, false};
}

std::vector<cuda::Convolution> shaped(const std::vector<Shape>& shapes) {
    std::vector<cuda::Convolution> layers;
    for (const Shape& shape : shapes) layers.push_back(shaped(shape));
    return layers;
}

// Any network on a GPU, block by block. Its weights belong to the caller.
class CudaCompacted {
public:
    CudaCompacted(int device, const std::string& element, int in, std::pair<int, int> image_size, bool stem_pools,
                  bool gates_pool, const Shape& stem, bool stem_pairs,
                  const std::vector<std::pair<std::vector<Shape>, std::vector<Shape>>>& blocks, const Shape& head,
                  int embed, int hidden, float projection_bias,
                  const std::vector<std::pair<std::vector<Shape>, float>>& gates, Address elements,
                  std::size_t elements_count, Address floats, std::size_t floats_count)
        : device_(device) {
        check(!blocks.empty(), "blocks: expected at least one");
        check(gates.empty() || (gates.size() == blocks.size() && hidden == 0), "gates: expected one per block, got ",
              gates.size(), " for ", blocks.size());
        network_.element = element_of(element);
        network_.in = in, network_.height = image_size.first, network_.width = image_size.second;
        network_.stem_pools = stem_pools, network_.gates_pool = gates_pool;
        network_.stem = shaped(stem), network_.head = shaped(head);
        network_.stem.pairs = stem_pairs;
        int channels = network_.stem.out;
        for (const auto& [convolutions, projection] : blocks) {
            check(!convolutions.empty() && convolutions.size() <= 3 && projection.size() <= 1,
                  "blocks: expected up to three convolutions and a projection, got ", convolutions.size(), " and ",
                  projection.size());
            network_.blocks.push_back({shaped(convolutions), shaped(projection)});
            check(network_.blocks.back().convolutions[0].in == channels, "blocks: expected ", channels,
                  " channels to go in, got ", network_.blocks.back().convolutions[0].in);
            channels = network_.blocks.back().convolutions.back().out;
            if (hidden > 0) network_.embeddings.push_back({channels, nullptr, nullptr});
        }
        check(network_.head.in == channels, "head: expected ", channels, " channels to go in, got ", network_.head.in);
        network_.lstm.embed = embed, network_.lstm.hidden = hidden, network_.lstm.projection_bias = projection_bias;
        for (const auto& [convolutions, bias] : gates) {
            check(!convolutions.empty(), "gates: expected convolutions");
            network_.gates.push_back({shaped(convolutions), {std::get<1>(convolutions.back()), nullptr, bias}});
        }
        const cuda::CompactedWeights needed =
            cuda::lay_out(network_, pointer<const void>(elements), pointer<const float>(floats));
        check(needed.elements == elements_count && needed.floats == floats_count, "weights: expected ", needed.elements,
              " elements and ", needed.floats, " floats, got ", elements_count, " and ", floats_count);
    }

    std::size_t workspace_bytes(int batch) const { return cuda::workspace_bytes(network_, batch); }

    void run(const cuda::CompactedCall& call, Address stream) const {
        const cuda::CurrentDevice current(device_);
        cuda::run_compacted(network_, call, pointer<CUstream_st>(stream));
    }

private:
    cuda::CompactedNetwork network_{};
    int device_;
};

}  // namespace

void bind_cuda(py::module_& module) {
    module.def("cuda_devices", &cuda::devices,
               "Names and compute capabilities of the GPUs that the CUDA runtime sees. Raises RuntimeError with the "
               "runtime's own words where there is no usable driver.");
    module.def(
        "cuda_limits",
        [](int device) {
            const cuda::Limits limits = cuda::limits(device);
            return std::make_pair(limits.multiprocessors, limits.shared_memory);
        },
        py::arg("device"), "A GPU's multiprocessors, and the bytes of shared memory that a thread block can have.");

    py::class_<cuda::ResidentPlan>(module, "ResidentPlan", "How a batch is spread over a GPU.")
        .def(py::init<int, int, bool, int>(), py::arg("images"), py::arg("blocks"), py::arg("dynamic"),
             py::arg("cluster"))
        .def_readonly("images", &cuda::ResidentPlan::images, "Images that a thread block takes at a time.")
        .def_readonly("blocks", &cuda::ResidentPlan::blocks)
        .def_readonly("dynamic", &cuda::ResidentPlan::dynamic,
                      "More images than fit at once: `work_counter` is needed.")
        .def_readonly("cluster", &cuda::ResidentPlan::cluster, "Thread blocks that share an image.");
    py::class_<CudaResident>(module, "CudaResident",
                             "A whole CIFAR-scale network in one launch. Weights and arrays "
                             "are addresses of device memory, as csrc/cuda/resident.h describes them.")
        .def(py::init<const std::string&, int, std::pair<int, int>, int, const std::vector<int>&, int, int>(),
             py::arg("element"), py::arg("in_channels"), py::arg("image_size"), py::arg("classes"), py::arg("blocks"),
             py::arg("embed"), py::arg("hidden"))
        .def("shared_memory", &CudaResident::shared_memory, py::arg("images"),
             "Bytes for so many images in a thread block.")
        .def("place", &CudaResident::place, py::arg("device"), py::arg("fragments"), py::arg("bytes"),
             py::arg("floats"), py::arg("count"), "Where the weights are; they have to stay there.")
        .def("plan", &CudaResident::plan, py::arg("batch"))
        .def(
            "run",
            [](const CudaResident& resident, const cuda::ResidentPlan& plan, int batch, int num_gates, Address images,
               Address forced, std::pair<int, int> forced_strides, Address logits, Address gate_logits,
               Address probabilities, Address executed, Address hidden, Address cell, Address work_counter,
               Address stream) {
                resident.run(plan,
                             {batch, num_gates, pointer<const void>(images), pointer<const bool>(forced),
                              forced_strides.first, forced_strides.second, pointer<void>(logits),
                              pointer<float>(gate_logits), pointer<float>(probabilities), pointer<bool>(executed),
                              pointer<float>(hidden), pointer<float>(cell), pointer<int>(work_counter)},
                             stream);
            },
            py::arg("plan"), py::arg("batch"), py::arg("num_gates"), py::arg("images"), py::arg("forced"),
            py::arg("forced_strides"), py::arg("logits"), py::arg("gate_logits"), py::arg("probabilities"),
            py::arg("executed"), py::arg("hidden"), py::arg("cell"), py::arg("work_counter"), py::arg("stream"),
            "Images to logits and decisions on a stream; `forced`, with strides of images and gates, and "
            "`work_counter` may be 0.");
    py::class_<CudaCompacted>(module, "CudaCompacted",
                              "Any network, block by block. Weights and arrays are addresses "
                              "of device memory, as csrc/cuda/compacted.h describes them.")
        .def(py::init<int, const std::string&, int, std::pair<int, int>, bool, bool, const Shape&, bool,
                      const std::vector<std::pair<std::vector<Shape>, std::vector<Shape>>>&, const Shape&, int, int,
                      float, const std::vector<std::pair<std::vector<Shape>, float>>&, Address, std::size_t, Address,
                      std::size_t>(),
             py::arg("device"), py::arg("element"), py::arg("in_channels"), py::arg("image_size"),
             py::arg("stem_pools"), py::arg("gates_pool"), py::arg("stem"), py::arg("stem_pairs"), py::arg("blocks"),
             py::arg("head"), py::arg("embed"), py::arg("hidden"), py::arg("projection_bias"), py::arg("gates"),
             py::arg("elements"), py::arg("elements_count"), py::arg("floats"), py::arg("floats_count"))
        .def("workspace_bytes", &CudaCompacted::workspace_bytes, py::arg("batch"))
        .def(
            "run",
            [](const CudaCompacted& compacted, int batch, int num_gates, Address present, Address images,
               Address forced, Address logits, Address gate_logits, Address probabilities, Address executed,
               Address hidden, Address cell, Address workspace, Address stream) {
                compacted.run(
                    {batch, num_gates, pointer<int>(present), pointer<const void>(images), pointer<const bool>(forced),
                     pointer<float>(logits), pointer<float>(gate_logits), pointer<float>(probabilities),
                     pointer<bool>(executed), pointer<float>(hidden), pointer<float>(cell), pointer<void>(workspace)},
                    stream);
            },
            py::arg("batch"), py::arg("num_gates"), py::arg("present"), py::arg("images"), py::arg("forced"),
            py::arg("logits"), py::arg("gate_logits"), py::arg("probabilities"), py::arg("executed"), py::arg("hidden"),
            py::arg("cell"), py::arg("workspace"), py::arg("stream"),
            "Images to logits and decisions on a stream; `present` (how many of the batch's places hold an image) and "
            "`forced` may be 0.");

    // The kernels by themselves, for skipnet_rt.kernels.cuda, which checks what comes.
    module.def(
        "cuda_compact",
        [](Address executed, int batch, Address rows, Address count, int device, Address stream) {
            const cuda::CurrentDevice current(device);
            cuda::compact(pointer<const bool>(executed), batch, {pointer<int>(rows), pointer<int>(count)},
                          pointer<CUstream_st>(stream));
        },
        py::arg("executed"), py::arg("batch"), py::arg("rows"), py::arg("count"), py::arg("device"), py::arg("stream"));
    module.def(
        "cuda_gate_step",
        [](int channels, int embed, int hidden_size, Address embedding_weight, Address embedding_bias,
           Address input_weight, Address hidden_weight, Address bias, Address projection_weight, float projection_bias,
           int batch, Address sums, int tiles, int pixels, Address hidden, Address cell, Address logit,
           Address probability, Address executed, Address forced, Address rows, Address count, Address arrivals,
           int device, Address stream) {
            const cuda::CurrentDevice current(device);
            cuda::gate_step(
                {channels, pointer<const float>(embedding_weight), pointer<const float>(embedding_bias)},
                {embed, hidden_size, pointer<const float>(input_weight), pointer<const float>(hidden_weight),
                 pointer<const float>(bias), pointer<const float>(projection_weight), projection_bias},
                batch, nullptr, {pointer<const float>(sums), tiles, pixels}, pointer<float>(hidden),
                pointer<float>(cell),
                {pointer<float>(logit), pointer<float>(probability), pointer<bool>(executed),
                 pointer<const bool>(forced)},
                {pointer<int>(rows), pointer<int>(count)}, pointer<int>(arrivals), false, pointer<CUstream_st>(stream));
        },
        py::arg("channels"), py::arg("embed"), py::arg("hidden_size"), py::arg("embedding_weight"),
        py::arg("embedding_bias"), py::arg("input_weight"), py::arg("hidden_weight"), py::arg("bias"),
        py::arg("projection_weight"), py::arg("projection_bias"), py::arg("batch"), py::arg("sums"), py::arg("tiles"),
        py::arg("pixels"), py::arg("hidden"), py::arg("cell"), py::arg("logit"), py::arg("probability"),
        py::arg("executed"), py::arg("forced"), py::arg("rows"), py::arg("count"), py::arg("arrivals"),
        py::arg("device"), py::arg("stream"));
    module.def(
        "cuda_gathered_conv",
        [](const std::string& element, int in, int out, int kernel, int stride, Address weight, Address bias, int batch,
           int height, int width, Address rows, Address count, bool gathers, bool scatters, bool relu, Address x,
           Address residual, Address y, Address sums, Address partial_sums, Address partial_arrivals, int device,
           Address stream) {
            const cuda::CurrentDevice current(device);
            const cuda::RowList list{pointer<int>(rows), pointer<int>(count)};
            cuda::gathered_conv(element_of(element),
                                {in, out, kernel, stride, pointer<const void>(weight), pointer<const float>(bias)},
                                {batch,
                                 height,
                                 width,
                                 rows ? &list : nullptr,
                                 gathers,
                                 scatters,
                                 relu,
                                 pointer<const void>(x),
                                 pointer<const void>(residual),
                                 pointer<void>(y),
                                 pointer<float>(sums),
                                 {pointer<float>(partial_sums), pointer<int>(partial_arrivals)},
                                 false},
                                pointer<CUstream_st>(stream));
        },
        py::arg("element"), py::arg("in_channels"), py::arg("out_channels"), py::arg("kernel"), py::arg("stride"),
        py::arg("weight"), py::arg("bias"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("rows"),
        py::arg("count"), py::arg("gathers"), py::arg("scatters"), py::arg("relu"), py::arg("x"), py::arg("residual"),
        py::arg("y"), py::arg("sums"), py::arg("partial_sums"), py::arg("partial_arrivals"), py::arg("device"),
        py::arg("stream"));
    module.def(
        "cuda_partial_sums",
        [](const std::string& element, int in, int out, int kernel, int stride, int batch, int height, int width) {
            return cuda::partial_sums(element_of(element), {in, out, kernel, stride, nullptr, nullptr}, batch, height,
                                      width);
        },
        py::arg("element"), py::arg("in_channels"), py::arg("out_channels"), py::arg("kernel"), py::arg("stride"),
        py::arg("batch"), py::arg("height"), py::arg("width"),
        "How many floats of partial sums cuda_gathered_conv can use.");
    module.attr("cuda_partial_tiles") = cuda::kPartialTiles;
}
