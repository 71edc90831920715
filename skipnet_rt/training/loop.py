"""Training: supervised pre-training with hard gates, then hybrid reinforcement learning.

Source: SkipNet paper, section 3.3 and Algorithm 1. The hybrid objective, for image x with label y, gates
``i = 1..G`` and sampled actions ``a_i`` (1 executes), is ``E[L(x, y, a) - sum_i alpha/G (1 - a_i)]``. Its gradient is
the supervised loss's gradient along the sampled route, plus REINFORCE for every gate:
``-E[sum_i grad log p(a_i) R_i]`` with the cumulative future reward ``R_i = r_i + gamma R_(i+1)``,
``r_i = alpha/G (1 - a_i)`` and ``R_(G+1) = -L``.

**Variance reduction: the leave-one-out baseline** (Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!",
2019, over a batch instead of repeated samples). See :func:`leave_one_out`.

A run is reproducible: the same configuration on the same machine, thread count and torch version gives bitwise the
same weights, whether it ran through or was interrupted and resumed. Every epoch's random numbers (data order,
augmentation, sampled actions) follow from the seed and the epoch's number alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from skipnet_rt import checkpoint
from skipnet_rt.data import Data, Split, load_dataset
from skipnet_rt.model.arch import SkipNetArch, arch
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.gates import FeedforwardGate, PooledEmbedding, RNNGate
from skipnet_rt.model.network import SkipNet, Trace, build
from skipnet_rt.model.routing import computation_of
from skipnet_rt.util.atomic import replacing

Stages = Literal["supervised+hybrid", "supervised", "hybrid", "pure"]
Objective = Literal["supervised", "hybrid", "pure"]
Schedule = Literal["cosine", "constant", "cifar", "imagenet"]
Precision = Literal["float32", "bfloat16", "float16"]

SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
    "cifar": lambda done: 0.1 ** ((done >= 1 / 2) + (done >= 3 / 4)),
    "imagenet": lambda done: 0.1 ** int(4 * done),
}
"""Factor of the learning rate, by the share of the stage that is done. The last two are the published code's: tenfold
down at 32,000 and 48,000 of 64,000 iterations, and every 30 of 120 epochs."""


class TrainError(ValueError):
    """A training that cannot start or go on as it was asked for."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how. The defaults are the recipe of the bundled demo model; :meth:`for_data` has
    those of the other data sets.

    Attributes:
        data: name of the data set, see :func:`skipnet_rt.data.load_dataset`.
        root: the data set's folder.
        arch: a published name, or an architecture. Under a name, the classes are as many as the data set has.
        output: folder of the run: ``model.safetensors`` at the end, ``supervised.safetensors`` after
            pre-training, ``log.jsonl`` (a line an epoch) and ``state.pt`` (to resume from).
        init: a checkpoint whose weights to begin with.
        stages: ``"supervised+hybrid"`` is the paper's Algorithm 1; ``"supervised"`` its first stage alone;
            ``"hybrid"`` its second stage alone, from scratch or from ``init``; ``"pure"`` is reinforcement learning
            without a supervised loss: the class is sampled as one more action and an error costs a reward of 1.
            A dense base network has no gates to reinforce: the hybrid loss is its supervised one.
        gate_mode: ``"hard"`` gates with a straight-through gradient in supervised training, or ``"soft"`` ones
            (the paper's Table 3). The reinforced stage samples in either case.
        supervised_epochs, reinforce_epochs: passes over the training split.
        batch_size: images a step.
        supervised_lr, reinforce_lr: SGD's learning rates.
        supervised_schedule, reinforce_schedule: how the learning rate falls within a stage, see :data:`SCHEDULES`.
        warmup_steps: first steps of the supervised stage, at a tenth of the learning rate.
        momentum, weight_decay: SGD's.
        alpha: reward for skipping all gated blocks; a skipped block earns ``alpha / G`` (section 3.3).
        gamma: discount of future rewards, from 0 to 1.
        rl_weight: factor of the policy gradient. At 1 (and gamma 1) the objective is the paper's. The published
            CIFAR code sums the policy gradient over a batch where it averages the supervised one: its 0.01 with
            batches of 128 is 1.28 here.
        temperature, final_temperature: what divides the gates' last linear layers in a reinforced stage's first epoch,
            and in its last; geometrically in between. Above 1 routes are explored, below 1 the sampled decisions
            come close to the hard ones, which are the same at any temperature.
        gate_start: the gates when the hybrid stage begins: ``"kept"`` as they are, or ``"standardised"`` over 256
            training images (RNNGate only), see :func:`standardise_gates`; again before each of the next epochs as
            long as the policy gradient has not set in.
        policy_warmup_epochs: first epochs of the hybrid stage without policy gradient: blocks get used to sampled
            routes first. A network that has never skipped would teach its gates to run everything.
        gate_bias: added to the gates' last biases before training from scratch. Above 0 the blocks begin open;
            at 0 the gates may all close before the blocks have learned anything worth running.
        seed: of the weights, the data order, the augmentation and the sampled actions.
        device: a torch device.
        precision: ``"bfloat16"`` or ``"float16"`` (with loss scaling) trains under :func:`torch.autocast`.
        workers: processes that load data; 0 loads in this one. Their number changes the augmentation's random numbers.
        resume: go on from ``output/state.pt`` if it is there.

    Raises:
        TrainError: a value out of its range.
    """

    data: str = "digits"
    root: Path = Path("data")
    arch: str | SkipNetArch = "cifar10_rnn_gate_38"
    output: Path = Path("runs/skipnet")
    init: Path | None = None
    stages: Stages = "supervised+hybrid"
    gate_mode: Literal["hard", "soft"] = "hard"
    supervised_epochs: int = 16
    reinforce_epochs: int = 44
    batch_size: int = 64
    supervised_lr: float = 0.05
    reinforce_lr: float = 0.03
    supervised_schedule: Schedule = "cosine"
    reinforce_schedule: Schedule = "cosine"
    warmup_steps: int = 23
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha: float = 0.45
    gamma: float = 1.0
    rl_weight: float = 0.3
    temperature: float = 1.0
    final_temperature: float = 0.1
    gate_start: Literal["kept", "standardised"] = "standardised"
    policy_warmup_epochs: int = 4
    gate_bias: float = 1.0
    seed: int = 0
    device: str = "cpu"
    precision: Precision = "float32"
    workers: int = 0
    resume: bool = False

    @classmethod
    def for_data(cls, data: str, **changes: Any) -> TrainConfig:
        """The recipe of a data set, with some fields changed."""
        if data not in RECIPES:
            raise TrainError(f"data must be one of {', '.join(RECIPES)}, got {data!r}")
        return cls(**{"data": data, **RECIPES[data], **changes})

    def __post_init__(self) -> None:
        for field in ("root", "output", "init"):
            if isinstance(path := getattr(self, field), str):
                object.__setattr__(self, field, Path(path))
        for field, allowed in (("data", RECIPES), ("stages", OBJECTIVES), ("gate_mode", ("hard", "soft")),
                               ("supervised_schedule", SCHEDULES), ("reinforce_schedule", SCHEDULES),
                               ("gate_start", ("kept", "standardised")), ("precision", PRECISIONS)):
            if getattr(self, field) not in allowed:
                raise TrainError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field, low, high in (("supervised_epochs", 0, math.inf), ("reinforce_epochs", 0, math.inf),
                                 ("batch_size", 1, math.inf), ("supervised_lr", 0, math.inf),
                                 ("reinforce_lr", 0, math.inf), ("warmup_steps", 0, math.inf), ("momentum", 0, 1),
                                 ("weight_decay", 0, math.inf), ("alpha", -math.inf, math.inf), ("gamma", 0, 1),
                                 ("rl_weight", 0, math.inf), ("temperature", 1e-6, math.inf),
                                 ("final_temperature", 1e-6, math.inf), ("policy_warmup_epochs", 0, math.inf),
                                 ("seed", 0, math.inf), ("workers", 0, math.inf)):
            if not low <= getattr(self, field) <= high:
                raise TrainError(f"{field} must be from {low:g} to {high:g}, got {getattr(self, field)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(self).items()}

    def command(self) -> str:
        """The command line that repeats this training (an architecture without a name cannot be written there)."""
        recipe, words = TrainConfig.for_data(self.data), ["skipnet-rt", "train"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "data" or (value != getattr(recipe, field.name) and field.name != "resume"):
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


OBJECTIVES: dict[Stages, tuple[Objective, ...]] = {
    "supervised+hybrid": ("supervised", "hybrid"),
    "supervised": ("supervised",),
    "hybrid": ("hybrid",),
    "pure": ("pure",),
}
"""What each choice of ``stages`` optimises, one stage after the other."""

PRECISIONS: dict[Precision, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The published code's defaults: cifar/train_sp.py, cifar/train_rl.py (64,000 and 10,000 steps of 128), imagenet/.
_CIFAR_RECIPE: dict[str, Any] = dict(
    supervised_epochs=164, reinforce_epochs=26, batch_size=128, supervised_lr=0.1, reinforce_lr=1e-4,
    supervised_schedule="cifar", reinforce_schedule="constant", warmup_steps=400, weight_decay=1e-4,
    alpha=0.1, rl_weight=1.28, temperature=1.0, final_temperature=1.0, policy_warmup_epochs=0,
    gate_start="kept", gate_bias=0.0)

RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": dict(_CIFAR_RECIPE),
    "cifar100": dict(_CIFAR_RECIPE, arch="cifar100_rnn_gate_38"),
    # 604,388 pictures: a twelfth of CIFAR's epochs are as many steps.
    "svhn": dict(_CIFAR_RECIPE, arch="svhn_rnn_gate_38", supervised_epochs=14, reinforce_epochs=2),
    "imagenet": dict(
        arch="imagenet_rnn_gate_34", supervised_epochs=120, reinforce_epochs=40, batch_size=256, supervised_lr=0.1,
        reinforce_lr=1e-4, supervised_schedule="imagenet", reinforce_schedule="imagenet", warmup_steps=0,
        weight_decay=1e-4, alpha=0.01, rl_weight=0.01, temperature=0.05,
        final_temperature=0.05, policy_warmup_epochs=0, gate_start="kept", gate_bias=0.0),
}
"""Per data set, what differs from :class:`TrainConfig`'s defaults, which are those of digits."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        model: in evaluation mode, on the training device, its card filled in.
        card: ``model.card``.
        history: one entry an epoch, the lines of ``log.jsonl``: epoch, stage, lr, loss, train_accuracy,
            train_computation, accuracy, computation (percent; the last two held out, with hard gates), seconds.
        path: the saved ``model.safetensors``.
    """

    model: SkipNet
    card: ModelCard
    history: list[dict[str, Any]]
    path: Path


# The policy gradient ------------------------------------------------------------------------------------------------

def cumulative_rewards(actions: Tensor, loss: Tensor, alpha: float, gamma: float) -> Tensor:
    """What follows each gate's action: ``R_i = r_i + gamma R_(i+1)``, ``r_i = alpha/G (1 - a_i)``, ``R_(G+1) = -loss``.

    Args:
        actions: ``[N, G]``, 1 where the block was executed, 0 where it was skipped.
        loss: ``[N]``, each image's prediction loss.
        alpha: reward for skipping all gated blocks.
        gamma: discount.

    Returns:
        ``[N, G]``, without gradient.
    """
    skipped = (1 - actions.detach()) * (alpha / max(1, actions.shape[1]))
    future, rewards = -loss.detach(), []
    for reward in reversed(skipped.unbind(1)):
        future = reward + gamma * future
        rewards.append(future)
    return torch.stack(rewards[::-1], dim=1) if rewards else torch.zeros_like(skipped)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages: each image's reward less the mean reward of the *other* images of the batch, gate by gate.

    The baseline leaves the gradient unbiased: the other images' rewards don't depend on this image's action, so
    ``E[grad log p(a) b] = b sum_a grad p(a) = b grad 1 = 0``. (The mean over all images, this one included, would
    shrink the gradient by (N - 1)/N.) It takes out what the images' rewards have in common, the larger part of
    REINFORCE's variance. In training mode batch normalisation does couple the images of a batch a little; plain
    REINFORCE per image leaves that influence out of account just the same.

    Args:
        rewards: ``[N, G]``.

    Returns:
        ``[N, G]``; of a batch of one, the rewards themselves.
    """
    images = rewards.shape[0]
    return rewards if images == 1 else (rewards - rewards.mean(0)) * (images / (images - 1))


def policy_loss(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """A scalar whose gradient is REINFORCE's, averaged over the batch and summed over the actions.

    Args:
        log_probabilities: ``[N, A]``, of the actions taken, differentiable.
        advantages: ``[N, A]``, what each is worth.
    """
    return -(advantages.detach() * log_probabilities).sum(1).mean()


def objective_loss(objective: Objective, trace: Trace, labels: Tensor, *, alpha: float, gamma: float,
                   rl_weight: float) -> Tensor:
    """The scalar to minimise for one batch.

    Args:
        objective: the stage.
        trace: a pass in training mode, ``trace.masks`` sampled in the reinforced stages.
        labels: ``[N]``, class numbers.
        alpha, gamma, rl_weight: as in :class:`TrainConfig`.
    """
    logits, gates = trace.logits.float(), trace.masks.shape[1]
    if objective == "supervised":
        return F.cross_entropy(logits, labels)
    actions, gate_logits = trace.masks.float(), trace.gate_logits[:, :gates].float()
    log_probabilities = -F.binary_cross_entropy_with_logits(gate_logits, actions, reduction="none")
    if objective == "hybrid":
        losses = F.cross_entropy(logits, labels, reduction="none")
        rewards = cumulative_rewards(actions, losses, alpha, gamma)
        return losses.mean() + rl_weight * policy_loss(log_probabilities, leave_one_out(rewards))
    predicted = torch.multinomial(logits.detach().softmax(1), 1)
    wrong = (predicted.squeeze(1) != labels).float()
    rewards = torch.cat((cumulative_rewards(actions, wrong, alpha, gamma), -wrong[:, None]), dim=1)
    log_probabilities = torch.cat((log_probabilities, logits.log_softmax(1).gather(1, predicted)), dim=1)
    return rl_weight * policy_loss(log_probabilities, leave_one_out(rewards))


# One run ------------------------------------------------------------------------------------------------------------

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
        else:
            stage = _Stage(objective, first, config.reinforce_epochs, config.reinforce_lr,
                           config.reinforce_schedule, 0)
        stages.append(stage)
    if not stages[-1].end:
        raise TrainError(f"no epochs to train: stages {config.stages!r} with {config.supervised_epochs} supervised "
                         f"and {config.reinforce_epochs} reinforced ones")
    return stages


@dataclass
class _Meter:
    """Running sums over an epoch, read out as means."""

    gates: int
    images: int = 0
    losses: float = 0.0
    correct: int = 0
    executed: int = 0

    def add(self, loss: float, trace: Trace, labels: Tensor) -> None:
        self.images += len(labels)
        self.losses += loss * len(labels)
        self.correct += int((trace.logits.argmax(1) == labels).sum())
        self.executed += int((trace.masks > 0.5).sum())

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


def _last_layers(model: SkipNet) -> Iterator[nn.Linear | nn.Conv2d]:
    """The layers that give the execute logits: one shared by all gates (RNNGate) or one a gate."""
    for module in model.modules():
        if isinstance(module, RNNGate):
            yield module.proj
        elif isinstance(module, FeedforwardGate):
            yield module.linear_layer


@torch.no_grad()
def open_gates(model: SkipNet, bias: float) -> None:
    """Add to every gate's execute logit."""
    for layer in _last_layers(model):
        assert layer.bias is not None
        layer.bias[-1] += bias  # of (execute,) or of (skip, execute)


@torch.no_grad()
def sharpen_gates(model: SkipNet, temperature: float) -> None:
    """Divide every gate's execute logit by the temperature; hard decisions stay as they are."""
    for layer in _last_layers(model):
        for parameter in layer.parameters():
            parameter.div_(temperature)


@torch.no_grad()
def standardise_gates(model: SkipNet, images: Tensor) -> None:
    """Let RNNGates see what tells these images ``[N, C, H, W]`` apart, and run half of the blocks on average.

    Data-dependent initialisation (Salimans and Kingma, "Weight normalization", 2016, section 3): every embedded
    feature gets mean 0 and deviation 1, the execute logits get mean 0. What pooled features have in common is far
    larger than their differences: otherwise a gate sees little but the former, and learns to treat all images alike.
    """
    features: dict[PooledEmbedding, Tensor] = {}
    gates = [module for module in model.modules() if isinstance(module, PooledEmbedding)]
    hooks = [gate.register_forward_hook(lambda gate, _, output: features.update({gate: output})) for gate in gates]
    model.eval().trace(images)
    for hook in hooks:
        hook.remove()
    for gate, feature in features.items():
        convolution, deviation = cast(nn.Conv2d, gate[1]), feature.std(0) + 1e-6
        convolution.weight.div_(deviation.view(-1, 1, 1, 1))
        cast(Tensor, convolution.bias).sub_(feature.mean(0)).div_(deviation)
    open_gates(model, -float(model.trace(images).gate_logits[:, :model.arch.num_gates].mean()))


class _Run:
    """A training in progress: between two epochs it is exactly what ``state.pt`` holds."""

    def __init__(self, config: TrainConfig, data: Data) -> None:
        self.config, self.data = config, data
        self.device = torch.device(config.device)
        self.stages = _stages(config)
        self.epochs = self.stages[-1].end
        self.steps = math.ceil(len(cast(Any, data.train)) / config.batch_size)  # of an epoch
        self.history: list[dict[str, Any]] = []
        torch.manual_seed(config.seed)
        self.model = _model(config, data).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def begin(self, stage: _Stage) -> None:
        """What a stage starts with: its gates' mode, a fresh optimizer and loss scaler."""
        self.model.set_gate_mode(self.config.gate_mode if stage.objective == "supervised" else "sample")
        self.optimizer = torch.optim.SGD(self.model.parameters(), stage.base_lr, momentum=self.config.momentum,
                                         weight_decay=self.config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "float16")

    def train_epoch(self, epoch: int, progress: Progress, task: TaskID) -> None:
        """One pass over the training split and one over the held-out one; adds a line to the history."""
        started = time.perf_counter()
        stage = next(stage for stage in self.stages if epoch < stage.end)
        torch.manual_seed(_epoch_seed(self.config.seed, epoch))
        if epoch == stage.first:
            self.begin(stage)
        rl_weight = self._prepare_gates(stage, epoch - stage.first)
        self.model.train()
        meter = _Meter(self.model.arch.num_gates)
        for step, (images, labels) in enumerate(self._batches(self.data.train, shuffle=True)):
            lr = stage.lr((epoch - stage.first) * self.steps + step, stage.epochs * self.steps)
            self._train_step(stage.objective, lr, rl_weight, images, labels, meter)
            progress.update(task, advance=1, description=f"{stage.objective} {epoch + 1}/{self.epochs}: {meter}")
        held_out = self._measure()
        self.history.append({
            "epoch": epoch + 1, "stage": stage.objective, "lr": lr, "loss": meter.loss,
            "train_accuracy": meter.accuracy, "train_computation": meter.computation,
            "accuracy": held_out.accuracy, "computation": held_out.computation,
            "seconds": round(time.perf_counter() - started, 2)})
        progress.console.print(f"epoch {epoch + 1}/{self.epochs} ({stage.objective}): {meter}; "
                               f"held out: {held_out}", highlight=False)

    def _prepare_gates(self, stage: _Stage, done: int) -> float:
        """Before an epoch, with so many done of the stage: set the gates up, return the policy gradient's weight."""
        if stage.objective == "supervised":
            return 0.0
        config = self.config
        warmup = config.policy_warmup_epochs if stage.objective == "hybrid" else 0
        if (stage.objective == "hybrid" and done <= warmup and config.gate_start == "standardised"
                and self.model.arch.gate == "rnn"):
            standardise_gates(self.model, self._some_images(256))
        sharpen_gates(self.model, self._temperature(stage, done) / (self._temperature(stage, done - 1) if done else 1))
        return config.rl_weight if done >= warmup else 0.0

    def _temperature(self, stage: _Stage, done: int) -> float:
        first, last = self.config.temperature, self.config.final_temperature
        return first * (last / first) ** (done / max(1, stage.epochs - 1))

    def _train_step(self, objective: Objective, lr: float, rl_weight: float, images: Tensor, labels: Tensor,
                    meter: _Meter) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            trace = self.model.trace(images)
        loss = objective_loss(objective, trace, labels, alpha=self.config.alpha, gamma=self.config.gamma,
                              rl_weight=rl_weight)
        if not math.isfinite(value := float(loss.detach())):
            raise TrainError(f"the loss became {value} in epoch {len(self.history) + 1}; try a lower learning rate")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        meter.add(value, trace, labels)

    @torch.no_grad()
    def _measure(self) -> _Meter:
        """The held-out split with hard gates; the loss is the cross-entropy."""
        self.model.eval()
        meter = _Meter(self.model.arch.num_gates)
        for images, labels in self._batches(self.data.test, shuffle=False):
            with self._autocast():
                trace = self.model.trace(images)
            meter.add(float(F.cross_entropy(trace.logits.float(), labels)), trace, labels)
        return meter

    def _batches(self, split: Split, *, shuffle: bool) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(split, self.config.batch_size, shuffle=shuffle, num_workers=self.config.workers,
                            pin_memory=self.device.type == "cuda")
        for images, labels in loader:
            yield (images.to(self.device, non_blocking=True, memory_format=torch.channels_last),
                   labels.to(self.device, non_blocking=True))

    def _some_images(self, count: int) -> Tensor:
        """The first training images of a shuffle, augmented as in training."""
        batches = self._batches(self.data.train, shuffle=True)
        return torch.cat([images for images, _ in islice(batches, math.ceil(count / self.config.batch_size))])[:count]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, PRECISIONS[self.config.precision],
                              enabled=self.config.precision != "float32")

    def save(self) -> None:
        """Write the log and, last, the state: after the replacement this epoch is done, before it never happened."""
        log = "".join(json.dumps(line) + "\n" for line in self.history)
        with replacing(self.config.output / "log.jsonl") as path:
            path.write_text(log, encoding="utf-8")
        state = {"config": json.dumps(self.config.to_dict()), "history": json.dumps(self.history),
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict()}
        with replacing(self.config.output / "state.pt") as path:
            torch.save(state, path)

    def restore(self, path: Path) -> None:
        """Go back to the end of the last finished epoch.

        Raises:
            TrainError: the state is of another configuration.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        before, now = json.loads(state["config"]), json.loads(json.dumps(self.config.to_dict()))
        changed = [f"{key} (was {before.get(key)!r}, is {now[key]!r})" for key in now
                   if key not in ("root", "output", "device", "resume") and before.get(key) != now[key]]
        if changed:
            raise TrainError(f"{path} belongs to another training: {', '.join(changed)}")
        self.history = json.loads(state["history"])
        self.begin(next(stage for stage in self.stages if len(self.history) <= stage.end))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def publish(self, name: str) -> ModelCard:
        """Save the model as ``output/name.safetensors`` with a card that says how it came about."""
        last, config = self.history[-1], self.config
        training = {
            "data": config.data, "accuracy": round(last["accuracy"], 4), "computation": round(last["computation"], 4),
            "epochs": len(self.history), "seed": config.seed, "command": config.command(),
            "config": config.to_dict(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "seconds": round(sum(line["seconds"] for line in self.history), 1)}
        card = self.model.card = ModelCard(self.data.labels, self.data.preprocessing, training)
        checkpoint.save(self.model, config.output / f"{name}.safetensors")
        return card


def _epoch_seed(seed: int, epoch: int) -> int:
    """Independent random numbers for every epoch, so that nothing of the generators' states has to be kept."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]) >> 1


def _model(config: TrainConfig, data: Data) -> SkipNet:
    classes, size = len(data.labels), data.preprocessing.image_size
    if isinstance(config.arch, str):
        architecture = arch(config.arch)
        if architecture.num_classes != classes:
            architecture = architecture.replace(num_classes=classes)
    else:
        architecture = config.arch
    if (architecture.num_classes, architecture.image_size) != (classes, size):
        raise TrainError(f"{config.data} has {classes} classes and images of {size[0]}x{size[1]}; "
                         f"{architecture} has {architecture.num_classes} and {architecture.image_size}")
    if config.stages == "pure" and not architecture.gated:
        raise TrainError(f"pure reinforcement learning trains gates, and {architecture} has none")
    model = build(architecture)
    if config.init is None:
        open_gates(model, config.gate_bias)
    else:
        model.load_state_dict(checkpoint.load(config.init).state_dict())
    return model


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Train a network and save it, see :class:`TrainConfig`. The state of torch's generators is left as it was.

    Args:
        config: what to train.
        console: where the progress bar and a line an epoch go; None is silent.

    Raises:
        TrainError: the configuration doesn't fit the data, the network or the state to resume; or a diverged loss.
        skipnet_rt.data.DataError: the data set is not to be had.
        KeyboardInterrupt: on Ctrl-C. The finished epochs are kept, and the message says how to go on.
    """
    state = config.output / "state.pt"
    if state.exists() and not config.resume:
        raise TrainError(f"{config.output} holds a training already: resume it (resume=True, --resume) "
                         "or choose another output folder")
    config.output.mkdir(parents=True, exist_ok=True)
    data = load_dataset(config.data, config.root)
    devices = [torch.device(config.device)] if torch.device(config.device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        run = _Run(config, data)
        if state.exists():
            run.restore(state)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=console or Console(quiet=True)) as progress:
                task = progress.add_task("", total=run.epochs * run.steps, completed=len(run.history) * run.steps)
                for epoch in range(len(run.history), run.epochs):
                    run.train_epoch(epoch, progress, task)
                    run.save()
                    if epoch + 1 == run.stages[0].end and len(run.stages) > 1:
                        run.publish(run.stages[0].objective)
            card = run.publish("model")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {len(run.history)} of {run.epochs} epochs are kept in "
                                    f"{config.output}, resume goes on from there") from None
    return TrainResult(run.model.eval(), card, run.history, config.output / "model.safetensors")
