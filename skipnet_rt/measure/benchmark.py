"""Our engines beside dense engines, in one run: what skipping saves, and how near that comes to what it could.

The figure of merit is the **share of the FLOP ceiling**: (the fastest dense engine's time x the executed share of the
multiply-adds) / our time. 100 % means that every skipped block is a saving in full; more means that our kernels beat
that engine's, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from skipnet_rt.engines.autoselect import Milliseconds
from skipnet_rt.engines.registry import REGISTRY
from skipnet_rt.measure.baselines import BASELINES, MASKED, Baseline
from skipnet_rt.measure.clock import Timing, time_interleaved
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.network import SkipNet, build
from skipnet_rt.model.routing import RoutingStats
from skipnet_rt.runtime import SkipNetRuntime, compile, usable_device
from skipnet_rt.util import machine

BATCHES = (1, 8, 64)
FRACTIONS = (0.5, 1.0)

GPU_ROUTES = 7
"""Odd, because every timed call follows an untimed one of its kind: all of them are timed."""


class BenchmarkError(ValueError):
    """What was asked for cannot be measured; the message says why."""


def random_network(architecture: str | SkipNetArch) -> SkipNet:
    """A network to measure: fresh weights, in evaluation mode, whose activations are as large as a trained one's.

    As built, every block doubles the variance of what comes in, so that deep networks leave float16's range, and what
    would be timed is NaN and infinity. Here all blocks together add as much as one, by their last normalisation.

    Args:
        architecture: a published name, or any.
    """
    model = build(architecture).eval()
    for plan in model.arch.blocks:
        block = model.block(plan)
        last = block.bn3 if plan.kind == "bottleneck" else block.bn2
        nn.init.constant_(last.weight, model.arch.num_blocks ** -0.5)
    return model


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
class EngineResult:
    """One of our engines on one kind of routes.

    Attributes:
        engine: its name.
        fraction: of the gated blocks that were executed; None where the gates decided.
        multiply_adds_share: of the multiply-adds of the dense network, gates included.
        timing: per batch.
    """

    engine: str
    fraction: float | None
    multiply_adds_share: float
    timing: Timing

    @property
    def name(self) -> str:
        """As in tables."""
        return _name(self.engine, self.fraction)

    def share_of_ceiling(self, dense: Timing) -> float:
        """The figure of merit against a dense engine, 1 for 100 %: median over the rounds."""
        return self.multiply_adds_share * self.timing.speedup_over(dense)

    def fast_share_of_ceiling(self, dense: Timing) -> float:
        """The same by both's fast quartiles: steadier where others use the machine."""
        return self.multiply_adds_share * dense.fast_quartile / self.timing.fast_quartile


def scaling(result: BatchResult) -> list[str]:
    """A line for each of our engines, kind of routes and number of threads: how many times faster all of them are."""
    return [f"{_with_threads(fewer.name, threads)}: "
            f"{result.of(fewer.engine, fewer.fraction).timing.speedup_over(fewer.timing):.2f} times as long "
            f"({fewer.timing.fast_quartile / result.of(fewer.engine, fewer.fraction).timing.fast_quartile:.2f} by the "
            "fast quartiles)" for threads, results in result.fewer_threads.items() for fewer in results]


def _name(engine: str, fraction: float | None) -> str:
    return f"{engine}, {'gates decide' if fraction is None else f'{100 * fraction:.3g}% executed'}"


@dataclass(frozen=True)
class BatchResult:
    """Engines and baselines at one batch size, timed in turns.

    Attributes:
        batch: images per batch.
        engines: ours, each on every kind of routes.
        baselines: the others, by name.
        wall: on a GPU, where the other timings are the device's own: all of them by the host's clock, by name.
        fewer_threads: our engines with fewer threads than all others had, by their number.
    """

    batch: int
    engines: tuple[EngineResult, ...]
    baselines: dict[str, Timing]
    wall: dict[str, Timing] = field(default_factory=dict)
    fewer_threads: dict[int, tuple[EngineResult, ...]] = field(default_factory=dict)

    @property
    def engine_names(self) -> list[str]:
        """Of our engines, each once."""
        return list(dict.fromkeys(result.engine for result in self.engines))

    def of(self, engine: str, fraction: float | None) -> EngineResult:
        """One engine's result on one kind of routes."""
        return next(result for result in self.engines if (result.engine, result.fraction) == (engine, fraction))

    @property
    def best(self) -> str:
        """Name of the fastest dense baseline."""
        return min(self.baselines.keys() - {MASKED.name}, key=lambda name: self.baselines[name].median)

    @property
    def best_dense(self) -> Timing:
        """The fastest dense baseline's time: executing everything, the ceiling."""
        return self.baselines[self.best]

    @property
    def masked(self) -> Timing | None:
        """The masked baseline's time, if it was measured."""
        return self.baselines.get(MASKED.name)

    @property
    def winners(self) -> dict[float | None, str]:
        """Our fastest engine, by executed fraction."""
        fastest_last = sorted(self.engines, key=lambda result: -result.timing.median)
        return {result.fraction: result.engine for result in fastest_last}

    @property
    def rounds(self) -> int:
        """How often each of them was timed."""
        return len(self.engines[0].timing.seconds)

    @property
    def steady(self) -> bool:
        """No times vary much; see :attr:`Timing.steady`."""
        ours = (*self.engines, *(each for results in self.fewer_threads.values() for each in results))
        return all(timing.steady for timing in (*self.baselines.values(), *(each.timing for each in ours)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: times in milliseconds, shares in percent, ratios as medians over the rounds."""
        return {
            "batch": self.batch, "rounds": self.rounds, "steady": self.steady, "best_dense": self.best,
            "baselines": {name: timing.to_dict() for name, timing in self.baselines.items()},
            "engines": [{
                "engine": result.engine, "fraction": result.fraction,
                "multiply_adds_share": 100 * result.multiply_adds_share, "time": result.timing.to_dict(),
                "share_of_ceiling": 100 * result.share_of_ceiling(self.best_dense),
                "fast_share_of_ceiling": 100 * result.fast_share_of_ceiling(self.best_dense),
                "speedup_over": {name: result.timing.speedup_over(timing) for name, timing in self.baselines.items()},
            } for result in self.engines],
        } | ({"wall": {name: timing.to_dict() for name, timing in self.wall.items()}} if self.wall else {}) | ({
            "fewer_threads": [{
                "threads": threads, "engine": fewer.engine, "fraction": fewer.fraction, "time": fewer.timing.to_dict(),
                "scaling": self.of(fewer.engine, fewer.fraction).timing.speedup_over(fewer.timing),
            } for threads, results in self.fewer_threads.items() for fewer in results]} if self.fewer_threads else {})


@dataclass(frozen=True)
class Benchmark:
    """What :func:`benchmark` measured.

    Attributes:
        arch: of the network.
        device, dtype: of the computation.
        versions, cpu, load: of the machine, before the first measurement; see :mod:`skipnet_rt.util.machine`.
        left_out: baselines that could not be measured, and why.
        results: one for each batch size.
        gpu: that was measured, after the last measurement; None where it was the CPU.
    """

    arch: SkipNetArch
    device: torch.device
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

    @property
    def milliseconds(self) -> Milliseconds:
        """Medians per batch, by our engine, batch size and forced fraction: what ``"auto"`` goes by."""
        times: Milliseconds = {}
        for result in self.results:
            for each in result.engines:
                if each.fraction is not None:
                    by_fraction = times.setdefault(each.engine, {}).setdefault(result.batch, {})
                    by_fraction[each.fraction] = 1e3 * each.timing.median
        return times

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the units are those of the results."""
        return {
            "architecture": str(self.arch), "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."), "versions": self.versions,
            "cpu": self.cpu, "load": self.load, "left_out": self.left_out,
            "results": [result.to_dict() for result in self.results],
        } | ({"gpu": self.gpu} if self.gpu else {})


def benchmark(model: SkipNet, *, engines: Sequence[str] = ("auto",), batches: Sequence[int] = BATCHES,
              fractions: Sequence[float | None] = FRACTIONS, dtype: torch.dtype = torch.float32,
              baselines: Sequence[Baseline] | None = BASELINES, seconds: float = 10.0,
              device: torch.device | str = "cpu", images: Tensor | None = None, device_clock: bool = True,
              routes: int | None = None, fewer_threads: Sequence[int] = (),
              on_progress: Callable[[str, float], None] | None = None) -> Benchmark:
    """Time our engines and the baselines against each other.

    Args:
        model: a gated network on the CPU. Its weights hardly matter where images are random and routes forced, as long
            as activations stay finite; see :func:`random_network`.
        engines: ours.
        batches: their sizes.
        fractions: of the gated blocks to execute, see :func:`random_routing`; None lets the gates decide.
        dtype: of the computation. On the CPU images are float32, and converted by whoever computes; on a GPU they are
            there, in this dtype.
        baselines: to measure against; those that cannot be measured here are left out. None times our engines alone.
        seconds: for each batch size.
        device: the CPU, or a GPU.
        images: float32 ``[N, in_channels, H, W]``, N a multiple of every batch size: each call goes through all of
            them batch by batch. Otherwise one batch of random ones, seeded.
        device_clock: on a GPU, time by its own clock, and once more by the host's; else by the host's alone.
        routes: of each forced fraction where images are random; calls take them in turns. By default one on the CPU and
            :data:`GPU_ROUTES` on a GPU, whose cache may hold the weights of one route, though not of the whole network.
        fewer_threads: numbers below PyTorch's, with which our engines are timed as well, to show how they scale.
        on_progress: told what is being done and the share of it that is done, 0 to 1.

    Raises:
        BenchmarkError: the network has no gates, or none of the baselines is a dense one that can be measured.
        skipnet_rt.EngineError: an engine cannot take the network, or the device cannot be used.
        ValueError: the images don't fill whole batches.
    """
    report = on_progress or (lambda what, share: None)
    place = usable_device(device)
    by_device = place.type == "cuda" and device_clock
    variety = routes or (GPU_ROUTES if place.type == "cuda" else 1)
    if not model.arch.gated:
        raise BenchmarkError(f"{model.arch} is a dense network: it has nothing to skip")
    left_out = {baseline.name: reason for baseline in baselines or ()
                if (reason := baseline.unsupported_reason(dtype, place.type)) is not None}
    measured = [baseline for baseline in baselines or () if baseline.name not in left_out]
    if baselines is not None and all(baseline is MASKED for baseline in measured):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise BenchmarkError("there is no dense engine to measure against" + (f" ({reasons})" if reasons else ""))
    versions, cpu, load = machine.versions(), machine.cpu(), machine.load()
    runtimes = [compile(model, engine=engine, device=place, dtype=dtype) for engine in engines]
    results = []
    for batch in batches:
        parts = _batches(model.arch, batch, images)
        if place.type == "cuda":
            parts = [part.to(place, dtype) for part in parts]
        calls: dict[str, Callable[[], object]] = {}
        for number, baseline in enumerate(measured):
            report(f"batch {batch}: building {baseline.name}", number / len(measured))
            calls[baseline.name] = _over(parts, baseline.build(model, parts[0], dtype))
        ours: dict[str, tuple[str, float | None, float]] = {}
        most_threads = torch.get_num_threads()
        for fraction in fractions:
            taken = _routes(runtimes[0], parts, fraction, variety if images is None else 1)
            share = _multiply_adds_share(model.arch, taken)
            for runtime in runtimes:
                name = _name(runtime.engine.name, fraction)
                if fraction is None:
                    calls[name] = _over(parts, runtime.infer)
                elif images is None:
                    calls[name] = in_turn(runtime.infer, [(parts[0], route) for route in taken])
                else:
                    calls[name] = _over(parts, runtime.infer, taken)
                ours[name] = runtime.engine.name, fraction, share
        for number in fewer_threads:
            for name in ours:
                calls[_with_threads(name, number)] = partial(_call_with, number, most_threads, calls[name])
        timings = time_interleaved(calls, seconds=seconds, device=place, device_time=by_device, per=len(parts),
                                   on_progress=partial(report, f"batch {batch}: timing {len(calls)} in turns"))
        wall = time_interleaved(calls, seconds=seconds, device=place, per=len(parts)) if by_device else {}
        results.append(BatchResult(
            batch, tuple(EngineResult(*what, timings[name]) for name, what in ours.items()),
            {baseline.name: timings[baseline.name] for baseline in measured}, wall,
            {number: tuple(EngineResult(*what, timings[_with_threads(name, number)]) for name, what in ours.items())
             for number in fewer_threads}))
    return Benchmark(model.arch, place, dtype, versions, cpu, load, left_out, tuple(results), machine.gpu(place))


def _with_threads(name: str, number: int) -> str:
    return f"{name}, {number} thread{'s' * (number > 1)}"


def _call_with(threads: int, most: int, call: Callable[[], object]) -> None:
    torch.set_num_threads(threads)
    try:
        call()
    finally:
        torch.set_num_threads(most)


def _batches(architecture: SkipNetArch, batch: int, images: Tensor | None) -> list[Tensor]:
    """The images in batches; without any, one of random ones."""
    if images is None:
        shape = (batch, architecture.in_channels, *architecture.image_size)
        return [torch.randn(shape, generator=torch.Generator().manual_seed(batch))]
    if len(images) == 0 or len(images) % batch:
        raise ValueError(f"images must fill whole batches of {batch}, got {len(images)}")
    return list(torch.split(images, batch))


def _routes(runtime: SkipNetRuntime, parts: Sequence[Tensor], fraction: float | None, variety: int) -> list[Tensor]:
    """The routes of each batch, bool ``[batch, G]``: the gates' own, or so many forced ones."""
    if fraction is None:
        return [runtime.infer(part).executed for part in parts]
    forced = random_routing(runtime.arch, variety * sum(map(len, parts)), fraction).to(parts[0].device)
    return list(torch.split(forced, len(parts[0])))


def _multiply_adds_share(architecture: SkipNetArch, routes: Sequence[Tensor]) -> float:
    stats = RoutingStats(architecture)
    for route in routes:
        stats.update(route)
    return stats.multiply_adds_share


def _over(parts: Sequence[Tensor], run: Callable[..., object], routes: Sequence[Tensor] | None = None
          ) -> Callable[[], object]:
    """A call that goes through all batches."""
    arguments = [(part,) for part in parts] if routes is None else list(zip(parts, routes, strict=True))
    return lambda: [run(*each) for each in arguments]


def in_turn(run: Callable[..., object], arguments: Sequence[tuple[Any, ...]]) -> Callable[[], object]:
    """A call that takes the next of some arguments every time."""
    following = cycle(arguments)
    return lambda: run(*next(following))


def supporting_engines(architecture: SkipNetArch, device: torch.device, dtype: torch.dtype, *,
                       asynchronous: bool = False) -> list[str]:
    """Names of those of our engines that take a network there.

    Args:
        architecture, device, dtype: what and where.
        asynchronous: only those that don't wait for the device.
    """
    return [name for name, engine in REGISTRY.items()
            if engine.unsupported_reason(architecture, device, dtype) is None
            and not (asynchronous and device.type in engine.synchronizes_on)]


def measure_crossover(model: SkipNet, device: torch.device, dtype: torch.dtype, *,
                      batches: Sequence[int] = (1, 8, 64, 256),
                      fractions: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), seconds: float = 5.0,
                      device_clock: bool = False,
                      on_progress: Callable[[str, float], None] | None = None) -> Benchmark:
    """Time those of our engines against each other that take a network without waiting for the device.

    Args:
        model: a gated network; its weights do not matter.
        device, dtype: where and in what to compute.
        batches, fractions, seconds, device_clock, on_progress: see :func:`benchmark`.

    Raises:
        BenchmarkError: the network has no gates, or no engine takes it there.
    """
    engines = supporting_engines(model.arch, device, dtype, asynchronous=True)
    if not engines:
        raise BenchmarkError(f"no engine takes {model.arch} on {device} in {dtype}")
    return benchmark(model, engines=engines, batches=batches, fractions=fractions, dtype=dtype, baselines=None,
                     seconds=seconds, device=device, device_clock=device_clock, on_progress=on_progress)
