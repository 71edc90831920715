"""What to train, on what, and how: :class:`TrainConfig`, and the recipe of each data set."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from skipnet_rt.model.arch import SkipNetArch

Stages = Literal["supervised+hybrid", "supervised", "hybrid", "pure", "gates+hybrid"]
Objective = Literal["supervised", "gates", "hybrid", "pure"]
Recipe = Literal["scratch", "finetune"]
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
    those of the other data sets, and those that begin with a trained ResNet.

    Attributes:
        data: name of the data set, see :func:`skipnet_rt.data.load_dataset`.
        root: the data set's folder.
        arch: a published name, or an architecture. Under a name, the classes are as many as the data set has.
            ``"init"`` is what the network of ``init`` has, with RNNGates if it has none.
        output: folder of the run: ``model.safetensors`` at the end, ``supervised.safetensors`` after
            pre-training, ``log.jsonl`` (a line per epoch) and ``state.pt`` (to resume from).
        init: a checkpoint whose weights to begin with. A dense network (a ResNet of torchvision or timm, too) gets
            gates if the architecture has them, see :func:`skipnet_rt.from_resnet`.
        stages: ``"supervised+hybrid"`` is the paper's Algorithm 1; ``"supervised"`` its first stage alone;
            ``"hybrid"`` its second stage alone, from scratch or from ``init``; ``"pure"`` is reinforcement learning
            without a supervised loss: the class is sampled as one more action and an error costs a reward of 1;
            ``"gates+hybrid"`` trains the gates of a trained network alone first, everything else frozen.
            A dense base network has no gates to reinforce: the hybrid loss is its supervised one.
        gate_mode: ``"hard"`` gates with a straight-through gradient in supervised training, or ``"soft"`` ones
            (the paper's Table 3). The reinforced stage samples in either case.
        supervised_epochs, gates_epochs, reinforce_epochs: passes over the training split.
        batch_size: images per step, all ranks' together.
        accumulate: pieces into which a rank cuts its share of a batch, one after the other, where memory does not
            reach for all of it at once; the gradients are added up. Batch normalisation, and the baseline of the
            rewards, then see a piece at a time.
        supervised_lr, gates_lr, reinforce_lr: SGD's learning rates.
        supervised_schedule, reinforce_schedule: how the learning rate falls within a stage, see :data:`SCHEDULES`.
        warmup_steps: first steps of the supervised stage, at a tenth of the learning rate.
        momentum, weight_decay: SGD's.
        alpha: reward for skipping all gated blocks; a skipped block earns ``alpha / G`` (section 3.3).
        target_computation: the computation wanted, in percent of the blocks: ``alpha`` is where a controller begins
            that moves it during the reinforced stages until as much is executed.
        gamma: discount of future rewards, from 0 to 1.
        rl_weight: factor of the policy gradient. At 1 (and gamma 1) the objective is the paper's. The published
            CIFAR code sums the policy gradient over a batch where it averages the supervised one: its 0.01 with
            batches of 128 is 1.28 here.
        temperature, final_temperature: what divides the gates' last linear layers in a reinforced stage's first epoch,
            and in its last; geometrically in between. Above 1 routes are explored, below 1 the sampled decisions
            come close to the hard ones, which are the same at any temperature.
        route_diversity: factor of what the decisions tell of the images (their mutual information, in nats per gate),
            a bonus in the reinforced stages: routes then differ where accuracy does not suffer.
        distill_weight: share of the dense network of ``init`` in the supervised loss, 0 to 1: so much of the
            cross-entropy is with its predictions, not with the labels.
        distill_temperature: what divides both networks' logits for that.
        gate_start: the gates when the first reinforced stage begins: ``"kept"`` as they are, or ``"standardised"`` over
            256 training images (RNNGate only), see :func:`~skipnet_rt.model.gate_init.standardise_gates`; again before
            each of the next epochs as long as the policy gradient has not set in. Gates trained alone keep their
            order then, and are opened as far as the target (half of the blocks without one).
        policy_warmup_epochs: first epochs of the hybrid stage without policy gradient: blocks get used to sampled
            routes first. A network that has never skipped would teach its gates to run everything.
        gate_bias: added to the gates' last biases before training from scratch, and after they are standardised for
            training alone. Above 0 the blocks begin open;
            at 0 the gates may all close before the blocks have learned anything worth running.
        seed: of the weights, the data order, the augmentation and the sampled actions.
        device: a torch device; ``"cuda"`` gives each of several ranks a GPU of its own.
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
    gates_epochs: int = 0
    reinforce_epochs: int = 44
    batch_size: int = 64
    accumulate: int = 1
    supervised_lr: float = 0.05
    gates_lr: float = 0.005
    reinforce_lr: float = 0.03
    supervised_schedule: Schedule = "cosine"
    reinforce_schedule: Schedule = "cosine"
    warmup_steps: int = 23
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha: float = 0.45
    target_computation: float | None = None
    gamma: float = 1.0
    rl_weight: float = 0.3
    temperature: float = 1.0
    final_temperature: float = 0.1
    route_diversity: float = 0.0
    distill_weight: float = 0.0
    distill_temperature: float = 2.0
    gate_start: Literal["kept", "standardised"] = "standardised"
    policy_warmup_epochs: int = 4
    gate_bias: float = 1.0
    seed: int = 0
    device: str = "cpu"
    precision: Precision = "float32"
    workers: int = 0
    resume: bool = False

    @classmethod
    def for_data(cls, data: str, *, recipe: Recipe = "scratch", **changes: Any) -> TrainConfig:
        """The recipe of a data set, with some fields changed.

        Args:
            data: the data set's name.
            recipe: ``"scratch"``, or ``"finetune"`` for a network that begins with the trained ResNet in ``init``.
            **changes: fields and their values.
        """
        if data not in RECIPES:
            raise TrainError(f"data must be one of {', '.join(RECIPES)}, got {data!r}")
        if recipe not in get_args(Recipe):
            raise TrainError(f"recipe must be one of {', '.join(get_args(Recipe))}, got {recipe!r}")
        return cls(**{"data": data, **RECIPES[data], **(FINETUNE[data] if recipe == "finetune" else {}), **changes})

    def __post_init__(self) -> None:
        for field in ("root", "output", "init"):
            if isinstance(path := getattr(self, field), str):
                object.__setattr__(self, field, Path(path))
        for field, allowed in (("data", RECIPES), ("stages", OBJECTIVES), ("gate_mode", ("hard", "soft")),
                               ("supervised_schedule", SCHEDULES), ("reinforce_schedule", SCHEDULES),
                               ("gate_start", ("kept", "standardised")), ("precision", PRECISIONS)):
            if getattr(self, field) not in allowed:
                raise TrainError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field, low, high in (("supervised_epochs", 0, math.inf), ("gates_epochs", 0, math.inf),
                                 ("reinforce_epochs", 0, math.inf), ("gates_lr", 0, math.inf),
                                 ("batch_size", 1, math.inf), ("accumulate", 1, math.inf),
                                 ("supervised_lr", 0, math.inf), ("reinforce_lr", 0, math.inf),
                                 ("warmup_steps", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf),
                                 ("alpha", -math.inf, math.inf), ("gamma", 0, 1), ("rl_weight", 0, math.inf),
                                 ("temperature", 1e-6, math.inf), ("final_temperature", 1e-6, math.inf),
                                 ("policy_warmup_epochs", 0, math.inf), ("target_computation", 0, 100),
                                 ("route_diversity", 0, math.inf), ("distill_weight", 0, 1),
                                 ("distill_temperature", 1e-6, math.inf), ("seed", 0, math.inf),
                                 ("workers", 0, math.inf)):
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise TrainError(f"{field} must be from {low:g} to {high:g}, got {value!r}")
        if self.init is None and (self.arch == "init" or self.distill_weight):
            what = "arch is init" if self.arch == "init" else "distill_weight is above 0"
            raise TrainError(f"{what}: name the network to begin with in init (--init)")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(self).items()}

    def command(self) -> str:
        """The command line that repeats this training (an architecture without a name cannot be written there)."""
        scratch, finetune = (self._words(recipe) for recipe in get_args(Recipe))
        return shlex.join(finetune if len(finetune) < len(scratch) else scratch)

    def _words(self, recipe: Recipe) -> list[str]:
        """The command line as what differs from a recipe."""
        usual = TrainConfig.for_data(self.data, recipe=recipe, init=self.init if self.init else Path())
        words = ["skipnet-rt", "train", *([] if recipe == "scratch" else ["--recipe", recipe])]
        for field in dataclasses.fields(self):
            value, shown = getattr(self, field.name), field.name in ("data", "init")
            if value is not None and field.name != "resume" and (shown or value != getattr(usual, field.name)):
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return words


OBJECTIVES: dict[Stages, tuple[Objective, ...]] = {
    "supervised+hybrid": ("supervised", "hybrid"),
    "supervised": ("supervised",),
    "hybrid": ("hybrid",),
    "pure": ("pure",),
    "gates+hybrid": ("gates", "hybrid"),
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

_FINETUNE: dict[str, Any] = dict(
    arch="init", stages="gates+hybrid", supervised_epochs=0, gates_epochs=2, reinforce_epochs=18, gates_lr=0.005,
    reinforce_lr=0.01, reinforce_schedule="cosine", alpha=0.0, target_computation=50.0, rl_weight=0.3,
    temperature=1.0, final_temperature=0.1, distill_weight=0.5, distill_temperature=2.0, policy_warmup_epochs=3,
    gate_start="standardised", gate_bias=2.0)

FINETUNE: dict[str, dict[str, Any]] = dict.fromkeys(RECIPES, _FINETUNE)
FINETUNE["digits"] = dict(_FINETUNE, reinforce_lr=0.03, target_computation=43.0)
"""Per data set, what differs from its recipe in :data:`RECIPES` where training begins with a trained ResNet. Those of
the data sets other than digits have not been trained to the end by us."""
