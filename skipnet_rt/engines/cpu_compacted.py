"""The CPU's compacted strategy: block by block on the executing images; gates and compaction fused in C++.

The convolutions are oneDNN's, with weights packed once and bias, ReLU and residual addition fused. They are called
through the operators that TorchInductor uses, which always take oneDNN: plain ``conv2d`` changes its library with the
batch size, and with it the bits of the result (docs/numerics.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt import _C
from skipnet_rt.engines.cpu import CpuEngine
from skipnet_rt.engines.engine import Decisions, EnginePass, WalkingEngine
from skipnet_rt.packing import PackedBlock, PackedConvolution, PackedEmbedding, PackedNetwork


class _Convolution:
    """A packed oneDNN convolution over channels-last activations ``[N, H, W, C]``.

    Args:
        layer: the weights.
        size: the input's height and width. oneDNN lays weights out by it and by the batch, one image or several, and
            would do so again in every call for weights that were laid out for another. The bits do not depend on it.
    """

    def __init__(self, layer: PackedConvolution, size: tuple[int, int]) -> None:
        self.geometry = ([layer.padding] * 2, [layer.stride] * 2, [1, 1], 1)
        self.for_one, self.for_several = (torch.ops.mkldnn._reorder_convolution_weight(
            layer.weight, *self.geometry, [batch, layer.weight.shape[1], *size]) for batch in (1, 8))
        self.out_size = ((size[0] - 1) // layer.stride + 1, (size[1] - 1) // layer.stride + 1)
        self.bias = layer.bias

    def __call__(self, x: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """``relu(convolution(x) + residual)``, either part optional."""
        planar, weight = x.permute(0, 3, 1, 2), self.for_one if len(x) == 1 else self.for_several
        if residual is None:
            y = torch.ops.mkldnn._convolution_pointwise(
                planar, weight, self.bias, *self.geometry, "relu" if relu else "none", [], "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                planar, residual.permute(0, 3, 1, 2), weight, self.bias, *self.geometry,
                "add", 1.0, "relu" if relu else None, [], None)
        return y.permute(0, 2, 3, 1)


def _chain(layers: tuple[PackedConvolution, ...], size: tuple[int, int]) -> list[_Convolution]:
    """Convolutions that follow one another, the first on an input of this size."""
    chain: list[_Convolution] = []
    for layer in layers:
        chain.append(_Convolution(layer, chain[-1].out_size if chain else size))
    return chain


class _Block:
    def __init__(self, block: PackedBlock) -> None:
        *self.first, self.last = _chain(block.convolutions, block.plan.in_size)
        self.projection = None if block.projection is None else _Convolution(block.projection, block.plan.in_size)


@dataclass
class _CpuDecisions(Decisions):
    """Adds the fused compaction's output and the pooled features, which outlive a block that an image skips.

    Attributes:
        rows: int64 ``[N]``, the executing images in order, in its first ``count`` places.
        pooled: float32 ``[N, channels]`` of the current group, or None at its start.
    """

    rows: Tensor
    count: int
    pooled: Tensor | None


class CompactedCpuEngine(CpuEngine, WalkingEngine[Tensor, Tensor]):
    """oneDNN convolutions over the executing images, C++ gate step and compaction; for any network."""

    def __init__(self, network: PackedNetwork) -> None:
        super().__init__(network)
        self._stem = _Convolution(network.stem, network.arch.image_size)
        self._blocks = [_Block(block) for block in network.blocks]
        self._gates: list[_C.RNNGate | _C.FeedforwardGate] = []
        self._gate_convolutions: list[list[_Convolution]] = []
        for plan, gate in zip(network.arch.blocks, network.gates, strict=False):  # a dense network has no gates
            if isinstance(gate, PackedEmbedding):
                assert network.lstm is not None
                lstm = network.lstm
                self._gates.append(_C.RNNGate(
                    gate.weight.numpy(), gate.bias.numpy(), lstm.input_weight.numpy(), lstm.hidden_weight.numpy(),
                    lstm.bias.numpy(), lstm.projection_weight.numpy(), lstm.projection_bias.item()))
            else:
                self._gates.append(_C.FeedforwardGate(gate.weight.numpy(), gate.bias.item()))
                height, width = plan.out_size
                seen = (height // 2, width // 2) if gate.max_pool else (height, width)
                self._gate_convolutions.append(_chain(gate.convolutions, seen))
        self._head_weight = network.head_weight.float().t().contiguous().numpy()
        self._head_bias = network.head_bias.float().numpy()

    def begin(self, batch: int, steps: int, routing: Tensor | None) -> _CpuDecisions:
        return _CpuDecisions(**vars(super().begin(batch, steps, routing)), rows=torch.arange(batch), count=batch,
                             pooled=None)

    def everyone(self, decisions: Decisions) -> Tensor:
        return torch.arange(decisions.executed.shape[1])

    def stem(self, images: Tensor) -> Tensor:
        x = self._stem(images.permute(0, 2, 3, 1).contiguous(), relu=True)
        if self.network.arch.stem == "imagenet":
            x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, stride=2, padding=1).permute(0, 2, 3, 1)
        return x

    def gate_step(self, index: int, x: Tensor, decisions: Decisions) -> None:
        assert isinstance(decisions, _CpuDecisions)
        gate, forced = self._gates[index], decisions.forced_by(index)
        arrays = (decisions.gate_logits[index].numpy(), decisions.probabilities[index].numpy(),
                  decisions.executed[index].numpy(), None if forced is None else forced.numpy(),
                  decisions.rows.numpy())
        if isinstance(gate, _C.RNNGate):
            if decisions.pooled is None or decisions.pooled.shape[1] != x.shape[3]:
                decisions.pooled = _pool(x)
            else:  # an image that skipped the block keeps its feature
                _C.pool(_pixels(x), decisions.rows[:decisions.count].numpy(), decisions.pooled.numpy())
            decisions.count = gate.step(decisions.pooled.numpy(), decisions.hidden.numpy(), decisions.cell.numpy(),
                                        *arrays)
        else:
            decisions.count = gate.step(_pool(self._gate_feature(index, x)).numpy(), *arrays)

    def _gate_feature(self, index: int, x: Tensor) -> Tensor:
        """The feed-forward gate's last feature map, float32 ``[N, H, W, C]``."""
        y = x.float()
        if self.network.arch.gate == "feedforward1":
            y = F.max_pool2d(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        for convolution in self._gate_convolutions[index]:
            y = convolution(y, relu=True)
        return y

    def compact(self, index: int, decisions: Decisions) -> Tensor:
        assert isinstance(decisions, _CpuDecisions)
        return decisions.rows[:decisions.count]  # the gate step has listed them

    def run_block(self, index: int, x: Tensor, rows: Tensor) -> Tensor:
        block = self._blocks[index]
        shortcut = x if block.projection is None else block.projection(x)
        if len(rows) == 0:
            return shortcut
        everyone = len(rows) == len(x)
        y = x if everyone else x.index_select(0, rows)
        residual = shortcut if everyone else y if block.projection is None else shortcut.index_select(0, rows)
        for convolution in block.first:
            y = convolution(y, relu=True)
        y = block.last(y, relu=True, residual=residual)
        return y if everyone else shortcut.index_copy_(0, rows, y)

    def head(self, x: Tensor) -> Tensor:
        logits = torch.empty(len(x), self.network.arch.num_classes)
        _C.classify(_pool(x).numpy(), self._head_weight, self._head_bias, logits.numpy())
        return logits.to(self.network.dtype)

    def run(self, images: Tensor, routing: Tensor | None, steps: int) -> EnginePass:
        result = super().run(images, routing, steps)
        # oneDNN's ReLU turns NaN into 0, PyTorch's keeps it: an image with NaN must not come out as a confident class.
        invalid = images.isnan().flatten(1).any(dim=1)
        if invalid.any():
            result.logits[invalid] = torch.nan
            decisions = result.decisions
            for values in (decisions.gate_logits, decisions.probabilities):
                values[:, invalid] = torch.nan
            decisions.executed[:, invalid] = False
            if decisions.forced is not None:
                decisions.executed[:len(decisions.forced), invalid] = decisions.forced[:, invalid]
        return result


def _pixels(x: Tensor) -> np.ndarray:
    """``[N, H, W, C]`` as C++ takes it: ``[N, H * W, C]``, bfloat16 viewed as uint16."""
    flat = x.flatten(1, 2)
    return flat.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else flat.numpy()


def _pool(x: Tensor) -> Tensor:
    """Global average of ``[N, H, W, C]``, float32 ``[N, C]``."""
    pooled = torch.empty(x.shape[0], x.shape[3])
    _C.pool(_pixels(x), torch.arange(len(x)).numpy(), pooled.numpy())
    return pooled
