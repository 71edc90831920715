"""What a network costs: its multiply-adds and operations, counted part by part for one image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from skipnet_rt.model.arch import BlockPlan, SkipNetArch


@dataclass(frozen=True)
class OperationCount:
    """Work for one image.

    Attributes:
        multiply_adds: of convolutions and of the gates' matrix products: the figure that papers quote.
        operations: everything: two for a multiply-add of any layer (classifier and biases included), one for every
            other arithmetic operation (batch normalisation two per element; ReLU, residual addition, pooling, each
            nonlinearity of a gate one per element).
    """

    multiply_adds: int = 0
    operations: int = 0

    def __add__(self, other: OperationCount) -> OperationCount:
        return OperationCount(self.multiply_adds + other.multiply_adds, self.operations + other.operations)


def _convolution(in_channels: int, out_channels: int, kernel: int, size: tuple[int, int], *,
                 extras: int) -> OperationCount:
    """A convolution without bias at its output size, with `extras` operations for every output element."""
    outputs = out_channels * size[0] * size[1]
    multiply_adds = outputs * in_channels * kernel * kernel
    return OperationCount(multiply_adds, 2 * multiply_adds + extras * outputs)


_BN, _BN_RELU, _BN_ADD_RELU = 2, 3, 4  # operations per element after a convolution


@dataclass(frozen=True)
class BlockCount:
    """One residual block's work for an image that executes it and for one that skips it (its projection, if any)."""

    executed: OperationCount
    skipped: OperationCount


def _count_block(plan: BlockPlan) -> BlockCount:
    skipped = OperationCount()
    if plan.projects:
        skipped = _convolution(plan.in_channels, plan.out_channels, 1, plan.out_size, extras=_BN)
    if plan.kind == "basic":
        executed = (_convolution(plan.in_channels, plan.planes, 3, plan.out_size, extras=_BN_RELU)
                    + _convolution(plan.planes, plan.out_channels, 3, plan.out_size, extras=_BN_ADD_RELU))
    else:
        executed = (_convolution(plan.in_channels, plan.planes, 1, plan.in_size, extras=_BN_RELU)
                    + _convolution(plan.planes, plan.planes, 3, plan.out_size, extras=_BN_RELU)
                    + _convolution(plan.planes, plan.out_channels, 1, plan.out_size, extras=_BN_ADD_RELU))
    return BlockCount(executed + skipped, skipped)


def _count_gate(architecture: SkipNetArch, plan: BlockPlan) -> OperationCount:
    channels, (height, width) = plan.out_channels, plan.out_size
    if architecture.gate == "rnn":
        embed, hidden = architecture.embed_dim, architecture.hidden_dim
        multiply_adds = channels * embed + 4 * hidden * (embed + hidden) + hidden
        elementwise = channels * height * width + embed + 8 * hidden + 4 * hidden + 5 * hidden + 2
        return OperationCount(multiply_adds, 2 * multiply_adds + elementwise)
    total = OperationCount()
    if architecture.gate == "feedforward1":
        height, width = height // 2, width // 2
        total += OperationCount(0, 4 * channels * height * width)
        total += _convolution(channels, channels, 3, (height, width), extras=_BN_RELU)
    height, width = (height + 1) // 2, (width + 1) // 2
    total += _convolution(channels, channels, 3, (height, width), extras=_BN_RELU)
    return total + OperationCount(2 * channels, channels * height * width + 4 * channels + 4)


@dataclass(frozen=True)
class NetworkCount:
    """A network's work, part by part, for one image.

    Attributes:
        stem, head: run by every image.
        blocks: one per residual block.
        gates: one per gate that decides something.
    """

    stem: OperationCount
    blocks: tuple[BlockCount, ...]
    gates: tuple[OperationCount, ...]
    head: OperationCount

    @property
    def dense(self) -> OperationCount:
        """The same network with every block executed and no gate: its dense base."""
        return sum((block.executed for block in self.blocks), self.stem + self.head)

    @cached_property
    def _fixed(self) -> OperationCount:
        always = self.stem + self.head + self.blocks[0].executed
        for part in (*self.gates, *(block.skipped for block in self.blocks[1:])):
            always += part
        return always

    def per_image(self, executed: Tensor) -> tuple[Tensor, Tensor]:
        """Work of each image, gates included.

        Args:
            executed: bool ``[N, G]``; ``[N, 0]`` for a dense network, whose images all run everything.

        Returns:
            ``multiply_adds`` and ``operations``, int64 ``[N]`` each.
        """
        figures = []
        for name in ("multiply_adds", "operations"):
            if not self.gates:
                figures.append(torch.full((executed.shape[0],), getattr(self.dense, name), device=executed.device))
                continue
            extra = torch.tensor([getattr(block.executed, name) - getattr(block.skipped, name)
                                  for block in self.blocks[1:]], device=executed.device)
            figures.append(getattr(self._fixed, name) + (executed * extra).sum(dim=1))
        return figures[0], figures[1]


@lru_cache(maxsize=256)
def count_operations(architecture: SkipNetArch) -> NetworkCount:
    """Count a network's work exactly, for one image.

    The paper (section 4.1) states the gates' cost roughly, in percent of a residual block's multiply-adds: FFGate-I 19,
    FFGate-II 12.5, RNNGate 0.04; docs/flops.md sets the exact counts beside it.
    """
    channels, kernel = architecture.widths[0], 3 if architecture.stem == "cifar" else 7
    convolved = architecture.image_size if architecture.stem == "cifar" else tuple(
        (side + 1) // 2 for side in architecture.image_size)
    stem = _convolution(architecture.in_channels, channels, kernel, (convolved[0], convolved[1]), extras=_BN_RELU)
    if architecture.stem_pools:
        stem += OperationCount(0, 9 * channels * architecture.stem_size[0] * architecture.stem_size[1])
    height, width = architecture.blocks[-1].out_size
    features, classes = architecture.features, architecture.num_classes
    head = OperationCount(0, features * height * width + 2 * features * classes + classes)
    gates = tuple(_count_gate(architecture, plan) for plan in architecture.blocks[:architecture.num_gates])
    return NetworkCount(stem, tuple(_count_block(plan) for plan in architecture.blocks), gates, head)
