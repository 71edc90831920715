"""Baselines, the engines to measure against: the dense network of the same weights, every block executed.

They are optional; what is not installed says so. ONNX Runtime and OpenVINO get one and the same ONNX graph. One
baseline is not dense: :data:`MASKED`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.packing import PackedConvolution, PackedNetwork, pack

Call = Callable[[Tensor], Tensor]
"""Images, float32 ``[N, in_channels, H, W]``, to logits ``[N, num_classes]``."""


@dataclass(frozen=True)
class Baseline:
    """An engine that is not ours.

    Attributes:
        name: as in tables.
        packages: what has to be installed.
        dtypes: in which it is worth measuring; on a GPU float16, too.
        build: from a model, a batch of images and a dtype to what runs batches of this size, where the images are.
        devices: types that it runs on.
    """

    name: str
    packages: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    build: Callable[[SkipNet, Tensor, torch.dtype], Call]
    devices: tuple[str, ...] = ("cpu",)

    def unsupported_reason(self, dtype: torch.dtype, device: str = "cpu") -> str | None:
        """Why it cannot be measured here, or None."""
        if device not in self.devices:
            return f"does not run on {device}"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        known = (*self.dtypes, torch.float16) if device == "cuda" else self.dtypes
        return None if dtype in known else f"not measured in {dtype}"


class DenseNetwork(nn.Module):
    """A SkipNet's weights as the plain ResNet they make when every block runs: no gates, no skipping.

    Plain eager PyTorch at its best: batch normalisation folded into the convolutions, ReLU and addition in place.

    Args:
        model: the network; a snapshot of its weights is taken.
        device, dtype: where and in what to compute.
        memory_format: of weights and activations, ``torch.contiguous_format`` or ``torch.channels_last``.
    """

    def __init__(self, model: SkipNet, device: torch.device, dtype: torch.dtype,
                 memory_format: torch.memory_format) -> None:
        super().__init__()
        self.network, self.memory_format = pack(model, device, dtype), memory_format
        self._weights = {id(layer): layer.weight.contiguous(memory_format=memory_format) for layer in self._layers()}

    def _layers(self) -> list[PackedConvolution]:
        blocks = self.network.blocks
        return [self.network.stem, *(layer for block in blocks for layer in block.convolutions),
                *(block.projection for block in blocks if block.projection is not None)]

    def _convolve(self, x: Tensor, layer: PackedConvolution) -> Tensor:
        return F.conv2d(x, self._weights[id(layer)], layer.bias, stride=layer.stride, padding=layer.padding)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` in the network's dtype to logits ``[N, num_classes]``."""
        return self.compute(images)

    def compute(self, images: Tensor) -> Tensor:
        """The same in the caller's mode: PyTorch 2.11 cannot compile what enters inference mode."""
        network = self.network
        x = F.relu_(self._convolve(images.contiguous(memory_format=self.memory_format), network.stem))
        if network.arch.stem_pools:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for block in network.blocks:
            shortcut = x if block.projection is None else self._convolve(x, block.projection)
            for layer in block.convolutions[:-1]:
                x = F.relu_(self._convolve(x, layer))
            x = F.relu_(self._convolve(x, block.convolutions[-1]).add_(shortcut))
        return F.linear(x.mean(dim=(2, 3)), network.head_weight, network.head_bias)


def onnx_graph(network: PackedNetwork, batch: int) -> bytes:
    """The dense network as a serialised ONNX model: input ``images`` ``[batch, C, H, W]``, output ``logits``."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, weights = [], []

    def constant(name: str, value: Tensor) -> str:
        weights.append(numpy_helper.from_array(value.float().numpy(), name))
        return name

    def convolve(x: str, layer: PackedConvolution, name: str) -> str:
        nodes.append(helper.make_node(
            "Conv", [x, constant(f"{name}.weight", layer.weight), constant(f"{name}.bias", layer.bias)], [name],
            pads=[layer.padding] * 4, strides=[layer.stride] * 2))
        return name

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    x = node("Relu", [convolve("images", network.stem, "stem")], "stem.relu")
    if network.arch.stem_pools:
        x = node("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    for index, block in enumerate(network.blocks):
        shortcut = x if block.projection is None else convolve(x, block.projection, f"{index}.projection")
        *first, last = block.convolutions
        for place, layer in enumerate(first):
            x = node("Relu", [convolve(x, layer, f"{index}.{place}")], f"{index}.{place}.relu")
        x = node("Add", [convolve(x, last, f"{index}.last"), shortcut], f"{index}.sum")
        x = node("Relu", [x], f"{index}.relu")
    x = node("Flatten", [node("GlobalAveragePool", [x], "pool")], "flat")
    head = [x, constant("head.weight", network.head_weight), constant("head.bias", network.head_bias)]
    node("Gemm", head, "logits", transB=1)
    shape = [batch, network.arch.in_channels, *network.arch.image_size]
    graph = helper.make_graph(
        nodes, "dense", [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, network.arch.num_classes])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def _graph_of(model: SkipNet, images: Tensor) -> bytes:
    return onnx_graph(pack(model, torch.device("cpu"), torch.float32), len(images))


def _pytorch(memory_format: torch.memory_format) -> Callable[[SkipNet, Tensor, torch.dtype], Call]:
    def build(model: SkipNet, images: Tensor, dtype: torch.dtype) -> Call:
        network = DenseNetwork(model, images.device, dtype, memory_format)
        return lambda batch: network(batch.to(dtype))

    return build


@contextmanager
def _cudnn_benchmark(on: bool) -> Iterator[None]:
    """With PyTorch's switch for choosing cuDNN's algorithms by timing them."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _captured(model: SkipNet, images: Tensor, dtype: torch.dtype, *, benchmark: bool) -> Call:
    """PyTorch channels-last as one CUDA graph, of the algorithms that cuDNN proposes or of those that it times."""
    network = DenseNetwork(model, images.device, dtype, torch.channels_last)
    own = images.to(dtype).clone()
    torch.cuda.synchronize(images.device)

    def capture() -> tuple[torch.cuda.CUDAGraph, Tensor]:
        for _ in range(3):  # so that cuDNN has chosen its algorithms
            network(own)
        torch.cuda.synchronize(images.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = network(own)
        return graph, logits

    # PyTorch asks once for the algorithm of a shape, by thread: in another one's it would be the one that is there,
    # whatever the switch says. With the thread would go what it has loaded, so it lives as long as the call.
    thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(images.device,))
    with _cudnn_benchmark(benchmark):
        graph, logits = thread.submit(capture).result()

    def run(batch: Tensor, thread: ThreadPoolExecutor = thread) -> Tensor:
        own.copy_(batch)
        graph.replay()
        return logits

    return run


def _compiled(model: SkipNet, images: Tensor, dtype: torch.dtype) -> Call:
    import torch._inductor.config as inductor

    network = DenseNetwork(model, images.device, dtype, torch.channels_last)
    torch.compiler.reset()  # networks of other batch sizes count towards the limit beyond which it stops compiling
    mode = "max-autotune" if images.device.type == "cuda" else None  # with CUDA graphs
    compiled = torch.compile(network.compute, dynamic=False, mode=mode)

    @torch.no_grad()  # as at the first call: in another mode it would compile again, without freezing
    def run(batch: Tensor) -> Tensor:
        return compiled(batch.to(dtype))

    with inductor.patch(freezing=True):
        run(images)
    return run


def _onnxruntime(model: SkipNet, images: Tensor, dtype: torch.dtype) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_graph_of(model, images), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def _openvino(model: SkipNet, images: Tensor, dtype: torch.dtype) -> Call:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(_graph_of(model, images), b""), "CPU", {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    })
    request = compiled.create_infer_request()
    return lambda batch: torch.from_numpy(request.infer([batch.numpy()])[0])


def _masked(model: SkipNet, images: Tensor, dtype: torch.dtype) -> Call:
    weights = {name: value.to(images.device, dtype if value.is_floating_point() else None)
               for name, value in model.state_dict().items()}
    with torch.device("meta"):
        gated = SkipNet(model.arch).eval()
    gated.load_state_dict(weights, assign=True)

    @torch.no_grad()
    def run(batch: Tensor) -> Tensor:
        x = gated.features(batch.to(dtype))
        mask, state = None, None
        for plan in gated.arch.blocks:
            block = gated.block(plan)
            shortcut = block.shortcut(x)
            executed = F.relu(block.residual(x) + shortcut)
            x = executed if mask is None else mask * executed + (1 - mask) * shortcut
            if gated.arch.gated:
                logit, state = gated.gate_step(plan, x, state)
                mask = (torch.sigmoid(logit) > 0.5).to(dtype).view(-1, 1, 1, 1)
        return gated.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return run


_BOTH = (torch.float32, torch.bfloat16)
_ANYWHERE = ("cpu", "cuda")

MASKED = Baseline("masked baseline", (), (torch.float32,), _masked, _ANYWHERE)
"""What the published code does: every block and every gate computed, the result chosen by multiplying with 0 or 1."""

PYTORCH = Baseline("PyTorch", (), _BOTH, _pytorch(torch.contiguous_format), _ANYWHERE)
PYTORCH_CHANNELS_LAST = Baseline("PyTorch channels-last", (), _BOTH, _pytorch(torch.channels_last), _ANYWHERE)
CUDA_GRAPH = Baseline("PyTorch, CUDA graph", (), _BOTH, partial(_captured, benchmark=False), ("cuda",))
CUDA_GRAPH_BENCHMARK = Baseline("CUDA graph, cudnn.benchmark", (), _BOTH, partial(_captured, benchmark=True),
                                ("cuda",))
TORCH_COMPILE = Baseline("torch.compile", (), _BOTH, _compiled, _ANYWHERE)
"""On a GPU max-autotune with CUDA graphs, and under whatever ``torch.backends.cudnn.benchmark`` says."""

BASELINES: tuple[Baseline, ...] = (
    MASKED,
    PYTORCH,
    PYTORCH_CHANNELS_LAST,
    CUDA_GRAPH,
    CUDA_GRAPH_BENCHMARK,
    TORCH_COMPILE,
    Baseline("ONNX Runtime", ("onnx", "onnxruntime"), (torch.float32,), _onnxruntime),
    Baseline("OpenVINO", ("onnx", "openvino"), _BOTH, _openvino),
)
"""All of them."""
