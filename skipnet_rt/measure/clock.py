"""Fair timing: contestants take turns, round after round, so that whatever slows the machine down slows all of them.

Medians of single runs, taken minutes apart, mostly compare the machine's moods. Here every round times each contestant
once, in an order shuffled anew; ratios are formed within a round and only then reduced to their median.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipnet_rt.engines.registry import REGISTRY
from skipnet_rt.model.flops import count_operations
from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.packing import PackedConvolution, pack
from skipnet_rt.runtime import compile

MIN_ROUNDS = 3

_CYCLES = 2e9  # a GPU's clock ticks a second, at most

_PAUSE = 0.06  # seconds: before they sleep, ONNX Runtime's threads were seen to spin for 45 ms, PyTorch's for 11


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, one entry a round; entries of the same round belong together across contestants."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)

    def quantile(self, share: float) -> float:
        """Seconds that this share (0 to 1) of the rounds stayed below."""
        return float(np.quantile(self.seconds, share))

    def speedup_over(self, other: Timing) -> float:
        """How many times faster than ``other``: the median over the rounds of ``other / self``."""
        return median(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))

    @property
    def steady(self) -> bool:
        """The 80th percentile is not half as long again as the 20th: the machine had nothing else to do."""
        return self.quantile(0.8) <= 1.5 * self.quantile(0.2)

    def to_dict(self) -> dict[str, float]:
        """Milliseconds: ``median``, ``p20`` and ``p80``."""
        return {"median": 1e3 * self.median, "p20": 1e3 * self.quantile(0.2), "p80": 1e3 * self.quantile(0.8)}


def alternate(calls: Mapping[str, Callable[[], object]], *, seconds: float, device: torch.device | None = None,
              device_time: bool = False, per: int = 1,
              on_progress: Callable[[float], None] | None = None) -> dict[str, Timing]:
    """Time some calls against each other.

    Args:
        calls: the contestants. Each is called once beforehand to warm up, and once more, after a pause, right before
            every timed call: what is measured is neither the last contestant's threads, which go on spinning for a
            while, nor its data in the caches.
        seconds: how long to go on; there are at least :data:`MIN_ROUNDS` rounds, and with 0 no more.
        device: waited for before the clock is read, unless it is a CPU.
        device_time: read a CUDA device's own clock before and after a call's work, instead of ours.
        per: a call's time is divided by this: the number of batches it works off, say.
        on_progress: told the share of the time that has passed, after every round.
    """
    for call in calls.values():
        call()
    order, shuffled = list(calls), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    pause = _PAUSE if device is None or device.type == "cpu" else 0.0  # beside a GPU no threads of the host matter
    started = time.perf_counter()
    rounds, elapsed = 0, 0.0
    while rounds < MIN_ROUNDS or elapsed < seconds:
        shuffled.shuffle(order)
        for name in order:
            time.sleep(pause)
            begun = time.perf_counter()
            calls[name]()
            launched = time.perf_counter() - begun
            _wait_for(device)
            taken = _on_device(calls[name], launched) if device_time else _on_host(calls[name], device)
            samples[name].append(taken / per)
        rounds, elapsed = rounds + 1, time.perf_counter() - started
        if on_progress:
            on_progress(min(rounds / MIN_ROUNDS, elapsed / seconds, 1.0) if seconds else rounds / MIN_ROUNDS)
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def _on_host(call: Callable[[], object], device: torch.device | None) -> float:
    begun = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - begun


def _on_device(call: Callable[[], object], launching: float) -> float:
    """The device is kept busy for as long as launching takes: else its clock would show the host's time, too."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(int(_CYCLES * (2 * launching + 1e-4)))  # type: ignore[no-untyped-call]
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


class DenseNetwork(nn.Module):
    """A SkipNet's weights as the plain ResNet they make when every block runs: no gates, no skipping.

    Plain eager PyTorch at its best: batch normalisation folded into the convolutions, ReLU and addition in place.

    Args:
        model: the network; a snapshot of its weights is taken.
        device, dtype: where and in what to compute.
        memory_format: of weights and activations, ``torch.contiguous_format`` or ``torch.channels_last``.
    """

    def __init__(self, model: SkipNet, device: torch.device, dtype: torch.dtype,
                 memory_format: torch.memory_format) -> None:
        super().__init__()
        self.network, self.memory_format = pack(model, device, dtype), memory_format
        self._weights = {id(layer): layer.weight.contiguous(memory_format=memory_format) for layer in self._layers()}

    def _layers(self) -> list[PackedConvolution]:
        blocks = self.network.blocks
        return [self.network.stem, *(layer for block in blocks for layer in block.convolutions),
                *(block.projection for block in blocks if block.projection is not None)]

    def _convolve(self, x: Tensor, layer: PackedConvolution) -> Tensor:
        return F.conv2d(x, self._weights[id(layer)], layer.bias, stride=layer.stride, padding=layer.padding)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` in the network's dtype to logits ``[N, num_classes]``."""
        return self.compute(images)

    def compute(self, images: Tensor) -> Tensor:
        """The same in the caller's mode: PyTorch 2.11 cannot compile what enters inference mode."""
        network = self.network
        x = F.relu_(self._convolve(images.contiguous(memory_format=self.memory_format), network.stem))
        if network.arch.stem_pools:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for block in network.blocks:
            shortcut = x if block.projection is None else self._convolve(x, block.projection)
            for layer in block.convolutions[:-1]:
                x = F.relu_(self._convolve(x, layer))
            x = F.relu_(self._convolve(x, block.convolutions[-1]).add_(shortcut))
        return F.linear(x.mean(dim=(2, 3)), network.head_weight, network.head_bias)


_VARIANTS = {
    "BN folded, NCHW": torch.contiguous_format,
    "BN folded, channels-last": torch.channels_last,
}


@dataclass(frozen=True)
class EngineTiming:
    """One engine: with the gates' decisions, and with all blocks forced to run."""

    engine: str
    skipping: Timing
    dense: Timing


@dataclass(frozen=True)
class Comparison:
    """Engines beside dense execution of the same weights, timed in one run. All times are of one batch.

    Attributes:
        device, dtype, threads: where and how; ``threads`` are PyTorch's on the CPU.
        batch: images a batch.
        images: images a round; every contestant sees the same.
        multiply_adds_share: of these images, over the dense network's: what skipping leaves to do.
        variant: the kind of plain PyTorch that was the fastest, e.g. ``"BN folded, channels-last"``.
        pytorch: that one's times; see :class:`DenseNetwork`.
        engines: every engine that takes the network here, in the registry's order.
    """

    device: str
    dtype: torch.dtype
    threads: int
    batch: int
    images: int
    multiply_adds_share: float
    variant: str
    pytorch: Timing
    engines: tuple[EngineTiming, ...]

    @property
    def steady(self) -> bool:
        """No contestant's times vary much; see :attr:`Timing.steady`."""
        timings = [self.pytorch, *(part for timed in self.engines for part in (timed.skipping, timed.dense))]
        return all(timing.steady for timing in timings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in milliseconds, shares in percent."""
        return {
            "device": self.device, "dtype": str(self.dtype).removeprefix("torch."), "threads": self.threads,
            "batch": self.batch, "images": self.images, "rounds": len(self.pytorch.seconds), "steady": self.steady,
            "multiply_adds_share": 100 * self.multiply_adds_share,
            "pytorch_dense": {"variant": self.variant, **self.pytorch.to_dict()},
            "engines": {timed.engine: {
                "skipping": timed.skipping.to_dict(), "dense": timed.dense.to_dict(),
                "speedup_over_own_dense": timed.skipping.speedup_over(timed.dense),
                "speedup_over_pytorch_dense": timed.skipping.speedup_over(self.pytorch),
            } for timed in self.engines},
        }


def compare_with_dense(model: SkipNet, images: Tensor, batch: int, *, device: torch.device | str = "cpu",
                       dtype: torch.dtype = torch.float32, seconds: float = 5.0,
                       on_progress: Callable[[float], None] | None = None) -> Comparison:
    """Time every engine that takes a network, skipping and dense, beside plain PyTorch's dense execution.

    Args:
        model: the network.
        images: ``[N, in_channels, H, W]``; their number is a multiple of ``batch``, and their routes should be
            typical: a single image's tell little.
        batch: images a batch.
        device, dtype: where and in what to compute.
        seconds, on_progress: as in :func:`alternate`.

    Raises:
        ValueError: the images don't fill whole batches.
    """
    if len(images) == 0 or len(images) % batch:
        raise ValueError(f"images must fill whole batches of {batch}, got {len(images)}")
    place = torch.device(device)
    batches = torch.split(images.to(place, dtype), batch)
    everything = torch.ones(model.arch.num_gates, dtype=torch.bool, device=place)
    calls: dict[str, Callable[[], object]] = {}

    def enter(name: str, run: Callable[..., object], *forced: Tensor) -> None:
        calls[name] = lambda: [run(part, *forced) for part in batches]

    for variant, memory_format in _VARIANTS.items():
        enter(variant, DenseNetwork(model, place, dtype, memory_format))
    names = [name for name, engine in REGISTRY.items() if engine.unsupported_reason(model.arch, place, dtype) is None]
    runtimes = {name: compile(model, engine=name, device=place, dtype=dtype) for name in names}
    for name, runtime in runtimes.items():
        enter(f"{name}, skipping", runtime.infer)
        enter(f"{name}, dense", runtime.infer, everything)
    executed = torch.cat([runtimes[names[0]].infer(part).executed for part in batches])
    counts = count_operations(model.arch)
    timings = alternate(calls, seconds=seconds, device=place, per=len(batches), on_progress=on_progress)
    variant = min(_VARIANTS, key=lambda name: timings[name].median)
    return Comparison(
        device=str(place), dtype=dtype, threads=torch.get_num_threads(), batch=batch, images=len(images),
        multiply_adds_share=counts.per_image(executed)[0].double().mean().item() / counts.dense.multiply_adds,
        variant=variant, pytorch=timings[variant],
        engines=tuple(EngineTiming(name, timings[f"{name}, skipping"], timings[f"{name}, dense"]) for name in names))
