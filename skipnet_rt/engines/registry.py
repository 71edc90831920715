"""The registry of engines, best first."""

from __future__ import annotations

import torch

from skipnet_rt.engines import autoselect
from skipnet_rt.engines.base import Availability, Engine
from skipnet_rt.engines.cpu import CpuEngine
from skipnet_rt.engines.cuda import CudaEngine
from skipnet_rt.engines.eager import EagerEngine
from skipnet_rt.engines.triton import TritonEngine
from skipnet_rt.model.arch import SkipNetArch

REGISTRY: dict[str, type[Engine]] = {
    engine.name: engine for engine in (CudaEngine, CpuEngine, TritonEngine, EagerEngine)}
"""Engines by name, in the order in which ``"auto"`` prefers them where they have not been measured."""


class EngineError(ValueError):
    """An engine that does not exist, cannot run here, or would not take the network."""


def engines() -> dict[str, Availability]:
    """Every engine's name, and whether this machine can run it; if not, why not."""
    return {name: engine.availability() for name, engine in REGISTRY.items()}


def choose_engine(name: str, architecture: SkipNetArch, device: torch.device, dtype: torch.dtype,
                  max_batch: int | None = None) -> type[Engine]:
    """The engine of a name, or for ``"auto"`` the first that takes the network on this device in this dtype.

    The order is the measured one, for batches up to ``max_batch``, where there is one (autoselect.py), then the
    registry's.

    Raises:
        EngineError: no such engine, or none that takes it; the message says why not, engine by engine.
    """
    if name != "auto" and name not in REGISTRY:
        raise EngineError(f"no engine is called {name!r}; known: auto, {', '.join(REGISTRY)}")
    names = [*_measured_order(architecture, device, dtype, max_batch), *REGISTRY] if name == "auto" else [name]
    reasons = []
    for candidate in (REGISTRY[name] for name in dict.fromkeys(names)):
        reason = candidate.unsupported_reason(architecture, device, dtype)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise EngineError(f"no engine for {architecture} on {device} in {dtype}: {'; '.join(reasons)}")


def _measured_order(architecture: SkipNetArch, device: torch.device, dtype: torch.dtype,
                    max_batch: int | None) -> list[str]:
    try:
        times = autoselect.load(architecture, device, dtype)
    except autoselect.CrossoverError as error:
        raise EngineError(str(error)) from error
    return [name for name in autoselect.fastest_first(times, max_batch) if name in REGISTRY] if times else []
