"""An engine and the most images that it takes at once: what a runtime calls, and torch.library's operator too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipnet_rt.engines.base import Engine, EnginePass, empty_decisions


@dataclass(frozen=True, eq=False)
class Executor:
    """Runs batches of any size, an empty one too.

    Attributes:
        engine: with its network.
        max_batch: larger batches are split; None: any goes as a whole.
    """

    engine: Engine
    max_batch: int | None

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        """The engine on checked arguments, as for :meth:`skipnet_rt.engines.base.Engine.run`; N may be 0."""
        network, size = self.engine.network, self.max_batch or len(images)
        if len(images) == 0:
            logits = torch.empty(0, network.arch.num_classes, dtype=network.dtype, device=network.device)
            return EnginePass(logits, empty_decisions(network, 0, num_gates, forced))
        if len(images) <= size:
            return self.engine.run(images, forced, num_gates)
        passes = [self.engine.run(part, None if forced is None else forced[:, start:start + size], num_gates)
                  for start, part in zip(range(0, len(images), size), torch.split(images, size), strict=True)]
        return EnginePass.joined(passes)
