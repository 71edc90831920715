"""Which engine is the fastest for a network on this machine: measured once, saved, and what ``"auto"`` goes by.

Engines differ in what a launch costs and in what a skipped block saves, so which one wins may depend on the batch and
on the executed share. :func:`skipnet_rt.measure.benchmark.measure_crossover` measures it,
``skipnet-rt doctor --warm`` saves it. Where nothing has been measured, ``"auto"`` goes by the registry's order.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from skipnet_rt import _C
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.util import cache, machine


class CrossoverError(ValueError):
    """A saved file that cannot be read; the message names it."""


Milliseconds = dict[str, dict[int, dict[float, float]]]
"""One network's times per batch, by engine, batch size and executed share of the gated blocks (0 to 1)."""


def fastest_first(times: Milliseconds, max_batch: int | None = None) -> list[str]:
    """The engines, by the geometric mean over executed shares and batch sizes.

    Args:
        times: of the engines.
        max_batch: leaves larger batches out (but for the smallest).
    """
    def mean(name: str) -> float:
        batches = times[name]
        counted = [batch for batch in batches if max_batch is None or batch <= max_batch] or [min(batches)]
        return geometric_mean(time for batch in counted for time in batches[batch].values())

    return sorted(times, key=mean)


def save(times: Milliseconds, architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> Path:
    """Save a network's times for this machine; returns the file."""
    identity = _identity(architecture, device, dtype)
    file = cache.path("crossover", identity)
    cache.save(file, {"identity": identity, "milliseconds": times})
    return file


def load(architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> Milliseconds | None:
    """A network's times on this machine; None if none were saved.

    Raises:
        CrossoverError: the file is damaged.
    """
    file = cache.path("crossover", _identity(architecture, device, dtype))
    try:
        engines = json.loads(file.read_text(encoding="utf-8"))["milliseconds"]
        return {name: {int(batch): {float(share): float(time) for share, time in times.items()}
                       for batch, times in batches.items()} for name, batches in engines.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CrossoverError(f"{file} holds no times of engines, delete it: {error!r}") from error


def _identity(architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All that times depend on; neither a network's name nor what its classes are."""
    versions = machine.versions()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu()["processor"]
    network = architecture.replace(name=None, stage="supervised").to_dict()
    return {"network": network, "dtype": str(dtype), "device": where, "cuda sources": _C.cuda_build,
            "versions": {name: versions[name] for name in ("skipnet-rt", "torch", "triton")}}
