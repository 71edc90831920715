"""Our engines beside dense engines, in one run: what skipping saves, and how near that comes to what it could.

The figure of merit is the **share of the FLOP ceiling**: (the fastest dense engine's time x the executed fraction of
the multiply-adds) / our time. 100 % means that every skipped block is a saving in full; more means that our kernels
beat that engine's, too.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from skipnet_rt.arch import SkipNetArch
from skipnet_rt.model import SkipNet
from skipnet_rt.peers import PEERS, Peer
from skipnet_rt.routing import count_operations
from skipnet_rt.runtime import compile
from skipnet_rt.timing import Timing, alternate


def random_routing(architecture: SkipNetArch, batch: int, fraction: float, seed: int = 0) -> Tensor:
    """Decisions that differ from image to image and execute the same number of gated blocks in each.

    Args:
        architecture: of the network.
        batch: images.
        fraction: of the gated blocks to execute, 0 to 1, rounded to whole blocks.
        seed: of the choice.

    Returns:
        bool ``[batch, G]``.
    """
    gates = architecture.num_gates
    order = torch.rand(batch, gates, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < round(fraction * gates)


@dataclass(frozen=True)
class Contestant:
    """One of our engines at one executed fraction.

    Attributes:
        engine: its name.
        fraction: of the gated blocks that were executed.
        multiply_adds_share: of the multiply-adds of the dense network, gates included.
        timing: of a batch.
    """

    engine: str
    fraction: float
    multiply_adds_share: float
    timing: Timing

    def share_of_ceiling(self, dense: Timing) -> float:
        """The figure of merit against a dense engine, 1 for 100 %: median over the rounds."""
        return self.multiply_adds_share * self.timing.speedup_over(dense)


@dataclass(frozen=True)
class BatchResult:
    """All contestants at one batch size, timed in turns.

    Attributes:
        batch: images a batch.
        ours: our engines, each at every fraction.
        peers: the others, dense, by name.
        best: name of the fastest dense peer.
    """

    batch: int
    ours: tuple[Contestant, ...]
    peers: dict[str, Timing]
    best: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON: times in milliseconds, ratios as medians over the rounds."""
        return {
            "batch": self.batch, "best_dense": self.best, "rounds": len(self.peers[self.best].seconds),
            "dense": {name: timing.to_dict() for name, timing in self.peers.items()},
            "engines": [{
                "engine": one.engine, "fraction": one.fraction, "multiply_adds_share": one.multiply_adds_share,
                "time": one.timing.to_dict(),
                "share_of_ceiling": one.share_of_ceiling(self.peers[self.best]),
                "speedup_over": {name: one.timing.speedup_over(timing) for name, timing in self.peers.items()},
            } for one in self.ours],
        }


def benchmark(model: SkipNet, *, engines: Sequence[str], batches: Sequence[int], fractions: Sequence[float],
              dtype: torch.dtype = torch.float32, peers: Sequence[Peer] = PEERS, seconds: float = 5.0,
              on_progress: Callable[[str], None] | None = None) -> list[BatchResult]:
    """Time our engines and the peers on the CPU, on seeded random images with forced routes.

    Args:
        model: a gated network.
        engines: ours.
        batches, fractions: what to measure; see :func:`random_routing`.
        dtype: of the computation; images are float32, and converted by each contestant.
        peers: those that object are left out.
        seconds: for each batch size.
        on_progress: told what is being done.
    """
    report = on_progress or (lambda text: None)
    results = []
    for batch in batches:
        shape = (batch, model.arch.in_channels, *model.arch.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(batch))
        calls: dict[str, Callable[[], object]] = {}
        for peer in peers:
            if peer.objection(dtype) is None:
                report(f"batch {batch}: building {peer.name}")
                calls[peer.name] = partial(peer.build(model, images, dtype), images)
        dense = list(calls)
        ours: dict[str, tuple[str, float, float]] = {}
        for engine in engines:
            runtime = compile(model, engine=engine, dtype=dtype)
            for fraction in fractions:
                routing = random_routing(model.arch, batch, fraction)
                name = f"{engine} at {fraction:g}"
                calls[name] = partial(runtime.infer, images, routing=routing)
                counts = count_operations(model.arch)
                share = counts.per_image(routing)[0].double().mean().item() / counts.dense.multiply_adds
                ours[name] = engine, fraction, share
        report(f"batch {batch}: timing {len(calls)} contestants in turns")
        timings = alternate(calls, seconds=seconds)
        results.append(BatchResult(
            batch, tuple(Contestant(*ours[name], timings[name]) for name in ours),
            {name: timings[name] for name in dense}, min(dense, key=lambda name: timings[name].median)))
    return results


def environment() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions."""
    versions = {}
    for package in ("skipnet-rt", "torch", "openvino", "onnxruntime", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "python": platform.python_version(),
            "system": platform.platform(), "versions": versions}


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def summary(results: Sequence[BatchResult]) -> dict[str, float]:
    """Median share of the ceiling over all batch sizes, by engine and fraction."""
    shares: dict[str, list[float]] = {}
    for result in results:
        for one in result.ours:
            shares.setdefault(f"{one.engine} at {one.fraction:g}", []).append(
                one.share_of_ceiling(result.peers[result.best]))
    return {name: median(values) for name, values in shares.items()}
