"""The GPU's compacted strategy: any network, block by block on the executing images, without asking the host.

The walk and its rooms are in csrc/cuda/compacted.cu; here a network is described and its weights are laid out as it
reads them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt import _C
from skipnet_rt.engines.cuda import CudaEngine
from skipnet_rt.engines.engine import Decisions, EnginePass
from skipnet_rt.packing import PackedConvolution, PackedEmbedding, PackedFeedforwardGate, PackedNetwork
from skipnet_rt.tolerances import tf32_asked

Shape = tuple[int, int, int, int]
"""A convolution's input channels, output channels, kernel and stride. Its padding is half of the kernel."""


def _padded(channels: int) -> int:
    """Channels are computed in multiples of 8, with zero weights for those that there are not."""
    return -(-channels // 8) * 8


def _shape(layer: PackedConvolution) -> Shape:
    out_channels, in_channels, kernel, _ = layer.weight.shape
    assert layer.padding == kernel // 2
    return _padded(in_channels), _padded(out_channels), kernel, layer.stride


def _weight(layer: PackedConvolution) -> Tensor:
    """``[out, kernel, kernel, in]``, flat."""
    out_channels, in_channels, _, _ = layer.weight.shape
    missing = (0, 0, 0, 0, 0, _padded(in_channels) - in_channels, 0, _padded(out_channels) - out_channels)
    return F.pad(layer.weight, missing).permute(0, 2, 3, 1).flatten()


def _filled(values: Tensor) -> Tensor:
    """Float32, flat, zeros up to a multiple of 8."""
    return F.pad(values.float().flatten(), (0, -values.numel() % 8))


@dataclass(frozen=True)
class Description:
    """A network without its weights, as csrc/cuda/compacted.h has it.

    Attributes:
        in_channels, image_size: of the images.
        stem_pools, gates_pool: whether a max pool follows the stem, comes first in a gate.
        stem, head: the first convolution, and the classifier as one.
        blocks: each one's convolutions, and its projection (one or none).
        embed, hidden, projection_bias: RNNGate's sizes and last bias; 0 without.
        gates: feed-forward gates: each one's convolutions and last bias.
    """

    in_channels: int
    image_size: tuple[int, int]
    stem_pools: bool
    gates_pool: bool
    stem: Shape
    blocks: list[tuple[list[Shape], list[Shape]]]
    head: Shape
    embed: int
    hidden: int
    projection_bias: float
    gates: list[tuple[list[Shape], float]]

    @classmethod
    def of(cls, network: PackedNetwork) -> Description:
        """What a packed network looks like."""
        arch, lstm = network.arch, network.lstm
        gates = [gate for gate in network.gates if isinstance(gate, PackedFeedforwardGate)]
        return cls(
            arch.in_channels, arch.image_size, arch.stem == "imagenet", any(gate.max_pool for gate in gates),
            _shape(network.stem),
            [([*map(_shape, block.convolutions)], [] if block.projection is None else [_shape(block.projection)])
             for block in network.blocks],
            (_padded(network.head_weight.shape[1]), _padded(network.head_weight.shape[0]), 1, 1),
            0 if lstm is None else lstm.input_weight.shape[1], 0 if lstm is None else len(lstm.projection_weight),
            0.0 if lstm is None else lstm.projection_bias.item(),
            [([*map(_shape, gate.convolutions)], gate.bias.item()) for gate in gates])


@dataclass(frozen=True)
class CompactedWeights:
    """A network's weights in the order of ``lay_out`` in csrc/cuda/compacted.cu.

    Attributes:
        elements: of its convolutions, in the network's dtype, flat.
        floats: biases, classifier and gates, float32, flat.
    """

    elements: Tensor
    floats: Tensor

    @classmethod
    def of(cls, network: PackedNetwork) -> CompactedWeights:
        """A packed network's weights."""
        layers = [network.stem]
        for block in network.blocks:
            layers += [*block.convolutions, *([] if block.projection is None else [block.projection])]
        head = PackedConvolution(network.head_weight[:, :, None, None], network.head_bias, 1, 0)
        floats = [_filled(layer.bias) for layer in layers] + [_filled(_weight(head)), _filled(head.bias)]
        for gate in network.gates:
            if isinstance(gate, PackedEmbedding):
                channels = gate.weight.shape[1]
                floats += [_filled(F.pad(gate.weight, (0, _padded(channels) - channels))), _filled(gate.bias)]
            else:
                for layer in gate.convolutions:
                    floats += [_filled(_weight(layer)), _filled(layer.bias)]
                floats.append(_filled(gate.weight))
        if lstm := network.lstm:
            floats += map(_filled, (lstm.input_weight, lstm.hidden_weight, lstm.bias, lstm.projection_weight))
        return cls(torch.cat([_weight(layer) for layer in layers]), torch.cat(floats))


def element(dtype: torch.dtype) -> str:
    """What convolutions compute in, as csrc/cuda/element.h names it: the network's dtype, or TF32 where asked for."""
    return "tf32" if dtype == torch.float32 and tf32_asked() else str(dtype).removeprefix("torch.")


_CAPTURED_BATCH = 32
"""Larger batches keep the GPU busy for longer than the host needs for the next launch: a graph would bring nothing."""

_CAPTURED_SIZES = 8
"""Kinds of calls that are captured, those that come twice first."""


@dataclass(frozen=True)
class _Arrays:
    """What one call reads and writes.

    Attributes:
        images: ``[N, C, H, W]``.
        logits: float32 ``[N, classes]``, the classes padded.
        floats: float32, flat: gate logits and probabilities ``[S, N]`` each, hidden state and cell ``[N, hidden_dim]``.
        executed: bool ``[S, N]``.
        forced: bool ``[G, N]`` or None.
        workspace: bytes.
    """

    images: Tensor
    logits: Tensor
    floats: Tensor
    executed: Tensor
    forced: Tensor | None
    workspace: Tensor

    def decisions(self, floats: Tensor, executed: Tensor) -> Decisions:
        """Views of these floats, which are ours or a copy."""
        decided, batch = executed.numel(), len(self.images)
        gate_logits, probabilities = floats[:2 * decided].view(2, *executed.shape)
        hidden, cell = floats[2 * decided:].view(2, batch, (len(floats) - 2 * decided) // (2 * batch))
        return Decisions(gate_logits, probabilities, executed, hidden, cell, forced=None)  # it has been obeyed


class CompactedCudaEngine(CudaEngine):
    """A few launches a block, none of which waits for the host.

    A small batch is over sooner than the host can launch for it. So a call that comes a second time with the same small
    batch size is captured into a CUDA graph, and from then on replayed between a copy of the images and a copy of the
    results. Larger batches, other sizes, and calls that somebody else captures are launched directly.
    """

    def __init__(self, network: PackedNetwork) -> None:
        super().__init__(network)
        self._weights = CompactedWeights.of(network)
        device = network.device
        self._native = _C.CudaCompacted(
            torch.cuda.current_device() if device.index is None else device.index,
            element(network.dtype), **vars(Description.of(network)),
            elements=self._weights.elements.data_ptr(), elements_count=len(self._weights.elements),
            floats=self._weights.floats.data_ptr(), floats_count=len(self._weights.floats))
        self._lock = threading.Lock()
        self._seen: set[tuple[int, int, bool]] = set()
        self._graphs: dict[tuple[int, int, bool], tuple[torch.cuda.CUDAGraph, _Arrays]] = {}
        self._shared: Tensor | None = None  # the graphs' workspace: they run one after the other
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # the last replay, on whatever stream it was

    @property
    def memory(self) -> int:
        held = [self._weights.elements, self._weights.floats, self._shared]
        with self._lock:
            for _, arrays in self._graphs.values():
                held += [arrays.images, arrays.logits, arrays.floats, arrays.executed, arrays.forced]
        return super().memory + sum(tensor.nbytes for tensor in held if tensor is not None)

    def run(self, images: Tensor, routing: Tensor | None, steps: int) -> EnginePass:
        if len(images) <= _CAPTURED_BATCH and not torch.cuda.is_current_stream_capturing():
            kind = (len(images), steps, routing is not None)
            with self._lock, torch.cuda.device(self.network.device):
                if kind not in self._graphs and kind in self._seen and len(self._graphs) < _CAPTURED_SIZES:
                    self._graphs[kind] = self._capture(*kind)
                if kind in self._graphs:
                    return self._replay(*self._graphs[kind], images, routing)
                self._seen.add(kind)
        workspace = self._bytes(self._native.workspace_bytes(len(images)))
        arrays = self._arrays(images, steps, None if routing is None else routing.t().contiguous(), workspace)
        self._launch(arrays)
        return EnginePass(self._classes(arrays), arrays.decisions(arrays.floats, arrays.executed))

    def _bytes(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.network.device)

    def _arrays(self, images: Tensor, steps: int, forced: Tensor | None, workspace: Tensor) -> _Arrays:
        """A call's arrays; the kernels fill all that is empty here."""
        batch, device, arch = len(images), images.device, self.network.arch
        units = arch.hidden_dim if arch.gate == "rnn" else 0
        return _Arrays(images, torch.empty(batch, _padded(arch.num_classes), device=device),
                       torch.empty(2 * batch * (steps + units), device=device),
                       torch.empty(steps, batch, dtype=torch.bool, device=device), forced, workspace)

    def _launch(self, arrays: _Arrays) -> None:
        """The whole walk, on the current stream."""
        decisions = arrays.decisions(arrays.floats, arrays.executed)
        self._native.run(
            len(arrays.images), len(arrays.executed), arrays.images.data_ptr(),
            0 if arrays.forced is None else arrays.forced.data_ptr(), arrays.logits.data_ptr(),
            decisions.gate_logits.data_ptr(), decisions.probabilities.data_ptr(), decisions.executed.data_ptr(),
            decisions.hidden.data_ptr(), decisions.cell.data_ptr(), arrays.workspace.data_ptr(),
            torch.cuda.current_stream(self.network.device).cuda_stream)

    def _classes(self, arrays: _Arrays) -> Tensor:
        """A copy of the logits without the padding, in the network's dtype."""
        return arrays.logits[:, :self.network.arch.num_classes].to(
            self.network.dtype, copy=True, memory_format=torch.contiguous_format)

    def _capture(self, batch: int, steps: int, forced: bool) -> tuple[torch.cuda.CUDAGraph, _Arrays]:
        """A graph of the walk over arrays of its own. The kernels have all run before: nothing has to be loaded now."""
        arch, device = self.network.arch, self.network.device
        with torch.inference_mode(False):  # calls inside and outside of it will write to them
            if self._shared is None:
                self._shared = self._bytes(self._native.workspace_bytes(_CAPTURED_BATCH))
            images = torch.empty(batch, arch.in_channels, *arch.image_size, dtype=self.network.dtype, device=device)
            routing = torch.empty(arch.num_gates, batch, dtype=torch.bool, device=device) if forced else None
            arrays = self._arrays(images, steps, routing, self._shared)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            graph.capture_begin(capture_error_mode="thread_local")
            self._launch(arrays)
            graph.capture_end()
        return graph, arrays

    def _replay(self, graph: torch.cuda.CUDAGraph, arrays: _Arrays, images: Tensor,
                routing: Tensor | None) -> EnginePass:
        """The graph on the current stream, after all other replays: they share memory."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        arrays.images.copy_(images)
        if routing is not None and arrays.forced is not None:
            arrays.forced.copy_(routing.t())
        graph.replay()
        result = EnginePass(self._classes(arrays), arrays.decisions(arrays.floats.clone(), arrays.executed.clone()))
        stream.record_event(self._done)
        return result
