"""What was decided and what it cost: results of inference, statistics over many images, FLOP accounting."""

from __future__ import annotations

from collections.abc import Iterable
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
            other arithmetic operation (batch normalisation two an element; ReLU, residual addition, pooling, each
            nonlinearity of a gate one an element).
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


_BN, _BN_RELU, _BN_ADD_RELU = 2, 3, 4  # operations an element after a convolution


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
        blocks: one a residual block.
        gates: one a gate that decides something.
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
    if architecture.stem == "imagenet":
        stem += OperationCount(0, 9 * channels * architecture.stem_size[0] * architecture.stem_size[1])
    height, width = architecture.blocks[-1].out_size
    features, classes = architecture.features, architecture.num_classes
    head = OperationCount(0, features * height * width + 2 * features * classes + classes)
    gates = tuple(_count_gate(architecture, plan) for plan in architecture.blocks[:architecture.num_gates])
    return NetworkCount(stem, tuple(_count_block(plan) for plan in architecture.blocks), gates, head)


def computation(executed: Tensor) -> Tensor:
    """The published computation percentage of each image, as a fraction: (executed gated blocks + 1) / (G + 1).

    Args:
        executed: bool ``[N, G]``.

    Returns:
        float64 ``[N]`` in (0, 1]; 1 for a dense network (G = 0).
    """
    return (executed.sum(dim=1, dtype=torch.float64) + 1) / (executed.shape[1] + 1)


@dataclass(frozen=True)
class InferenceResult:
    """What one call decided.

    Attributes:
        logits: ``[N, num_classes]`` in the runtime's dtype.
        executed: bool ``[N, G]``, whether the image ran block ``k + 1``.
        probabilities: float ``[N, G]``, of executing; computed by the gates also where ``executed`` was forced.
        arch: the network's architecture.
    """

    logits: Tensor
    executed: Tensor
    probabilities: Tensor
    arch: SkipNetArch

    def __len__(self) -> int:
        return self.logits.shape[0]

    @property
    def computation(self) -> Tensor:
        """Computation of each image as a fraction, float64 ``[N]``; see :func:`computation`."""
        return computation(self.executed)

    @property
    def blocks_run(self) -> Tensor:
        """Residual blocks that each image ran, the first one included; int64 ``[N]``."""
        if not self.arch.gated:
            return torch.full((len(self),), self.arch.num_blocks, device=self.executed.device)
        return self.executed.sum(dim=1) + 1

    @property
    def multiply_adds(self) -> Tensor:
        """Multiply-adds of convolutions and gates of each image, int64 ``[N]``."""
        return count_operations(self.arch).per_image(self.executed)[0]


class RoutingStats:
    """Routing statistics over any number of results of one network.

    Args:
        architecture: of the network.
    """

    def __init__(self, architecture: SkipNetArch) -> None:
        self.arch = architecture
        self._executed: list[Tensor] = []

    @classmethod
    def of(cls, architecture: SkipNetArch, results: Iterable[InferenceResult]) -> RoutingStats:
        """The statistics of some results."""
        stats = cls(architecture)
        for result in results:
            stats.update(result.executed)
        return stats

    def update(self, executed: Tensor) -> None:
        """Add the decisions of some images, bool ``[N, G]``."""
        if executed.shape[1:] != (self.arch.num_gates,):
            raise ValueError(f"executed must have shape [N, {self.arch.num_gates}] for {self.arch}, "
                             f"got {list(executed.shape)}")
        self._executed.append(executed.bool().cpu())

    @property
    def executed(self) -> Tensor:
        """All decisions so far, bool ``[images, G]``."""
        return torch.cat(self._executed) if self._executed else torch.zeros(0, self.arch.num_gates, dtype=torch.bool)

    @property
    def images(self) -> int:
        """Images counted so far."""
        return self.executed.shape[0]

    @property
    def execution_rates(self) -> Tensor:
        """Share of the images that ran each gated block, float64 ``[G]``."""
        return self.executed.double().mean(dim=0)

    @property
    def computation(self) -> float:
        """The published computation percentage as a fraction: (sum of execution rates + 1) / (G + 1)."""
        return computation(self.executed).mean().item()

    @property
    def multiply_adds(self) -> float:
        """Mean multiply-adds an image, gates included."""
        return count_operations(self.arch).per_image(self.executed)[0].double().mean().item()

    @property
    def multiply_adds_share(self) -> float:
        """Mean multiply-adds an image, gates included, over those of the dense base."""
        return self.multiply_adds / count_operations(self.arch).dense.multiply_adds

    @property
    def distinct_routes(self) -> int:
        """How many different routes were taken."""
        executed = self.executed
        return torch.unique(executed, dim=0).shape[0] if executed.numel() else min(1, self.images)
