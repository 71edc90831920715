"""The registry of engines, best first."""

from __future__ import annotations

import torch

from skipnet_rt.arch import SkipNetArch
from skipnet_rt.engines.cpu import CpuEngine
from skipnet_rt.engines.cuda import CudaEngine
from skipnet_rt.engines.eager import EagerEngine
from skipnet_rt.engines.engine import Availability, Engine
from skipnet_rt.engines.triton import TritonEngine

REGISTRY: dict[str, type[Engine]] = {
    engine.name: engine for engine in (CudaEngine, CpuEngine, TritonEngine, EagerEngine)}
"""Engines by name, in the order in which ``"auto"`` prefers them."""


class EngineError(ValueError):
    """An engine that does not exist, cannot run here, or would not take the network."""


def engines() -> dict[str, Availability]:
    """Every engine's name, and whether this machine can run it; if not, why not."""
    return {name: engine.availability() for name, engine in REGISTRY.items()}


def choose_engine(name: str, architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> type[Engine]:
    """The engine of a name, or for ``"auto"`` the first that takes the network on this device in this dtype.

    Raises:
        EngineError: no such engine, or none that takes it; the message says why not, engine by engine.
    """
    if name != "auto" and name not in REGISTRY:
        raise EngineError(f"no engine is called {name!r}; known: auto, {', '.join(REGISTRY)}")
    asked = REGISTRY if name == "auto" else {name: REGISTRY[name]}
    objections = []
    for candidate in asked.values():
        objection = candidate.objection(architecture, device, dtype)
        if objection is None:
            return candidate
        objections.append(f"{candidate.name}: {objection}")
    raise EngineError(f"no engine for {architecture} on {device} in {dtype}: {'; '.join(objections)}")
