"""Our engines beside dense engines, in one run: what skipping saves, and how near that comes to what it could.

The figure of merit is the **share of the FLOP ceiling**: (the fastest dense engine's time x the executed share of the
multiply-adds) / our time. 100 % means that every skipped block is a saving in full; more means that our kernels beat
that engine's, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skipnet_rt.engines.autoselect import Crossover
from skipnet_rt.engines.registry import REGISTRY
from skipnet_rt.measure.baselines import PEERS, PUBLISHED_WAY, Peer
from skipnet_rt.measure.clock import Timing, alternate
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.routing import RoutingStats
from skipnet_rt.runtime import compile, usable_device
from skipnet_rt.util import machine

BATCHES = (1, 8, 64)
FRACTIONS = (0.5, 1.0)


class BenchmarkError(ValueError):
    """What was asked for cannot be measured; the message says why."""


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
    # The ranks of random numbers are a random order of 0 to G - 1 in every row.
    ranks = torch.rand(batch, gates, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return ranks < round(fraction * gates)


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

    @property
    def name(self) -> str:
        """As in tables."""
        return _name(self.engine, self.fraction)

    def share_of_ceiling(self, dense: Timing) -> float:
        """The figure of merit against a dense engine, 1 for 100 %: median over the rounds."""
        return self.multiply_adds_share * self.timing.speedup_over(dense)


def _name(engine: str, fraction: float) -> str:
    return f"{engine}, {100 * fraction:.3g}% executed"


@dataclass(frozen=True)
class BatchResult:
    """All contestants at one batch size, timed in turns.

    Attributes:
        batch: images a batch.
        ours: our engines, each at every fraction.
        peers: the others, by name.
        wall: on a GPU, where the other timings are the device's own: everyone's by the host's clock, by name.
    """

    batch: int
    ours: tuple[Contestant, ...]
    peers: dict[str, Timing]
    wall: dict[str, Timing] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """Name of the fastest dense peer."""
        return min(self.peers.keys() - {PUBLISHED_WAY.name}, key=lambda name: self.peers[name].median)

    @property
    def best_dense(self) -> Timing:
        """The fastest dense peer's time: executing everything, the ceiling."""
        return self.peers[self.best]

    @property
    def published(self) -> Timing | None:
        """The published way's time, if it was measured."""
        return self.peers.get(PUBLISHED_WAY.name)

    @property
    def rounds(self) -> int:
        """How often each contestant was timed."""
        return len(self.best_dense.seconds)

    @property
    def steady(self) -> bool:
        """No contestant's times vary much; see :attr:`Timing.steady`."""
        return all(timing.steady for timing in (*self.peers.values(), *(one.timing for one in self.ours)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: times in milliseconds, shares in percent, ratios as medians over the rounds."""
        return {
            "batch": self.batch, "rounds": self.rounds, "steady": self.steady, "best_dense": self.best,
            "peers": {name: timing.to_dict() for name, timing in self.peers.items()},
            "engines": [{
                "engine": one.engine, "fraction": one.fraction,
                "multiply_adds_share": 100 * one.multiply_adds_share, "time": one.timing.to_dict(),
                "share_of_ceiling": 100 * one.share_of_ceiling(self.best_dense),
                "speedup_over": {name: one.timing.speedup_over(timing) for name, timing in self.peers.items()},
            } for one in self.ours],
        } | ({"wall": {name: timing.to_dict() for name, timing in self.wall.items()}} if self.wall else {})


@dataclass(frozen=True)
class Benchmark:
    """What :func:`benchmark` measured.

    Attributes:
        arch: of the network.
        dtype: of the computation.
        versions, cpu, load: of the machine, before the first measurement; see :mod:`skipnet_rt.util.machine`.
        left_out: peers that could not be measured, and why.
        results: one for each batch size.
        gpu: that was measured, after the last measurement; None where it was the CPU.
    """

    arch: SkipNetArch
    dtype: torch.dtype
    versions: dict[str, str | None]
    cpu: dict[str, Any]
    load: float | None
    left_out: dict[str, str]
    results: tuple[BatchResult, ...]
    gpu: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        """The GPU's name, or how many of the CPU's threads there were."""
        threads = self.cpu["threads"]
        return self.gpu["name"] if self.gpu else f"{threads} thread{'s' * (threads > 1)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the units are those of the results."""
        return {
            "architecture": str(self.arch), "dtype": str(self.dtype).removeprefix("torch."), "versions": self.versions,
            "cpu": self.cpu, "load": self.load, "left_out": self.left_out,
            "results": [result.to_dict() for result in self.results],
        } | ({"gpu": self.gpu} if self.gpu else {})


def benchmark(model: SkipNet, *, engines: Sequence[str] = ("auto",), batches: Sequence[int] = BATCHES,
              fractions: Sequence[float] = FRACTIONS, dtype: torch.dtype = torch.float32,
              peers: Sequence[Peer] = PEERS, seconds: float = 10.0, device: torch.device | str = "cpu",
              on_progress: Callable[[str, float], None] | None = None) -> Benchmark:
    """Time our engines and the peers on seeded random images with forced routes.

    Args:
        model: a gated network on the CPU. Its weights hardly matter: images and routes are the same for all.
        engines: ours.
        batches, fractions: what to measure; see :func:`random_routing`.
        dtype: of the computation. On the CPU images are float32, and converted by each contestant; on a GPU they are
            there, in this dtype.
        peers: to measure against; those that object are left out.
        seconds: for each batch size.
        device: the CPU, or a GPU: then by its own clock, and once more by the host's.
        on_progress: told what is being done and the share of it that is done, 0 to 1.

    Raises:
        BenchmarkError: the network has no gates, or no dense peer is left.
        skipnet_rt.EngineError: an engine cannot take the network, or the device cannot be used.
    """
    report = on_progress or (lambda what, share: None)
    place = usable_device(device)
    on_gpu = place.type == "cuda"
    left_out = {peer.name: objection for peer in peers
                if (objection := peer.objection(dtype, place.type)) is not None}
    measured = [peer for peer in peers if peer.name not in left_out]
    if not model.arch.gated:
        raise BenchmarkError(f"{model.arch} is a dense network: it has nothing to skip")
    if not any(peer is not PUBLISHED_WAY for peer in measured):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise BenchmarkError("there is no dense engine to measure against" + (f" ({reasons})" if reasons else ""))
    versions, cpu, load = machine.versions(), machine.cpu(), machine.load()
    runtimes = [compile(model, engine=engine, device=place, dtype=dtype) for engine in engines]
    results = []
    for batch in batches:
        shape = (batch, model.arch.in_channels, *model.arch.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(batch))
        images = images.to(place, dtype) if on_gpu else images
        calls: dict[str, Callable[[], object]] = {}
        for number, peer in enumerate(measured):
            report(f"batch {batch}: building {peer.name}", number / len(measured))
            calls[peer.name] = partial(peer.build(model, images, dtype), images)
        ours: dict[str, tuple[str, float, float]] = {}
        for fraction in fractions:
            routing = random_routing(model.arch, batch, fraction)
            stats = RoutingStats(model.arch)
            stats.update(routing)
            routing = routing.to(place)
            for runtime in runtimes:
                name = _name(runtime.engine.name, fraction)
                calls[name] = partial(runtime.infer, images, routing=routing)
                ours[name] = runtime.engine.name, fraction, stats.multiply_adds_share
        timings = alternate(calls, seconds=seconds, device=place, device_time=on_gpu,
                            on_progress=partial(report, f"batch {batch}: {len(calls)} contestants taking turns"))
        wall = alternate(calls, seconds=seconds, device=place) if on_gpu else {}
        results.append(BatchResult(batch, tuple(Contestant(*ours[name], timings[name]) for name in ours),
                                   {peer.name: timings[peer.name] for peer in measured}, wall))
    return Benchmark(model.arch, dtype, versions, cpu, load, left_out, tuple(results), machine.gpu(place))


def unwaiting_engines(architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of those of our engines that take a network there without waiting for the device."""
    return [name for name, engine in REGISTRY.items()
            if device.type not in engine.synchronizes_on
            and engine.unsupported_reason(architecture, device, dtype) is None]


def measure_crossover(model: SkipNet, device: torch.device, dtype: torch.dtype, *,
                      batches: Sequence[int] = (1, 8, 64, 256),
                      fractions: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
                      seconds: float = 5.0, on_progress: Callable[[float], None] | None = None) -> Crossover:
    """Time those of our engines against each other that take a network without waiting for the device.

    Args:
        model: a gated network; its weights do not matter.
        device, dtype: where and in what to compute.
        batches, fractions: what to measure; see :func:`random_routing`.
        seconds: for each batch size.
        on_progress: told the share that is done, 0 to 1.

    Raises:
        BenchmarkError: the network has no gates, or no engine takes it there.
    """
    if not model.arch.gated:
        raise BenchmarkError(f"{model.arch} is a dense network: it has nothing to skip")
    names = unwaiting_engines(model.arch, device, dtype)
    if not names:
        raise BenchmarkError(f"no engine takes {model.arch} on {device} in {dtype}")
    runtimes = {name: compile(model, engine=name, device=device, dtype=dtype) for name in names}
    found: dict[str, dict[int, dict[float, float]]] = {name: {} for name in names}
    for number, batch in enumerate(batches):
        images = torch.randn(batch, model.arch.in_channels, *model.arch.image_size).to(device, dtype)
        routes = {fraction: random_routing(model.arch, batch, fraction).to(device) for fraction in fractions}
        calls: dict[str, Callable[[], object]] = {
            _name(name, fraction): partial(runtime.infer, images, routing=routing)
            for name, runtime in runtimes.items() for fraction, routing in routes.items()}
        timings = alternate(calls, seconds=seconds, device=device)
        for name in names:
            found[name][batch] = {fraction: 1e3 * timings[_name(name, fraction)].median for fraction in fractions}
        if on_progress:
            on_progress((number + 1) / len(batches))
    return Crossover(found)
