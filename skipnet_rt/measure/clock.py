"""Interleaved timing: calls take turns, round after round, so that whatever slows the machine down slows all of them.

Medians of single runs, taken minutes apart, mostly compare the machine's moods. Here every round times each call once,
in an order shuffled anew; ratios are formed within a round and only then reduced to their median.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

MIN_ROUNDS = 3

_CYCLES = 2e9  # a GPU's clock ticks per second, at most

_PAUSE = 0.06  # seconds: before they sleep, ONNX Runtime's threads were seen to spin for 45 ms, PyTorch's for 11


@dataclass(frozen=True)
class Timing:
    """Seconds that one call took, one entry per round; the entries of calls timed together belong together."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)

    def quantile(self, share: float) -> float:
        """Seconds that this share (0 to 1) of the rounds stayed below."""
        return float(np.quantile(self.seconds, share))

    @property
    def fast_quartile(self) -> float:
        """Seconds that a quarter of the rounds stayed below: what others do on the machine only ever adds to a time."""
        return self.quantile(0.25)

    def speedup_over(self, other: Timing) -> float:
        """How many times faster than ``other``: the median over the rounds of ``other / self``."""
        return median(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))

    @property
    def steady(self) -> bool:
        """The 80th percentile is not half as long again as the 20th: the machine had nothing else to do."""
        return self.quantile(0.8) <= 1.5 * self.quantile(0.2)

    def to_dict(self) -> dict[str, float]:
        """Milliseconds: ``median``, ``fast_quartile``, ``p20`` and ``p80``."""
        return {"median": 1e3 * self.median, "fast_quartile": 1e3 * self.fast_quartile,
                "p20": 1e3 * self.quantile(0.2), "p80": 1e3 * self.quantile(0.8)}


def time_interleaved(calls: Mapping[str, Callable[[], object]], *, seconds: float, device: torch.device | None = None,
                     device_time: bool = False, per: int = 1,
                     on_progress: Callable[[float], None] | None = None) -> dict[str, Timing]:
    """Time some calls against each other.

    Args:
        calls: by name. Each is called once beforehand to warm up, and once more, after a pause, right before every
            timed call: what is measured is neither the previous call's threads, which go on spinning for a while, nor
            its data in the caches.
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
            duration = _on_device(calls[name], launched) if device_time else _on_host(calls[name], device)
            samples[name].append(duration / per)
        rounds, elapsed = rounds + 1, time.perf_counter() - started
        if on_progress:
            on_progress(min(rounds / MIN_ROUNDS, elapsed / seconds, 1.0) if seconds else rounds / MIN_ROUNDS)
    return {name: Timing(tuple(durations)) for name, durations in samples.items()}


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
