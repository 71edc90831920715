"""One training from beginning to end: stages, epochs, steps; the log, the state to resume from, the finished model.

A run is reproducible: the same configuration on the same machine, thread count and torch version gives bitwise the
same weights, whether it ran through or was interrupted and resumed. Every epoch's random numbers (data order,
augmentation, sampled actions) follow from the seed and the epoch's number alone, and where several ranks train, from
each rank's number (all but the order).
"""

from __future__ import annotations

import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt import checkpoint
from skipnet_rt.data import Data, Split, load_dataset
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.gate_init import freeze_idle_gates, open_gates, open_to, sharpen_gates, standardise_gates
from skipnet_rt.model.network import SkipNet, Trace
from skipnet_rt.model.routing import computation_of
from skipnet_rt.runtime import compile
from skipnet_rt.training.batches import batch_sizes, loader
from skipnet_rt.training.compiled_blocks import compiled_blocks
from skipnet_rt.training.computation_target import ComputationTarget
from skipnet_rt.training.config import (
    OBJECTIVES,
    PRECISIONS,
    SCHEDULES,
    Objective,
    Schedule,
    TrainConfig,
    TrainError,
)
from skipnet_rt.training.distillation import distilled_losses, teacher_logits
from skipnet_rt.training.distributed import ALONE, RankError, Ranks, joined, lost_contact, random_seed
from skipnet_rt.training.gates_alone import freeze_backbone, train_gates_alone
from skipnet_rt.training.policy_gradient import objective_loss
from skipnet_rt.training.route_diversity import decision_information
from skipnet_rt.training.start import starting_network
from skipnet_rt.util.atomic import replacing


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        model: in evaluation mode, on the training device, its card filled in.
        card: ``model.card``.
        history: one entry per epoch, the lines of ``log.jsonl``: epoch, stage, lr, loss, train_accuracy,
            train_computation, accuracy, computation (percent; the last two held out, with hard gates), alpha, seconds.
        path: the saved ``model.safetensors``.
    """

    model: SkipNet
    card: ModelCard
    history: list[dict[str, Any]]
    path: Path


@dataclass(frozen=True)
class _Stage:
    """A stretch of epochs with one objective and one optimizer."""

    objective: Objective
    first: int  # number of its first epoch in the run, from 0
    epochs: int
    base_lr: float
    schedule: Schedule
    warmup_steps: int

    @property
    def end(self) -> int:
        return self.first + self.epochs

    def lr(self, step: int, steps: int) -> float:
        """The learning rate at a step of the stage, of so many."""
        return self.base_lr * (0.1 if step < self.warmup_steps else SCHEDULES[self.schedule](step / steps))


def _stages(config: TrainConfig) -> list[_Stage]:
    stages: list[_Stage] = []
    for objective in OBJECTIVES[config.stages]:
        first = stages[-1].end if stages else 0
        if objective == "supervised":
            stage = _Stage(objective, first, config.supervised_epochs, config.supervised_lr,
                           config.supervised_schedule, config.warmup_steps)
        elif objective == "gates":
            stage = _Stage(objective, first, config.gates_epochs, config.gates_lr, "constant", 0)
        else:
            stage = _Stage(objective, first, config.reinforce_epochs, config.reinforce_lr,
                           config.reinforce_schedule, 0)
        stages.append(stage)
    if not stages[-1].end:
        raise TrainError(f"no epochs to train: stages {config.stages!r} with {config.supervised_epochs} supervised "
                         f"and {config.reinforce_epochs} reinforced ones")
    return stages


def _sums(loss: Tensor, logits: Tensor, executed: Tensor, labels: Tensor) -> Tensor:
    """What a meter adds up of some images, float32 ``[4]``: images, their losses, the correct ones, executed blocks.

    Args:
        loss: the images' mean.
        logits: ``[N, classes]``.
        executed: bool ``[N, G]``.
        labels: ``[N]``.
    """
    images = len(labels)
    return torch.stack((torch.full_like(loss, images), loss * images,
                        (logits.argmax(1) == labels).sum(), executed.sum())).float()


@dataclass
class _Meter:
    """Running sums over an epoch, read out as means."""

    gates: int
    images: float = 0.0
    losses: float = 0.0
    correct: float = 0.0
    executed: float = 0.0

    def add(self, images: float, losses: float, correct: float, executed: float) -> None:
        self.images += images
        self.losses += losses
        self.correct += correct
        self.executed += executed

    @property
    def loss(self) -> float:
        return self.losses / self.images

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.correct / self.images

    @property
    def computation(self) -> float:
        """Percent; see :func:`skipnet_rt.model.routing.computation_of`."""
        return 100 * computation_of(self.executed / self.images, self.gates)

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.1f} %, computation {self.computation:.1f} %"


def memory_format(architecture: SkipNetArch) -> torch.memory_format:
    """Of weights and images: channels-last, the faster one, unless a strided shortcut has fewer than 8 input channels.

    PyTorch 2.13's oneDNN on AVX2 writes out of bounds where it computes the weight gradient of such a 1x1 convolution
    from channels-last tensors; docs/training.md has the reproduction.
    """
    narrow = any(plan.projects and plan.stride == 2 and plan.in_channels < 8 for plan in architecture.blocks)
    return torch.contiguous_format if narrow else torch.channels_last


class _Run:
    """A training in progress: between two epochs it is exactly what ``state.pt`` holds."""

    def __init__(self, config: TrainConfig, data: Data, ranks: Ranks = ALONE) -> None:
        self.config, self.data, self.ranks = config, data, ranks
        self.device = ranks.device
        self.stages = _stages(config)
        self.epochs = self.stages[-1].end
        self.sizes = _sizes(config, data, ranks)
        self.steps = len(self.sizes)  # of an epoch
        self.history: list[dict[str, Any]] = []
        torch.manual_seed(config.seed)
        model, self.teacher = starting_network(config, data)
        self.memory_format = memory_format(model.arch)
        for network in filter(None, (model, self.teacher)):
            network.to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload]  # stub lacks it
        self.model = ranks.synchronised(model)
        self.alpha = config.alpha
        self.target = None if config.target_computation is None else \
            ComputationTarget(config.target_computation, config.alpha)

    def begin(self, stage: _Stage) -> None:
        """What a stage starts with: its gates' mode, a fresh optimizer and loss scaler."""
        self.model.set_gate_mode(self.config.gate_mode if stage.objective == "supervised" else "sample")
        freeze_backbone(self.model, stage.objective == "gates")
        freeze_idle_gates(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, stage.base_lr, momentum=self.config.momentum,
                                         weight_decay=self.config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "float16")

    def train_epoch(self, epoch: int, on_progress: Callable[[str, float], None]) -> str:
        """One pass over the training split and one over the held-out one; adds a line to the history.

        Returns:
            The epoch in words.
        """
        started = time.perf_counter()
        stage = next(stage for stage in self.stages if epoch < stage.end)
        torch.manual_seed(random_seed(self.config.seed, epoch))
        if epoch == stage.first:
            self.begin(stage)
        rl_weight = self._prepare_gates(stage, epoch - stage.first)
        order = self._part_ways(epoch)
        self.traced = self.ranks.wrapped(self.model)
        if stage.objective == "gates":
            train_gates_alone(self.model)
        else:
            self.model.train()
        meter = _Meter(self.model.arch.num_gates)
        batches = self._batches(self.data.train, shuffle=True, order=order)
        with compiled_blocks(self.model) if self.config.compile_blocks else nullcontext():
            for step, (size, (images, labels)) in enumerate(zip(self.sizes, batches, strict=True)):
                lr = stage.lr((epoch - stage.first) * self.steps + step, stage.epochs * self.steps)
                self._train_step(stage.objective, lr, rl_weight, images, labels, size, meter)
                on_progress(f"{stage.objective} {epoch + 1}/{self.epochs}: {meter}",
                            (epoch * self.steps + step + 1) / (self.epochs * self.steps))
        self.ranks.average_statistics(self.model)
        held_out = self._measure()
        self.history.append({
            "epoch": epoch + 1, "stage": stage.objective, "lr": lr, "loss": meter.loss,
            "train_accuracy": meter.accuracy, "train_computation": meter.computation,
            "accuracy": held_out.accuracy, "computation": held_out.computation, "alpha": round(self.alpha, 4),
            "seconds": round(time.perf_counter() - started, 2)})
        return f"epoch {epoch + 1}/{self.epochs} ({stage.objective}): {meter}; held out: {held_out}"

    def _prepare_gates(self, stage: _Stage, done: int) -> float:
        """Before an epoch, with so many done of the stage: set the gates up, return the policy gradient's weight."""
        if stage.objective == "supervised":
            return 0.0
        config = self.config
        warmup = config.policy_warmup_epochs if stage.objective == "hybrid" else 0
        if config.gate_start == "standardised" and self.model.arch.gate == "rnn" and self.ranks.rank == 0:
            self._set_gates(stage, done, warmup)  # the other ranks get rank 0's, see wrapped
        if stage.objective == "gates":
            return config.rl_weight
        sharpen_gates(self.model, self._temperature(stage, done) / (self._temperature(stage, done - 1) if done else 1))
        return config.rl_weight if done >= warmup else 0.0

    def _set_gates(self, stage: _Stage, done: int, warmup: int) -> None:
        """Give RNNGates of the first reinforced stage, and of its warm-up, logits that leave room to learn."""
        trained_alone = self.stages[0].objective == "gates"
        if stage.objective == "gates" and done == 0:
            standardise_gates(self.model, self._some_images(256))
            open_gates(self.model, self.config.gate_bias)
        elif stage.objective == "hybrid" and done <= warmup:
            if not trained_alone:
                standardise_gates(self.model, self._some_images(256))
            elif warmup:
                target = 50.0 if self.target is None else self.target.target
                open_to(self.model, self._some_images(256), target / 100)

    def _temperature(self, stage: _Stage, done: int) -> float:
        first, last = self.config.temperature, self.config.final_temperature
        return first * (last / first) ** (done / max(1, stage.epochs - 1))

    def _part_ways(self, epoch: int) -> torch.Generator | None:
        """Let every rank draw random numbers of its own from here on; what the order is drawn from stays common."""
        if self.ranks.count == 1:
            return None
        torch.manual_seed(random_seed(self.config.seed, epoch, 1 + self.ranks.rank))
        return torch.Generator().manual_seed(random_seed(self.config.seed, epoch))

    def _train_step(self, objective: Objective, lr: float, rl_weight: float, images: Tensor, labels: Tensor,
                    size: int, meter: _Meter) -> None:
        """A step for a batch of this size, of which these images are the rank's share."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        executed = self._add_gradients(objective, rl_weight, images, labels, size, meter)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.target and rl_weight:
            # Gates alone cannot reach it: blocks that never missed another do badly without.
            share = 0.0 if objective == "gates" else 1 / (self.config.reinforce_epochs * self.steps)
            self.alpha = self.target.alpha(100 * executed, share)

    def _add_gradients(self, objective: Objective, rl_weight: float, images: Tensor, labels: Tensor, size: int,
                       meter: _Meter) -> float:
        """The gradients of a batch's mean loss: piece by piece, each the mean of all ranks'.

        Returns:
            The batch's computation, of all ranks, from 0 to 1.
        """
        pieces = min(self.config.accumulate, size // self.ranks.count)  # no more than images in the smallest share
        batch = _Meter(meter.gates)
        for piece in range(pieces):
            part, targets = images.tensor_split(pieces)[piece], labels.tensor_split(pieces)[piece]
            with self.ranks.holding(self.traced, piece + 1 < pieces):
                with self._autocast():
                    trace = self.traced(part)
                loss = self._loss(objective, rl_weight, trace, part, targets)
                sums = self.ranks.sum(_sums(loss.detach(), trace.logits, trace.masks > 0.5, targets)).tolist()
                if not math.isfinite(value := sums[1] / sums[0]):  # on every rank: each sees the sum
                    raise TrainError(f"the loss became {value} in epoch {len(self.history) + 1}; "
                                     "try a lower learning rate")
                share = len(targets) * self.ranks.count / size
                self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
            for sums_so_far in (batch, meter):
                sums_so_far.add(*sums)
        return batch.computation / 100

    def _loss(self, objective: Objective, rl_weight: float, trace: Trace, images: Tensor, labels: Tensor) -> Tensor:
        """What these images' gradients are taken of."""
        loss = objective_loss(objective, trace, labels, alpha=self.alpha, gamma=self.config.gamma, rl_weight=rl_weight,
                              losses=self._distilled_losses(trace, images, labels), ranks=self.ranks)
        if self.config.route_diversity and rl_weight:
            gate_logits = trace.gate_logits[:, :trace.masks.shape[1]].float()
            loss = loss - self.config.route_diversity * decision_information(gate_logits)
        return loss

    def _distilled_losses(self, trace: Trace, images: Tensor, labels: Tensor) -> Tensor | None:
        """Each image's prediction loss where a dense network teaches, float32 ``[N]``."""
        if self.teacher is None:
            return None
        with self._autocast():
            expected = teacher_logits(self.teacher, images)
        return distilled_losses(trace.logits.float(), labels, expected, weight=self.config.distill_weight,
                                temperature=self.config.distill_temperature)

    @torch.no_grad()
    def _measure(self) -> _Meter:
        """The held-out split as its user will see it, by the compiled runtime; the loss is the cross-entropy."""
        runtime, own = compile(self.model.eval()), _Meter(self.model.arch.num_gates)
        for images, labels in self._batches(self.data.test, shuffle=False):
            result = runtime.infer(images)
            loss = F.cross_entropy(result.logits, labels)
            own.add(*_sums(loss, result.logits, result.executed, labels).tolist())
        sums = torch.tensor([own.images, own.losses, own.correct, own.executed], dtype=torch.float64)
        return _Meter(own.gates, *self.ranks.sum(sums).tolist())

    def _batches(self, split: Split, *, shuffle: bool, order: torch.Generator | None = None,
                 ranks: Ranks | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader(split, self.config.batch_size, shuffle=shuffle, order=order,
                                     ranks=ranks or self.ranks, workers=self.config.workers):
            yield (images.to(self.device, non_blocking=True, memory_format=self.memory_format),
                   labels.to(self.device, non_blocking=True))

    def _some_images(self, count: int) -> Tensor:
        """The first training images of a shuffle, augmented as in training; of one rank alone."""
        batches = self._batches(self.data.train, shuffle=True, ranks=ALONE)
        return torch.cat([images for images, _ in islice(batches, math.ceil(count / self.config.batch_size))])[:count]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, PRECISIONS[self.config.precision],
                              enabled=self.config.precision != "float32")

    def save(self) -> None:
        """Write the log and, last, the state: after the replacement this epoch is done, before it never happened."""
        self.ranks.on_first(self._write)

    def _write(self) -> None:
        log = "".join(json.dumps(line) + "\n" for line in self.history)
        with replacing(self.config.output / "log.jsonl") as path:
            path.write_text(log, encoding="utf-8")
        state = {"config": json.dumps(self.config.to_dict()), "history": json.dumps(self.history),
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(), "ranks": self.ranks.count, "alpha": self.alpha,
                 "alpha_integral": self.target.integral if self.target else None}
        with replacing(self.config.output / "state.pt") as path:
            torch.save(state, path)

    def restore(self, saved: bytes) -> None:
        """Go back to the end of the last finished epoch, as ``state.pt`` has it.

        Raises:
            TrainError: the state is of another configuration.
        """
        state = torch.load(io.BytesIO(saved), map_location=self.device, weights_only=True)
        # A state from before an option existed did without it.
        before = TrainConfig().to_dict() | json.loads(state["config"])
        now = json.loads(json.dumps(self.config.to_dict()))
        changed = [f"{key} (was {before[key]!r}, is {now[key]!r})" for key in now
                   if key not in ("root", "output", "device", "resume") and before[key] != now[key]]
        if changed:
            raise TrainError(f"{self.config.output / 'state.pt'} belongs to another training: {', '.join(changed)}")
        if (ranks := state.get("ranks", 1)) != self.ranks.count and self.ranks.rank == 0:
            warnings.warn(f"begun with {ranks} ranks, resumed with {self.ranks.count}: every step still takes the same "
                          "images at the same learning rate, but the augmentation and the sampled actions are drawn "
                          "from other random numbers, batch normalisation sees other groups of images (on the CPU), "
                          "and sums round otherwise; the weights will not be those of the run so far continued",
                          stacklevel=2)
        self.history = json.loads(state["history"])
        self.begin(next(stage for stage in self.stages if len(self.history) <= stage.end))
        self.model.load_state_dict(state["model"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:  # that trained other parameters in this stage
            raise TrainError(f"{self.config.output / 'state.pt'} is of another version: {error}") from None
        self.scaler.load_state_dict(state["scaler"])
        self.alpha = state.get("alpha", self.alpha)
        if self.target:
            self.target.integral = state["alpha_integral"]

    def publish(self, name: str) -> ModelCard:
        """Save the model as ``output/name.safetensors`` with a card that says how it came about."""
        last, config = self.history[-1], self.config
        training = {
            "data": config.data, "accuracy": round(last["accuracy"], 4), "computation": round(last["computation"], 4),
            "epochs": len(self.history), "seed": config.seed, "command": config.command(),
            "config": config.to_dict(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "ranks": self.ranks.count, "seconds": round(sum(line["seconds"] for line in self.history), 1)}
        card = self.model.card = ModelCard(self.data.labels, self.data.preprocessing, training)
        self.ranks.on_first(lambda: checkpoint.save(self.model, config.output / f"{name}.safetensors"))
        return card

    def kept(self) -> str:
        """What an interrupted training has to show."""
        return (f"{len(self.history)} of {self.epochs} epochs are kept in {self.config.output}, "
                "resume goes on from there")


def _sizes(config: TrainConfig, data: Data, ranks: Ranks) -> list[int]:
    """The sizes of an epoch's batches, enough for every rank."""
    images = len(cast(Any, data.train))
    if images < ranks.count:
        raise TrainError(f"more ranks than images: {ranks.count} ranks share {images} training images of {config.data}")
    if config.batch_size < ranks.count * config.accumulate:
        raise TrainError(f"batch_size must be at least {ranks.count * config.accumulate}, an image for each of "
                         f"{ranks.count} ranks and {config.accumulate} pieces, got {config.batch_size}")
    return batch_sizes(images, config.batch_size, ranks.count)


def _saved(config: TrainConfig) -> bytes | None:
    """The state to resume from, if there is one; makes the run's folder."""
    state = config.output / "state.pt"
    if not state.exists():
        config.output.mkdir(parents=True, exist_ok=True)
        return None
    if not config.resume:
        raise TrainError(f"{config.output} holds a training already: resume it (resume=True, --resume) "
                         "or choose another output folder")
    return state.read_bytes()


def train(config: TrainConfig, *, on_progress: Callable[[str, float], None] | None = None,
          on_epoch: Callable[[str], None] | None = None) -> TrainResult:
    """Train a network and save it, see :class:`TrainConfig`. The state of torch's generators is left as it was.

    Started by torchrun, the processes train one network together, see docs/training.md; each gets the result, and rank
    0 writes and reports.

    Args:
        config: what to train.
        on_progress: told what is being done and the share of it that is done, 0 to 1, after every step.
        on_epoch: told how every epoch went, in words.

    Raises:
        TrainError: the configuration doesn't fit the data, the network, the ranks or the state to resume; a diverged
            loss; or another rank failed.
        skipnet_rt.data.DataError: the data set is not to be had.
        KeyboardInterrupt: on Ctrl-C. The finished epochs are kept, and the message says how to go on.
    """
    with joined(config.device) as ranks, torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
        saved = ranks.on_first(lambda: _saved(config))
        run = _Run(config, ranks.on_each(lambda: load_dataset(config.data, config.root)), ranks)
        if saved is not None:
            run.restore(saved)
        report = on_progress if on_progress and ranks.rank == 0 else lambda what, share: None
        try:
            for epoch in range(len(run.history), run.epochs):
                words = run.train_epoch(epoch, report)
                run.save()
                if on_epoch and ranks.rank == 0:
                    on_epoch(words)
                if epoch + 1 == run.stages[0].end and len(run.stages) > 1:
                    run.publish(run.stages[0].objective)
            card = run.publish("model")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {run.kept()}") from None
        except RuntimeError as error:
            if not lost_contact(error):
                raise
            raise RankError(f"another rank died or fell silent; {run.kept()}") from error
        complaint = run.target.verdict(run.history[-1]["computation"]) if run.target else None
        if complaint and ranks.rank == 0:
            warnings.warn(complaint, stacklevel=2)
    return TrainResult(run.model.eval(), card, run.history, config.output / "model.safetensors")
