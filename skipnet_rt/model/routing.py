"""What was decided: results of inference, and statistics over many images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.flops import count_operations

Count = TypeVar("Count", float, Tensor)


def computation_of(blocks: Count, num_gates: int) -> Count:
    """The published computation percentage as a fraction, from the (mean) number of gated blocks that were executed.

    It is (sum of the gates' execution rates + 1) / (gates + 1): the first block always runs.
    """
    return (blocks + 1) / (num_gates + 1)


def computation(executed: Tensor) -> Tensor:
    """The computation of each image as a fraction, see :func:`computation_of`.

    Args:
        executed: bool ``[N, G]``.

    Returns:
        float64 ``[N]`` in (0, 1]; 1 for a dense network (G = 0).
    """
    return computation_of(executed.sum(dim=1, dtype=torch.float64), executed.shape[1])


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
    def decision_entropy(self) -> float:
        """How dynamic the network is: the entropy of its gates' decisions over the images, in bits, mean of the gates.

        0 where every gate does the same for all images (a static network), 1 where each runs its block for half of
        them. A gate that decides by the image alone tells so many bits of it. 0 without gates or images.
        """
        rates = self.execution_rates
        if not self.images or not len(rates):
            return 0.0
        return float((-torch.xlogy(rates, rates) - torch.xlogy(1 - rates, 1 - rates)).mean()) / math.log(2)

    @property
    def computation(self) -> float:
        """The images' mean computation as a fraction; see :func:`computation_of`."""
        return computation(self.executed).mean().item()

    @property
    def multiply_adds(self) -> float:
        """Mean multiply-adds per image, gates included."""
        return count_operations(self.arch).per_image(self.executed)[0].double().mean().item()

    @property
    def multiply_adds_share(self) -> float:
        """Mean multiply-adds per image, gates included, over those of the dense base."""
        return self.multiply_adds / count_operations(self.arch).dense.multiply_adds

    @property
    def distinct_routes(self) -> int:
        """How many different routes were taken."""
        executed = self.executed
        return torch.unique(executed, dim=0).shape[0] if executed.numel() else min(1, self.images)
