"""Evaluation of a compiled network on labelled images: accuracy, routing, and agreement with a reference engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from skipnet_rt.data import Split
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.flops import count_operations
from skipnet_rt.model.routing import InferenceResult, RoutingStats
from skipnet_rt.runtime import SkipNetRuntime

TOP5_CLASSES = 20
"""From this many classes on, top-5 accuracy says something."""


@dataclass(frozen=True)
class Agreement:
    """How far a runtime's results are from a reference's, on the same images.

    Attributes:
        reference: engine and dtype of the reference, e.g. ``"eager, float32"``.
        images: images compared.
        decisions: gate decisions compared.
        flips: decisions that came out differently.
        flip_margin: the largest ``|p - 0.5|`` that the reference gave a flipped decision; 0 without flips. Rounding
            can flip only what is close to 0.5. An earlier flip in the same image changes all that follows it, so only
            an image's first flip counts here.
        predictions_changed: images that got another class.
        logits_error: relative norm of the logits' difference over the images with equal routes; None if there are none.
    """

    reference: str
    images: int
    decisions: int
    flips: int
    flip_margin: float
    predictions_changed: int
    logits_error: float | None

    @property
    def flip_share(self) -> float:
        """Flipped decisions over all."""
        return self.flips / self.decisions if self.decisions else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the share in percent."""
        return {**vars(self), "flip_share": 100 * self.flip_share}


@dataclass(frozen=True)
class Evaluation:
    """What came out, image by image. N images in the data set's order, G gates.

    Attributes:
        arch: the network's architecture.
        engine, device, dtype: what computed it.
        targets: the true classes, int64 ``[N]``.
        predictions: the classes of the largest logit, int64 ``[N]``.
        in_top5: bool ``[N]``, the true class is among the five largest logits; None below :data:`TOP5_CLASSES` classes.
        executed: bool ``[N, G]``.
        probabilities: of executing, float ``[N, G]``.
        agreement: with the reference, if one was given.
    """

    arch: SkipNetArch
    engine: str
    device: str
    dtype: torch.dtype
    targets: Tensor
    predictions: Tensor
    in_top5: Tensor | None
    executed: Tensor
    probabilities: Tensor
    agreement: Agreement | None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def correct(self) -> Tensor:
        """Bool ``[N]``."""
        return self.predictions == self.targets

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy as a fraction."""
        return self.correct.double().mean().item()

    @property
    def top5_accuracy(self) -> float | None:
        """Top-5 accuracy as a fraction, where there are classes enough."""
        return None if self.in_top5 is None else self.in_top5.double().mean().item()

    @cached_property
    def stats(self) -> RoutingStats:
        """Routing statistics over all images."""
        stats = RoutingStats(self.arch)
        stats.update(self.executed)
        return stats

    @property
    def blocks_run(self) -> Tensor:
        """Residual blocks that each image ran, the first one included; int64 ``[N]``."""
        return self.executed.sum(dim=1) + self.arch.num_blocks - self.arch.num_gates

    @cached_property
    def easiest_first(self) -> list[int]:
        """All images, those that ran the fewest blocks first; among equals the gates' mean probability decides."""
        order = self.blocks_run + self.probabilities.double().sum(dim=1) / (self.arch.num_gates + 1)
        return torch.argsort(order, stable=True).tolist()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; accuracies, computation, shares and rates in percent, multiply-adds per image, entropy in bits."""
        stats, ran = self.stats, self.blocks_run
        return {
            "architecture": str(self.arch), "engine": self.engine, "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."), "images": len(self),
            "accuracy": 100 * self.accuracy,
            "top5_accuracy": None if self.top5_accuracy is None else 100 * self.top5_accuracy,
            "computation": 100 * stats.computation,
            "multiply_adds": stats.multiply_adds,
            "multiply_adds_dense": count_operations(self.arch).dense.multiply_adds,
            "multiply_adds_share": 100 * stats.multiply_adds_share,
            "blocks": self.arch.num_blocks,
            "blocks_run": {"min": int(ran.min()), "mean": ran.double().mean().item(), "max": int(ran.max())},
            "distinct_routes": self.stats.distinct_routes,
            "decision_entropy": stats.decision_entropy,
            "execution_rates": (100 * stats.execution_rates).tolist(),
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
        }


@dataclass
class _Comparing:
    """Sums up the differences between two results, batch by batch."""

    reference: SkipNetRuntime
    images: int = 0
    decisions: int = 0
    flips: int = 0
    flip_margin: float = 0.0
    predictions_changed: int = 0
    squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # difference, reference

    def add(self, images: Tensor, result: InferenceResult) -> None:
        expected = self.reference.infer(images.to(self.reference.device))
        executed, logits = result.executed.cpu(), result.logits.double().cpu()
        flipped = executed != expected.executed.cpu()
        expected_logits = expected.logits.double().cpu()
        self.images += len(images)
        self.decisions += flipped.numel()
        self.flips += int(flipped.sum())
        first = flipped & (flipped.cumsum(dim=1) == 1)
        margins = (expected.probabilities.cpu() - 0.5).abs()[first]
        self.flip_margin = max([self.flip_margin, *margins.tolist()])
        self.predictions_changed += int((logits.argmax(1) != expected_logits.argmax(1)).sum())
        same = ~flipped.any(dim=1)
        self.squares += torch.stack([(logits - expected_logits)[same].square().sum(),
                                     expected_logits[same].square().sum()])

    def agreement(self) -> Agreement:
        difference, total = self.squares.sqrt().tolist()
        name = f"{self.reference.engine.name}, {str(self.reference.dtype).removeprefix('torch.')}"
        return Agreement(name, self.images, self.decisions, self.flips, self.flip_margin, self.predictions_changed,
                         difference / total if total else None)


@torch.no_grad()
def evaluate(runtime: SkipNetRuntime, split: Split, *, batch_size: int = 64, workers: int = 0,
             reference: SkipNetRuntime | None = None, reference_images: int | None = None,
             on_progress: Callable[[int], None] | None = None) -> Evaluation:
    """Run a compiled network over a split of a data set.

    Args:
        runtime: the compiled network.
        split: sized, of ``(image [3, H, W], label)``: see :class:`skipnet_rt.data.Data`.
        batch_size: images per call.
        workers: processes that load data; 0 loads in this one.
        reference: another runtime of the same network, usually the eager engine in float32, to compare with.
        reference_images: compare only about so many images, evenly spread; None compares all.
        on_progress: told the number of images done, after every batch.

    Raises:
        ValueError: the split is empty, or its images or labels don't fit the network.
    """
    total = len(cast(Any, split))
    if not total:
        raise ValueError("the data set has no images to evaluate")
    stride = 1 if reference_images is None else math.ceil(total / max(1, reference_images))
    comparing = None if reference is None else _Comparing(reference)
    parts: dict[str, list[Tensor]] = {name: [] for name in (
        "targets", "predictions", "in_top5", "executed", "probabilities")}
    done = 0
    for images, targets in DataLoader(split, batch_size, num_workers=workers):
        result = runtime.infer(images.to(runtime.device))
        logits = result.logits.float().cpu()
        _collect(parts, result, logits, targets)
        if comparing is not None:
            chosen = torch.tensor(range(-done % stride, len(images), stride), dtype=torch.long)
            comparing.add(images[chosen], _subset(result, chosen))
        done += len(images)
        if on_progress:
            on_progress(done)
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    classes = runtime.arch.num_classes
    if (worst := int(joined["targets"].max())) >= classes:
        raise ValueError(f"the data set has a label {worst}, the network only {classes} classes")
    return Evaluation(
        runtime.arch, runtime.engine.name, str(runtime.device), runtime.dtype, joined["targets"],
        joined["predictions"], joined["in_top5"] if classes >= TOP5_CLASSES else None, joined["executed"],
        joined["probabilities"], comparing.agreement() if comparing else None)


def _collect(parts: dict[str, list[Tensor]], result: InferenceResult, logits: Tensor, targets: Tensor) -> None:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    for name, value in (("targets", targets), ("predictions", logits.argmax(1)),
                        ("in_top5", (best == targets[:, None]).any(dim=1)), ("executed", result.executed),
                        ("probabilities", result.probabilities)):
        parts[name].append(value.cpu())


def _subset(result: InferenceResult, rows: Tensor) -> InferenceResult:
    rows = rows.to(result.logits.device)
    return InferenceResult(result.logits[rows], result.executed[rows], result.probabilities[rows], result.arch)
