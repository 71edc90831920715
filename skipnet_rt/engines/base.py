"""What an engine is: five phases, and the data path through them.

Every engine shows the same phases under the same names, in this order: ``stem``, ``gate_step``, ``compact``,
``run_block``, ``head``. :meth:`BlockwiseEngine.forward` is the data path; an engine that goes from images to
logits in one native call is an :class:`Engine` only, and its native source shows the phases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.packing import PackedNetwork


@dataclass(frozen=True)
class Availability:
    """Whether an engine can run on this machine; true or false in a condition.

    Attributes:
        available: it can.
        reason: why not, and what would change that; empty where it can.
    """

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "available" if self.available else f"not available: {self.reason}"


@dataclass
class Decisions:
    """The gates' side of one call. S = G, or G + 1 where the unused last gate is evaluated too.

    Attributes:
        gate_logits: ``[S, N]``, the execute logits, in the gates' dtype. Gate-major, so that a gate writes one row.
        probabilities: ``[S, N]``, their sigmoid.
        executed: bool ``[S, N]``: p > 0.5, or what was forced.
        hidden, cell: ``[N, state_dim]``, the LSTM's state, advanced in place.
        forced: bool ``[G, N]``, decisions that replace the gates' own, or None.
    """

    gate_logits: Tensor
    probabilities: Tensor
    executed: Tensor
    hidden: Tensor
    cell: Tensor
    forced: Tensor | None

    def forced_by(self, index: int) -> Tensor | None:
        """What was forced for gate ``index``, bool ``[N]``; None where it decides itself (the unused last one does)."""
        return None if self.forced is None or index == len(self.forced) else self.forced[index]


def empty_decisions(network: PackedNetwork, batch: int, num_gates: int, forced: Tensor | None, *,
                    zeroed: bool = True) -> Decisions:
    """Decisions of a batch before the first gate.

    Args:
        network: whose gates decide.
        batch: N.
        num_gates: S.
        forced: bool ``[G, N]`` of any strides, or None.
        zeroed: the decisions and the LSTM's state begin at zero; False where kernels write all of them themselves.
    """
    make = torch.zeros if zeroed else torch.empty
    gates: dict[str, Any] = {"dtype": network.gate_dtype, "device": network.device}
    return Decisions(
        gate_logits=torch.empty(num_gates, batch, **gates),
        probabilities=torch.empty(num_gates, batch, **gates),
        executed=make(num_gates, batch, dtype=torch.bool, device=network.device),
        hidden=make(batch, network.arch.state_dim, **gates),
        cell=make(batch, network.arch.state_dim, **gates),
        forced=None if forced is None else forced.contiguous(),
    )


@dataclass(frozen=True)
class EnginePass:
    """What an engine returns for a batch.

    Attributes:
        logits: ``[N, num_classes]`` in the network's dtype.
        decisions: all gates' decisions and the LSTM's last state.
    """

    logits: Tensor
    decisions: Decisions

    @classmethod
    def joined(cls, passes: list[EnginePass]) -> EnginePass:
        """Passes over the parts of a batch as one over the whole."""
        decisions = [part.decisions for part in passes]
        fields = {name: torch.cat([getattr(part, name) for part in decisions], dim=axis)
                  for name, axis in (("gate_logits", 1), ("probabilities", 1), ("executed", 1), ("hidden", 0),
                                     ("cell", 0))}
        return cls(torch.cat([part.logits for part in passes]), Decisions(**fields, forced=None))


class Engine(ABC):
    """A way of executing packed networks. Immutable once built, so that threads can share it.

    Attributes:
        name: as in ``srt.compile(model, engine=name)``.
        devices: device types it runs on; None: any that torch has.
        dtypes: of networks it runs.
        image_dtypes: that ``run`` takes whatever the network's own, and rounds to it itself.
        synchronizes_on: device types on which a call waits for the device (promise 4 does not hold there).
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...] | None]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    image_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    synchronizes_on: ClassVar[tuple[str, ...]] = ()

    def __init__(self, network: PackedNetwork) -> None:
        self.network = network

    @classmethod
    def availability(cls) -> Availability:
        """Whether this machine can run the engine."""
        return Availability(True)

    @classmethod
    def unsupported_reason(cls, architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the engine would not take such a network, or None."""
        if not (status := cls.availability()):
            return f"it is {status}"
        if cls.devices is not None and device.type not in cls.devices:
            return f"it runs on {' or '.join(cls.devices)}, not on {device.type}"
        if dtype not in cls.dtypes:
            return f"it computes in {' or '.join(str(known) for known in cls.dtypes)}, not in {dtype}"
        return None

    @property
    def memory(self) -> int:
        """Bytes of the device's memory that it holds; see :attr:`skipnet_rt.SkipNetRuntime.memory`."""
        return self.network.nbytes

    @abstractmethod
    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        """From images to logits.

        Args:
            images: ``[N, in_channels, H, W]``, N >= 1, in the network's dtype or one of :attr:`image_dtypes`, on its
                device, contiguous.
            forced: bool ``[G, N]`` of any strides, decisions that replace the gates' own; None lets the gates decide.
            num_gates: gates to evaluate: G, or G + 1 where the last one's probabilities are wanted too.
        """


Activation = TypeVar("Activation")
"""What an engine passes from block to block, in a layout of its own."""

Rows = TypeVar("Rows")
"""How an engine lists images: int64 ``[count]``, say, or a longer list with the count beside it on the device."""


class BlockwiseEngine(Engine, Generic[Activation, Rows]):
    """An engine that goes block by block; it fills in the phases."""

    @abstractmethod
    def all_rows(self, decisions: Decisions) -> Rows:
        """The list of all images."""

    @abstractmethod
    def stem(self, images: Tensor) -> Activation:
        """Images ``[N, C, H, W]`` to the first block's input."""

    @abstractmethod
    def gate_step(self, index: int, x: Activation, decisions: Decisions) -> None:
        """Pool block ``index``'s output, embed, advance the LSTM, decide: fills row ``index`` of the decisions."""

    @abstractmethod
    def compact(self, index: int, decisions: Decisions) -> Rows:
        """The images that gate ``index`` lets execute, in order."""

    @abstractmethod
    def run_block(self, index: int, x: Activation, rows: Rows) -> Activation:
        """Run block ``index`` for the images in ``rows``; the others take its shortcut. May work in place on ``x``."""

    @abstractmethod
    def head(self, x: Activation) -> Tensor:
        """Global average pool and classifier: logits ``[N, num_classes]``."""

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        return self.forward(images, empty_decisions(self.network, len(images), num_gates, forced))

    def forward(self, images: Tensor, decisions: Decisions) -> EnginePass:
        """From images to logits through every phase; the decisions come empty and are filled on the way."""
        architecture, num_gates = self.network.arch, len(decisions.executed)
        all_rows = self.all_rows(decisions)
        x = self.run_block(0, self.stem(images), all_rows)
        for index in range(1, architecture.num_blocks):
            rows = all_rows
            if architecture.gated:
                self.gate_step(index - 1, x, decisions)
                rows = self.compact(index - 1, decisions)
            x = self.run_block(index, x, rows)
        if num_gates > architecture.num_gates:
            self.gate_step(architecture.num_gates, x, decisions)
        return EnginePass(self.head(x), decisions)
