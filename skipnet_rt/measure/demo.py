"""The bundled network on the bundled pictures: the demonstration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from skipnet_rt.checkpoint.bundled import bundled_model
from skipnet_rt.data import DIGITS, Pictures, digits_pictures
from skipnet_rt.engines.base import Availability
from skipnet_rt.engines.registry import engines
from skipnet_rt.measure.baselines import PYTORCH, PYTORCH_CHANNELS_LAST
from skipnet_rt.measure.benchmark import Benchmark, benchmark, supporting_engines
from skipnet_rt.measure.evaluate import Evaluation, evaluate
from skipnet_rt.runtime import compile

BATCHES = {1: 16, 64: 64}
"""Batch sizes that the demonstration times, and the images per round: enough for their routes to be typical."""

_SECONDS = {1: 4.0, 64: 7.0}
"""How long each is timed."""

VARIANTS = {PYTORCH.name: "BN folded, NCHW", PYTORCH_CHANNELS_LAST.name: "BN folded, channels-last"}
"""The kinds of plain PyTorch that it is measured against, and what they are."""


def held_out_digits() -> Pictures:
    """The 360 held-out digits as a data set."""
    pictures, labels = digits_pictures(held_out=True)
    return Pictures(pictures, labels, DIGITS)


def spread(digits: Pictures, count: int) -> Tensor:
    """So many of the digits, evenly spread, as one batch ``[count, 3, 32, 32]``."""
    return torch.stack([digits[len(digits) * place // count][0] for place in range(count)])


def _times_dict(measured: Benchmark) -> dict[str, Any]:
    (result,) = measured.results
    engines = {}
    for name in result.engine_names:
        skipping, dense = result.of(name, None), result.of(name, 1.0)
        engines[name] = {"skipping": skipping.timing.to_dict(), "dense": dense.timing.to_dict(),
                         "speedup_over_own_dense": skipping.timing.speedup_over(dense.timing),
                         "speedup_over_pytorch_dense": skipping.timing.speedup_over(result.best_dense)}
    return {
        "device": measured.device.type, "dtype": str(measured.dtype).removeprefix("torch."),
        "threads": measured.cpu["threads"], "batch": result.batch, "images": BATCHES[result.batch],
        "rounds": result.rounds, "steady": result.steady,
        "multiply_adds_share": 100 * result.engines[0].multiply_adds_share,
        "pytorch_dense": {"variant": VARIANTS[result.best], **result.best_dense.to_dict()}, "engines": engines,
    }


@dataclass(frozen=True)
class Demonstration:
    """What :func:`demonstrate` measured.

    Attributes:
        evaluation: of the held-out digits with the engine that ``"auto"`` chooses.
        pictures: the digits as they are, 8x8 and grey.
        benchmarks: each engine, skipping and dense, beside plain PyTorch; one for each device and batch size.
        engines: every engine's availability.
    """

    evaluation: Evaluation
    pictures: list[Image.Image]
    benchmarks: list[Benchmark]
    engines: dict[str, Availability]

    @property
    def easiest(self) -> int:
        """The image that ran the fewest blocks."""
        return self.evaluation.easiest_first[0]

    @property
    def hardest(self) -> int:
        """The image that ran the most blocks."""
        return self.evaluation.easiest_first[-1]

    def _image(self, number: int) -> dict[str, Any]:
        evaluation = self.evaluation
        return {"image": number, "class": int(evaluation.targets[number]),
                "prediction": int(evaluation.predictions[number]), "blocks_run": int(evaluation.blocks_run[number])}

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in the units of its parts."""
        return {
            "evaluation": self.evaluation.to_dict(),
            "easiest": self._image(self.easiest),
            "hardest": self._image(self.hardest),
            "timings": [_times_dict(measured) for measured in self.benchmarks],
            "engines": {name: vars(availability) for name, availability in self.engines.items()},
        }


def devices() -> list[str]:
    """Where engines may run on this machine: the CPU, and the current GPU if there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def demonstrate(on_progress: Callable[[str, float], None] | None = None) -> Demonstration:
    """Classify the held-out digits with the bundled network, then time every engine beside dense execution.

    Args:
        on_progress: told what is being done and the share of it that is done, 0 to 1.

    Raises:
        skipnet_rt.CheckpointError: see :func:`~skipnet_rt.checkpoint.bundled.bundled_model`.
    """
    report = on_progress or (lambda what, share: None)
    model, digits = bundled_model(), held_out_digits()
    evaluation = evaluate(compile(model), digits,
                          on_progress=lambda done: report("classifying the digits", done / len(digits)))
    benchmarks = []
    for device in devices():
        names = supporting_engines(model.arch, torch.device(device), torch.float32)
        for batch, count in BATCHES.items():
            what = f"timing batches of {batch} on {device}"
            benchmarks.append(benchmark(
                model, engines=names, batches=[batch], fractions=[None, 1.0],
                baselines=[PYTORCH, PYTORCH_CHANNELS_LAST], seconds=_SECONDS[batch], device=device,
                images=spread(digits, count), device_clock=False,
                on_progress=lambda _, share, what=what: report(what, share)))  # type: ignore[misc]
    return Demonstration(evaluation, list(digits.pictures), benchmarks, engines())
