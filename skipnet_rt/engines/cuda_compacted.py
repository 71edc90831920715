"""The GPU's compacted strategy: any network, block by block on the executing images, without asking the host.

Its five phases are in csrc/cuda/compacted.cu; here a network is described and its weights are laid out as that reads
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt import _C
from skipnet_rt.engines.base import EnginePass, empty_decisions
from skipnet_rt.engines.cuda_graphs import Graphs
from skipnet_rt.engines.tolerances import tf32_asked
from skipnet_rt.model.packing import PackedConvolution, PackedEmbedding, PackedFeedforwardGate, PackedNetwork

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


def _takes_pairs(stem: PackedConvolution) -> bool:
    """Whether pixels come in pairs, of four channels each: see ``Convolution`` in csrc/cuda/gathered_conv.h."""
    return stem.stride == 2 and stem.weight.shape[1] <= 4


def _stem_weight(stem: PackedConvolution) -> Tensor:
    """The same; of pairs ``[out, kernel, columns, 2, 4]``, where the first column begins at an even pixel."""
    if not _takes_pairs(stem):
        return _weight(stem)
    out_channels, in_channels, _, _ = stem.weight.shape
    before, after = stem.padding % 2, 1 - stem.padding % 2
    missing = (before, after, 0, 0, 0, 4 - in_channels, 0, _padded(out_channels) - out_channels)
    return F.pad(stem.weight, missing).permute(0, 2, 3, 1).flatten()


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
        stem_pairs: whether the stem takes pixels in pairs.
        blocks: each one's convolutions, and its projection (one or none).
        embed, hidden, projection_bias: RNNGate's sizes and last bias; 0 without.
        gates: feed-forward gates: each one's convolutions and last bias.
    """

    in_channels: int
    image_size: tuple[int, int]
    stem_pools: bool
    gates_pool: bool
    stem: Shape
    stem_pairs: bool
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
            arch.in_channels, arch.image_size, arch.stem_pools, any(gate.max_pool for gate in gates),
            _shape(network.stem), _takes_pairs(network.stem),
            [([*map(_shape, block.convolutions)], [] if block.projection is None else [_shape(block.projection)])
             for block in network.blocks],
            (_padded(network.head_weight.shape[1]), _padded(network.head_weight.shape[0]), 1, 1),
            arch.embed_dim if arch.state_dim else 0, arch.state_dim,
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
        weights = [_stem_weight(network.stem), *map(_weight, layers[1:])]
        return cls(torch.cat(weights), torch.cat(floats))


def element(dtype: torch.dtype) -> str:
    """What convolutions compute in, as csrc/cuda/element.h names it: the network's dtype, or TF32 where asked for."""
    return "tf32" if dtype == torch.float32 and tf32_asked() else str(dtype).removeprefix("torch.")


class CompactedStrategy:
    """A few launches per residual block, none of which waits for the host; most in a CUDA graph of :class:`Graphs`."""

    def __init__(self, network: PackedNetwork) -> None:
        self.network = network
        self._weights = CompactedWeights.of(network)
        device = network.device
        self._native = _C.CudaCompacted(
            device.index, element(network.dtype), **vars(Description.of(network)),
            elements=self._weights.elements.data_ptr(), elements_count=len(self._weights.elements),
            floats=self._weights.floats.data_ptr(), floats_count=len(self._weights.floats))
        self._graphs = Graphs(network.arch, device, network.dtype)
        torch.cuda.current_stream(device).synchronize()  # the weights are there for every stream's calls

    @property
    def memory(self) -> int:
        """Bytes of the device's memory for the weights as its kernels read them, and for graphs."""
        return self._weights.elements.nbytes + self._weights.floats.nbytes + self._graphs.memory

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        """See :meth:`skipnet_rt.engines.base.Engine.run`."""
        return self._graphs.run(self._forward, images, forced, num_gates)

    def _forward(self, images: Tensor, forced: Tensor | None, present: Tensor | None, num_gates: int) -> EnginePass:
        """All launches, on the current stream."""
        batch, device, classes = len(images), self.network.device, self.network.arch.num_classes
        decisions = empty_decisions(self.network, batch, num_gates, forced, zeroed=False)
        logits = torch.empty(batch, _padded(classes), device=device)
        workspace = torch.empty(self._native.workspace_bytes(batch), dtype=torch.uint8, device=device)
        self._native.run(
            batch, num_gates, 0 if present is None else present.data_ptr(), images.data_ptr(),
            0 if decisions.forced is None else decisions.forced.data_ptr(), logits.data_ptr(),
            decisions.gate_logits.data_ptr(), decisions.probabilities.data_ptr(), decisions.executed.data_ptr(),
            decisions.hidden.data_ptr(), decisions.cell.data_ptr(), workspace.data_ptr(),
            torch.cuda.current_stream(device).cuda_stream)
        return EnginePass(logits[:, :classes].to(self.network.dtype).contiguous(), decisions)
