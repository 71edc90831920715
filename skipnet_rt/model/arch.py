"""What a SkipNet is made of: a declarative description, and the registry of the published names.

A :class:`SkipNetArch` says everything that is needed to build the network, to count its
multiply-adds and to plan its execution; nothing else in the project looks at a name.
Source: Wang et al., "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018,
section 3 and its published code; the residual networks are He et al., CVPR 2016.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Stem = Literal["cifar", "imagenet"]
BlockKind = Literal["basic", "bottleneck"]
GateKind = Literal["none", "rnn", "feedforward1", "feedforward2"]
Stage = Literal["supervised", "reinforced"]

EXPANSION: dict[BlockKind, int] = {"basic": 1, "bottleneck": 4}


class ArchError(ValueError):
    """An architecture that does not exist or cannot be built."""


@dataclass(frozen=True)
class BlockPlan:
    """One residual block: where it stands and the shapes that go in and out.

    Attributes:
        index: place among all blocks, from 0. Block 0 always runs; block ``k + 1`` is decided by gate ``k``.
        group: the published group (stage) number, from 1.
        position: place within the group, from 0.
        kind: ``"basic"`` (two 3x3 convolutions) or ``"bottleneck"`` (1x1, 3x3, 1x1).
        in_channels, planes, out_channels: channels of the input, of the inner convolutions, of the output.
        stride: stride of the block's 3x3 convolution that reduces the resolution, 1 or 2.
        in_size, out_size: height and width in pixels.
        projects: the shortcut is a 1x1 convolution with batch normalisation, not the identity.
    """

    index: int
    group: int
    position: int
    kind: BlockKind
    in_channels: int
    planes: int
    out_channels: int
    stride: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    projects: bool

    @property
    def layer_name(self) -> str:
        """State-dict prefix of the block in a gated network."""
        return f"group{self.group}_layer{self.position}"

    @property
    def shortcut_name(self) -> str:
        """State-dict prefix of the projection's second, published name in a gated network."""
        return f"group{self.group}_ds{self.position}"

    @property
    def gate_name(self) -> str:
        """State-dict prefix of the gate that looks at this block's output."""
        return f"group{self.group}_gate{self.position}"

    @property
    def dense_name(self) -> str:
        """State-dict prefix of the block in the dense base network."""
        return f"layer{self.group}.{self.position}"


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """Size after a padded stride-2 convolution (or the stem's padded stride-2 max pool)."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


@dataclass(frozen=True)
class SkipNetArch:
    """A SkipNet or its dense base network.

    Attributes:
        stem: ``"cifar"`` (3x3 convolution) or ``"imagenet"`` (7x7 stride-2 convolution, 3x3 stride-2 max pool).
        block: ``"basic"`` or ``"bottleneck"``.
        depths: number of blocks of each group.
        widths: inner channels (planes) of each group; the stem has ``widths[0]`` channels.
        gate: ``"none"`` is the dense base network.
        stage: the training stage whose return structure the model keeps (``"supervised"`` or ``"reinforced"``);
            weights of the two are interchangeable.
        num_classes: outputs of the classifier.
        image_size: height and width of the input in pixels.
        in_channels: channels of the input.
        embed_dim, hidden_dim: RNNGate's embedding and LSTM sizes (10 and 10 in the paper, section 3.1).
        name: the published name, where there is one.
    """

    stem: Stem
    block: BlockKind
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    gate: GateKind
    stage: Stage = "supervised"
    num_classes: int = 10
    image_size: tuple[int, int] = (32, 32)
    in_channels: int = 3
    embed_dim: int = 10
    hidden_dim: int = 10
    name: str | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("stem", ("cifar", "imagenet")), ("block", tuple(EXPANSION)),
                               ("gate", ("none", "rnn", "feedforward1", "feedforward2")),
                               ("stage", ("supervised", "reinforced"))):
            if getattr(self, field) not in allowed:
                raise ArchError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ArchError(f"depths and widths must have one entry per group, got {self.depths} and {self.widths}")
        for field in ("depths", "widths", "image_size"):
            if any(type(value) is not int or value < 1 for value in getattr(self, field)):
                raise ArchError(f"{field} must be positive integers, got {getattr(self, field)}")
        for field in ("num_classes", "in_channels", "embed_dim", "hidden_dim"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise ArchError(f"{field} must be a positive integer, got {getattr(self, field)!r}")
        if len(self.image_size) != 2:
            raise ArchError(f"image_size must be (height, width), got {self.image_size}")
        if self.gate == "feedforward1" and min(self.blocks[-1].out_size) < 2:
            raise ArchError(f"FFGate-I halves its input first: image_size {self.image_size} leaves "
                            f"{self.blocks[-1].out_size} pixels in the last group, 2x2 are needed")

    @property
    def gated(self) -> bool:
        """Whether the network decides anything (False: the dense base)."""
        return self.gate != "none"

    @property
    def num_blocks(self) -> int:
        """Residual blocks."""
        return sum(self.depths)

    @property
    def num_gates(self) -> int:
        """G, the gates that decide something: blocks - 1 in a gated network, 0 in a dense one."""
        return self.num_blocks - 1 if self.gated else 0

    @property
    def depth(self) -> int:
        """Layers with weights, as networks are named: convolutions on the longest path, plus the classifier."""
        return self.num_blocks * (2 if self.block == "basic" else 3) + 2

    @property
    def features(self) -> int:
        """Channels that reach the classifier."""
        return self.widths[-1] * EXPANSION[self.block]

    @property
    def stem_pools(self) -> bool:
        """Whether a 3x3 stride-2 max pool follows the stem's convolution."""
        return self.stem == "imagenet"

    @property
    def state_dim(self) -> int:
        """Units of the LSTM's state: ``hidden_dim``, or 0 in a network without one."""
        return self.hidden_dim if self.gate == "rnn" else 0

    @property
    def stem_size(self) -> tuple[int, int]:
        """Height and width of the stem's output."""
        return self.image_size if self.stem == "cifar" else _halved(_halved(self.image_size))

    @property
    def returns_last_gate(self) -> bool:
        """Whether the published forward returns the unused last gate's probabilities too.

        The published CIFAR code does in its supervised form and with feed-forward gates; the reinforced
        RNNGate networks and the ImageNet networks leave them out.
        """
        return self.gated and self.stem == "cifar" and (
            self.stage == "supervised" or self.gate != "rnn")

    @property
    def returns_hidden(self) -> bool:
        """Whether the published forward returns the LSTM state as a fourth value (ImageNet)."""
        return self.gate == "rnn" and self.stem == "imagenet"

    @property
    def steps_last_gate(self) -> bool:
        """Whether the published forward evaluates the unused last gate (it shows in probabilities or state)."""
        return self.returns_last_gate or (self.returns_hidden and self.stage == "supervised")

    @cached_property
    def blocks(self) -> tuple[BlockPlan, ...]:
        """Every residual block, in order."""
        plans: list[BlockPlan] = []
        channels, size = self.widths[0], self.stem_size
        for group, (depth, planes) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            for position in range(depth):
                stride = 2 if group > 1 and position == 0 else 1
                out_channels = planes * EXPANSION[self.block]
                out_size = _halved(size) if stride == 2 else size
                plans.append(BlockPlan(len(plans), group, position, self.block, channels, planes, out_channels,
                                       stride, size, out_size, stride == 2 or channels != out_channels))
                channels, size = out_channels, out_size
        return tuple(plans)

    def replace(self, **changes: Any) -> SkipNetArch:
        """A copy with some attributes changed; it loses its published name unless one is given."""
        return dataclasses.replace(self, **{"name": None, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for metadata and JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SkipNetArch:
        """The inverse of :meth:`to_dict`; lists become tuples."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ArchError(f"unknown architecture entries: {', '.join(unknown)}")
        try:
            tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                                      for key, value in values.items()}
            return cls(**tuples)
        except TypeError as error:
            raise ArchError(f"incomplete architecture: {error}") from None

    def __str__(self) -> str:
        if self.name:
            return self.name
        return (f"{self.stem} {self.block} depths={self.depths} widths={self.widths} gate={self.gate} "
                f"classes={self.num_classes} image={self.image_size[0]}x{self.image_size[1]}")


CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10}
CIFAR_DEPTHS = {38: 6, 74: 12, 110: 18, 152: 25}
IMAGENET_DEPTHS: dict[int, tuple[BlockKind, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def _published() -> dict[str, SkipNetArch]:
    names: dict[str, SkipNetArch] = {}

    def add(name: str, **values: Any) -> None:
        names[name] = SkipNetArch(name=name, **values)

    for dataset, classes in CIFAR_CLASSES.items():
        for depth, n in CIFAR_DEPTHS.items():
            common: dict[str, Any] = dict(stem="cifar", block="basic", depths=(n, n, n), widths=(16, 32, 64),
                                          num_classes=classes)
            feedforward = "feedforward1" if depth < 110 else "feedforward2"
            add(f"{dataset}_resnet_{depth}", gate="none", **common)
            add(f"{dataset}_rnn_gate_{depth}", gate="rnn", **common)
            add(f"{dataset}_rnn_gate_rl_{depth}", gate="rnn", stage="reinforced", **common)
            add(f"{dataset}_feedforward_{depth}", gate=feedforward, **common)
            add(f"{dataset}_feedforward_rl_{depth}", gate=feedforward, stage="reinforced", **common)
    for depth, (block, depths) in IMAGENET_DEPTHS.items():
        common = dict(stem="imagenet", block=block, depths=depths, widths=(64, 128, 256, 512), num_classes=1000,
                      image_size=(224, 224))
        add(f"imagenet_resnet_{depth}", gate="none", **common)
        add(f"imagenet_rnn_gate_{depth}", gate="rnn", **common)
        add(f"imagenet_rnn_gate_rl_{depth}", gate="rnn", stage="reinforced", **common)
    return names


PUBLISHED: dict[str, SkipNetArch] = _published()
"""Every published name and its architecture."""

# Spellings that the published code itself uses, so that its checkpoints' `arch` entries are understood.
PUBLISHED_SPELLINGS: dict[str, str] = {
    "cifar10_feedfoward_rl_38": "cifar10_feedforward_rl_38",
    "cifar100_feeforward_38": "cifar100_feedforward_38",
    "cifar100_feedford_rl_38": "cifar100_feedforward_rl_38",
    **{f"resnet{depth}": f"imagenet_resnet_{depth}" for depth in IMAGENET_DEPTHS},
}


def arch(name: str) -> SkipNetArch:
    """The architecture of a published name, e.g. ``"cifar10_rnn_gate_110"``.

    Raises:
        ArchError: no such name; the message lists those of the same data set.
    """
    published = PUBLISHED.get(PUBLISHED_SPELLINGS.get(name, name))
    if published is None:
        dataset = re.match(r"[a-z]+\d*(?=_)", name)
        alike = [known for known in PUBLISHED if dataset and known.startswith(dataset.group() + "_")]
        raise ArchError(f"no published architecture is called {name!r}; known: {', '.join(alike or PUBLISHED)}")
    return published


def published_name(architecture: SkipNetArch) -> str | None:
    """The published name of an architecture (of the CIFAR names, ``cifar...`` before ``svhn...``), if it has one."""
    for name, known in PUBLISHED.items():
        if known.replace() == architecture.replace():
            return name
    return None
