"""Checkpoints: trained networks to and from files, without ever running anything that a file holds.

Two formats, told apart by their content and not by their extension:

- the published one, written by ``torch.save`` (zip archives and the older plain pickles): a dictionary of ``iter`` or
  ``epoch``, ``arch``, ``state_dict`` and ``best_prec1``. Source: the published code's training scripts. A bare state
  dictionary is read too;
- our own: safetensors, with the architecture and the card as JSON in its metadata.

What a network is follows from the names and shapes of its weights; what a file says of itself only fills in what
weights cannot tell: the data set, the training stage and the image size.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import secrets
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipnet_rt.model.arch import PUBLISHED, ArchError, GateKind, SkipNetArch, Stage, arch, published_name
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.preprocessing import Preprocessing, default_preprocessing

FORMAT_VERSION = "1"
"""Version of our metadata; files of another version are refused."""

LABELS: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "svhn": tuple("0123456789"),
}
"""Class names of the published data sets that have few, in the order of the logits."""

_VERSION_KEY = "skipnet_rt"  # in the metadata: the format's version; in a torch.save file: all of our metadata
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_TORCH_EXTENSIONS = (".pth", ".pt", ".tar")
_SHOWN_ALIKE = 8  # lines of a CheckpointError's message for one kind of problem
_SHOWN_LENGTH = 240  # characters of one of its lines

# `best_prec1` and `iter` can be NumPy scalars, whose pickle names these; the module's name differs by NumPy's version.
# All are pairs of object and name: leaving the context then takes away only these, and no registration of the caller's.
_NUMPY_SCALARS: list[Any] = [
    (np.dtype, "numpy.dtype"),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((kind, f"numpy.dtypes.{kind.__name__}") for kind in (type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8"))),
]
_allowing = threading.Lock()  # PyTorch's list of allowed globals belongs to the process, not to a thread


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or trusted. Its message names the file and cuts long lists.

    Attributes:
        where: the file, or the class of the module, that was meant.
        problems: everything that was wrong, uncut; of weights with the kind first, as in ``"missing: fc.bias"``.
    """

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where, self.problems = where, tuple(problems)
        super().__init__(where, self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.where}: {_cut(self.problems[0])}"
        lines = [f"{self.where}: {len(self.problems)} problems"]
        for kind, alike in groupby(self.problems, key=lambda problem: problem.partition(":")[0]):
            found = list(alike)
            lines += map(_cut, found[:_SHOWN_ALIKE])
            if len(found) > _SHOWN_ALIKE:
                lines.append(f"{kind}: ... and {len(found) - _SHOWN_ALIKE} more")
        return "\n  ".join(lines)


def _cut(line: str) -> str:
    return line if len(line) <= _SHOWN_LENGTH else f"{line[:_SHOWN_LENGTH]}..."


def load(source: str | os.PathLike[str] | nn.Module) -> SkipNet:
    """A trained network from a checkpoint, or from an instance of the published code's own model classes.

    Reads published ``torch.save`` files (zip or older), bare state dictionaries and our safetensors, recognised by
    their content. The architecture is inferred from the weights. Where these can't tell, the file's own word counts
    if it fits them; without one: 32x32 images for the CIFAR stem and 224x224 for ImageNet's, the supervised stage,
    ``cifar10`` rather than ``svhn``. Weights in float16, bfloat16 and float64 become float32;
    ``num_batches_tracked``, unknown to old PyTorch, becomes 0 where missing.

    Nothing in a file is ever executed: ``torch.load`` runs with ``weights_only=True`` and there is no second try.

    Args:
        source: a file, or a module whose state dictionary has the published names (inside ``nn.DataParallel`` or
            not; its weights are copied). A :class:`~skipnet_rt.model.network.SkipNet` is returned as it is.

    Returns:
        The network in evaluation mode on the CPU. ``model.card.training`` keeps a published file's ``iter`` or
        ``epoch``, ``arch`` and ``best_prec1`` under these names; preprocessing, and labels where the file names
        its data set, are those of the published data set unless the file says otherwise.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or hostile; or names, shapes, types or values
            (NaN, infinity) of weights are wrong. Everything found wrong is listed at once.
        TypeError: ``source`` is neither a path nor a module.

    Warns:
        UserWarning: the file's ``arch`` is a published name that contradicts its weights. The weights win.
    """
    if isinstance(source, nn.Module):
        module = _unwrapped(source)
        if isinstance(module, SkipNet):
            return module
        contents = _module_contents(module)
    elif isinstance(source, (str, os.PathLike)):
        contents = _file_contents(Path(source))
    else:
        raise TypeError(f"source must be a path or a torch.nn.Module, got {type(source).__name__}")
    return _assembled(contents)


def save(model: SkipNet, path: str | os.PathLike[str], *, card: ModelCard | None = None) -> None:
    """Write a network to a file, atomically: the file is there in full, or what was there before is untouched.

    ``.safetensors`` is our own format. ``.pth``, ``.pt`` and ``.tar`` (``.pth.tar``) are the published one, which
    the published code reads into its ``nn.DataParallel``: names prefixed with ``module.``, each projection under
    both of its names, in the pre-zip form that its PyTorch understands. Its ``iter`` or ``epoch``, ``arch`` and
    ``best_prec1`` come from the card's training summary. One more entry, ``skipnet_rt``, which the published code
    never looks at, keeps what the others can't hold, so that both formats can be turned into each other without loss.

    Args:
        model: the network, on any device; weights are written as float32.
        path: where to; the extension chooses the format.
        card: what to write instead of ``model.card``.

    Raises:
        CheckpointError: the extension is unknown, the file cannot be written, or :func:`load` would refuse it
            (weights that are not finite, weights or a card that don't fit the architecture).
    """
    target, where = Path(path), os.fspath(path)
    if target.suffix.lower() not in (".safetensors", *_TORCH_EXTENSIONS):
        raise CheckpointError(where, [f"extension: {target.suffix!r} is unknown; use .safetensors (our own format), "
                                      "or .pth, .pt or .pth.tar (the published one)"])
    card = model.card if card is None else card
    state, problems = _weights(model.state_dict())
    skeleton = _skeleton(model.arch)
    problems += _differences(state, skeleton) + _name_problems(model.arch) + _card_problems(card.to_dict(), model.arch)
    if problems:
        raise CheckpointError(where, problems)
    metadata = _metadata(where, model.arch, card)
    with _replacing(target) as temporary:
        if target.suffix.lower() == ".safetensors":
            import safetensors.torch

            temporary.write_bytes(safetensors.torch.save(state, metadata))
        else:
            published = {f"module.{name}": state[_own_name(name)] for name in skeleton.state_dict()}
            torch.save({**_summary(model.arch, card), "state_dict": published, _VERSION_KEY: metadata}, temporary,
                       _use_new_zipfile_serialization=False)


def convert(source: str | os.PathLike[str] | nn.Module, target: str | os.PathLike[str]) -> SkipNet:
    """Read a checkpoint and write it in the format of the target's extension, bitwise equal in every float32 weight.

    Returns:
        The network that was read.

    Raises:
        CheckpointError: as :func:`load` and :func:`save` do.
    """
    model = load(source)
    save(model, target)
    return model


# What a source holds.

@dataclass(frozen=True)
class _Contents:
    """What was found in a file or a module, not yet judged."""

    where: str
    state: Mapping[Any, Any]
    metadata: dict[Any, Any] | None = None  # ours: strings by name, if all is well
    training: dict[str, Any] = field(default_factory=dict)  # the published entries beside the weights
    stage: Stage = "supervised"


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    return module


def _module_contents(module: nn.Module) -> _Contents:
    kind = type(module).__name__
    # The published reinforced networks say RL in their class names and collect their gates' decisions here.
    reinforced = "RL" in kind or hasattr(module, "saved_actions")
    return _Contents(kind, module.state_dict(), stage="reinforced" if reinforced else "supervised")


def _file_contents(path: Path) -> _Contents:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise CheckpointError(str(path), [f"unreadable: {error}"]) from error
    if head[8:] == b"{":  # eight bytes of length, then a JSON object
        return _safetensors_contents(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a pickle
        return _torch_contents(path)
    begins = f"begins with {head!r}" if head else "is empty"
    raise CheckpointError(str(path), [f"not a checkpoint: neither safetensors nor written by torch.save; it {begins}"])


def _safetensors_contents(path: Path) -> _Contents:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return _Contents(str(path), {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                             metadata if _VERSION_KEY in metadata else None)
    except Exception as error:  # what a broken file raises is not documented
        raise CheckpointError(str(path), [f"unreadable: {error}"]) from error


def _torch_contents(path: Path) -> _Contents:
    try:
        with _allowing, torch.serialization.safe_globals(_NUMPY_SCALARS):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise anything
        raise CheckpointError(str(path), [f"unreadable, and nothing in it was run: {_reason(error)}"]) from None
    entries = _dictionary(path, "content", found)
    if "state_dict" not in entries:
        return _Contents(str(path), entries)
    return _Contents(str(path), _dictionary(path, "state_dict", entries["state_dict"]),
                     _dictionary(path, _VERSION_KEY, entries[_VERSION_KEY]) if _VERSION_KEY in entries else None,
                     _training(entries))


def _dictionary(path: Path, name: str, value: Any) -> dict[Any, Any]:
    """A plain copy of a dictionary from a file, which may have hidden an ordered one's methods behind attributes."""
    if not isinstance(value, dict):
        raise CheckpointError(str(path), [f"not a checkpoint: {name} is a {type(value).__name__}, not a dictionary"])
    return dict(dict.items(value))


def _reason(error: BaseException) -> str:
    """What was wrong, in PyTorch's own words."""
    if isinstance(error, pickle.UnpicklingError) and error.__context__:
        error = error.__context__  # the error itself wraps the reason in advice to load the file unsafely
    sentence = re.split(r"\. |\n", str(error))[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def _training(found: Mapping[Any, Any]) -> dict[str, Any]:
    """The published entries beside the weights, as plain values; those that are none are left out."""
    numbers = {name: _number(found.get(name)) for name in ("iter", "epoch", "best_prec1")}
    training: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    return {**training, "arch": found["arch"]} if isinstance(found.get("arch"), str) else training


def _number(value: Any) -> int | float | None:
    """A Python number from what training scripts store as one: a tensor or array scalar of one element, too."""
    if isinstance(value, (Tensor, np.generic)) and math.prod(value.shape) == 1:
        with suppress(RuntimeError):  # a tensor without a value
            value = value.item()
    return value if type(value) in (int, float) else None


# From contents to a network.

def _assembled(contents: _Contents) -> SkipNet:
    state, problems = _weights(contents.state)
    try:
        inferred = _inferred({name: tuple(tensor.shape) for name, tensor in state.items()})
        if contents.metadata is None:
            architecture, card = _named(inferred, contents), ModelCard(training=contents.training)
        else:
            architecture, card = _described(inferred, contents.metadata)
    except ValueError as error:
        raise CheckpointError(contents.where, [*problems, str(error)]) from None
    skeleton = _skeleton(architecture)
    for name, tensor in skeleton.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(_own_name(name), torch.zeros_like(tensor, device="cpu"))
    problems += _differences(state, skeleton)
    if problems:
        raise CheckpointError(contents.where, problems)
    skeleton.load_state_dict(state, strict=False, assign=True)  # not strict: projections come under one name only
    skeleton.card = _completed(card, architecture)
    return skeleton


def _skeleton(architecture: SkipNetArch) -> SkipNet:
    """The network without values: it costs no memory, and initialises nothing."""
    with torch.device("meta"):
        return SkipNet(architecture).eval()


def _own_name(name: str) -> str:
    """The block's name for its projection, which the published networks hold under a second one, too."""
    return re.sub(r"^(group[0-9]+)_ds([0-9]+)\.", r"\1_layer\2.downsample.", name)


def _weights(raw: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Copies of all weights, float32 on the CPU, under plain names; and what was wrong with them.

    A weight that is wrong in itself is replaced by one without values, so that its shape can still be looked at.
    """
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    # nn.DataParallel puts module. before every name; only what all of them have is such a prefix.
    prefix = min((re.findall(r"^(?:module\.)*", key)[0] for key in raw if isinstance(key, str)), default="")
    for key, value in raw.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            problems.append(f"not a named tensor: {key!r} ({type(value).__name__})")
            continue
        name, value = key.removeprefix(prefix), value.data  # .data: without attributes that came with it
        integer = name.endswith("num_batches_tracked")
        if problem := _tensor_problem(value, integer):
            problems.append(f"{problem[0]}: {name!r} {problem[1]}")
            plain = torch.empty(value.shape, device="meta")
        else:
            plain = value.to("cpu", torch.int64 if integer else torch.float32, copy=True).contiguous()
        own_name = _own_name(name)
        if not _equal(state.setdefault(own_name, plain), plain):
            problems.append(f"projection: {own_name!r} has other values under its second name, groupG_dsI")
    return state, problems


def _tensor_problem(tensor: Tensor, integer: bool) -> tuple[str, str] | None:
    """The kind of problem and its description, if a tensor cannot be a weight."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return "storage", f"is {tensor.layout} on {tensor.device.type}, expected a dense tensor with values"
    if tensor.dtype not in (_INTEGERS if integer else _FLOATS):
        return "type", f"is {tensor.dtype}, expected {'an integer' if integer else 'floating point'}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        # Strides of 0 let a few bytes pose as any amount of memory.
        return "storage", f"claims {tensor.numel()} values and stores fewer"
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are the same; those without values count as such."""
    if one is other or one.is_meta or other.is_meta:
        return True
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _differences(state: Mapping[str, Tensor], skeleton: SkipNet) -> list[str]:
    """What keeps weights from being those of this network: names, shapes and values."""
    expected = {_own_name(name): tensor.shape for name, tensor in skeleton.state_dict().items()}
    common = [name for name in expected if name in state]
    return [
        *(f"missing: {name}" for name in expected if name not in state),
        *(f"unexpected: {name!r}" for name in state if name not in expected),
        *(f"shape: {name} is {list(state[name].shape)}, expected {list(expected[name])}"
          for name in common if state[name].shape != expected[name]),
        *(f"not finite: {name} has {_not_finite(state[name])}" for name in common if not _all_finite(state[name])),
    ]


def _all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; weights without values have none."""
    # NaN and infinity survive any sum: one pass finds almost every network sound, without a mask of its size.
    return tensor.is_meta or math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def _not_finite(tensor: Tensor) -> str:
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} NaN and {infinite} infinite of {tensor.numel()} values"


# The architecture, from the weights.

def _inferred(shapes: Mapping[str, tuple[int, ...]]) -> SkipNetArch:
    """The architecture that names and shapes belong to; where single ones are wrong, what most of them say.

    Raises:
        ArchError: there are no blocks, or no network has blocks like these.
    """
    block, dense_block = r"group([0-9]{1,3})_layer([0-9]{1,3})\.", r"layer([0-9]{1,3})\.([0-9]{1,3})\."
    gated = any(re.match(block, name) for name in shapes)
    depths: dict[int, int] = {}
    for found in filter(None, (re.match(block if gated else dense_block, name) for name in shapes)):
        group, position = map(int, found.groups())
        depths[group] = max(depths.get(group, 1), position + 1)
    groups = range(1, max(depths, default=0) + 1)
    if not groups:
        raise ArchError("no residual blocks under the published names (group1_layer0. or layer1.0.); "
                        f"found {', '.join(map(repr, list(shapes)[:_SHOWN_ALIKE])) or 'nothing'}")
    if len(groups) + sum(depths.values()) > len(shapes):  # every block has ten names: don't build what isn't there
        raise ArchError(f"{len(groups)} groups of up to {max(depths.values())} blocks have only {len(shapes)} weights")
    first = r"group{0}_layer[0-9]+\.(conv1|bn1)\.\w+" if gated else r"layer{0}\.[0-9]+\.(conv1|bn1)\.\w+"
    kernel = _vote(shapes, r"conv1\.weight", 3, otherwise=7 if len(groups) == 4 else 3)
    imagenet = kernel == 7
    side = max(224, 4 << len(groups)) if imagenet else max(32, 1 << len(groups))  # 2x2 in the last group, or more
    return SkipNetArch(
        stem="imagenet" if imagenet else "cifar",
        block="bottleneck" if any(name.endswith(".conv3.weight") for name in shapes) else "basic",
        depths=tuple(depths.get(group, 1) for group in groups),
        widths=tuple(_vote(shapes, first.format(group), 0, otherwise=1) for group in groups),
        gate=_inferred_gate(shapes) if gated else "none",
        num_classes=_vote(shapes, r"fc\.\w+", 0, otherwise=10),
        image_size=(side, side),
        in_channels=_vote(shapes, r"conv1\.weight", 1, otherwise=3),
        embed_dim=_vote(shapes, r"group[0-9]+_gate[0-9]+\.1\.\w+", 0, otherwise=10),
        hidden_dim=_vote(shapes, r"control\.(rnn\.weight_hh_l0|proj\.weight)", 1, otherwise=10),
    )


def _inferred_gate(names: Iterable[str]) -> GateKind:
    parts = {found[1] for found in (re.match(r"group[0-9]+_gate[0-9]+\.(\w+)\.", name) for name in names) if found}
    if not parts & {"conv1", "conv2", "linear_layer"}:
        return "rnn"
    return "feedforward1" if "conv2" in parts else "feedforward2"


def _vote(shapes: Mapping[str, tuple[int, ...]], pattern: str, axis: int, *, otherwise: int) -> int:
    """The size along an axis that most of the weights of such names have."""
    sizes = Counter(shape[axis] for name, shape in shapes.items() if len(shape) > axis and re.fullmatch(pattern, name))
    return sizes.most_common(1)[0][0] if sizes else otherwise


def _published(name: Any) -> SkipNetArch | None:
    with suppress(ArchError):
        return arch(name) if isinstance(name, str) else None
    return None


def _named(inferred: SkipNetArch, contents: _Contents) -> SkipNetArch:
    """The inferred architecture with what a published file's ``arch`` adds to it, if that fits."""
    declared = _published(contents.training.get("arch"))
    if declared and inferred.replace(stage=declared.stage, image_size=declared.image_size) == declared.replace():
        return declared
    if inferred.gated:
        inferred = inferred.replace(stage=contents.stage)
    inferred = inferred.replace(name=published_name(inferred))
    if declared:
        warnings.warn(f"{contents.where} calls itself {contents.training['arch']}, but its weights are those of "
                      f"{inferred}; the weights win", stacklevel=4)  # 4: who called load()
    return inferred


# Our metadata: the same strings in both formats.

def _metadata(where: str, architecture: SkipNetArch, card: ModelCard) -> dict[str, str]:
    try:
        return {_VERSION_KEY: FORMAT_VERSION, "architecture": json.dumps(architecture.to_dict()),
                "card": json.dumps(card.to_dict())}
    except (TypeError, ValueError) as error:
        raise CheckpointError(where, [f"card: its training summary must hold plain values only: {error}"]) from error


def _described(inferred: SkipNetArch, metadata: Mapping[Any, Any]) -> tuple[SkipNetArch, ModelCard]:
    """Architecture and card as our metadata give them, after making sure that the weights agree.

    The weights come first for safety, too: a network of the size that a few digits ask for is never built.

    Raises:
        ValueError: the metadata are of another version, or say what cannot be.
    """
    if metadata.get(_VERSION_KEY) != FORMAT_VERSION:
        raise ValueError(f"the metadata's version {metadata.get(_VERSION_KEY)!r} is unknown to this skipnet-rt, "
                         f"which reads version {FORMAT_VERSION}")
    architecture = _agreed(inferred, _json_object(metadata, "architecture"))
    card = _json_object(metadata, "card")
    if problems := _name_problems(architecture) + _card_problems(card, architecture):
        raise ValueError("; ".join(problems))
    return architecture, ModelCard.from_dict(card)


def _json_object(metadata: Mapping[Any, Any], name: str) -> dict[str, Any]:
    text = metadata.get(name)
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {text!r}")
    return value


def _agreed(inferred: SkipNetArch, described: dict[str, Any]) -> SkipNetArch:
    """The described architecture, which may differ from the inferred one in what weights can't tell."""
    known = json.loads(json.dumps(inferred.to_dict()))  # tuples become lists, as in the description
    for key in known.keys() - {"stage", "image_size", "name"}:
        if described.get(key, known[key]) != known[key]:
            raise ValueError(f"architecture says {key} {described[key]!r}, the weights say {known[key]!r}")
    if not isinstance(described.get("name"), (str, NoneType)):
        raise ValueError(f"architecture has a name that is none: {described['name']!r}")
    return SkipNetArch.from_dict({**known, **described})


def _name_problems(architecture: SkipNetArch) -> list[str]:
    known = PUBLISHED.get(architecture.name or "", architecture)
    return [] if known.replace() == architecture.replace() else [f"name: this architecture is not {architecture.name}"]


def _card_problems(values: dict[str, Any], architecture: SkipNetArch) -> list[str]:
    """What is wrong with a card's plain values, for this architecture."""
    problems = []
    labels, preprocessing, training = (values.get(key) for key in ("labels", "preprocessing", "training"))
    if labels is not None and not (isinstance(labels, list) and len(labels) == architecture.num_classes
                                   and all(isinstance(label, str) for label in labels)):
        problems.append(f"card: labels must be {architecture.num_classes} strings, got {labels!r}")
    if preprocessing is not None and not _preprocessing_fits(preprocessing, architecture):
        problems.append(f"card: preprocessing must be that of images of {architecture.image_size} pixels, "
                        f"got {preprocessing!r}")
    if training is not None and not isinstance(training, dict):
        problems.append(f"card: training must be a dictionary, got {training!r}")
    return problems


def _preprocessing_fits(values: Any, architecture: SkipNetArch) -> bool:
    try:
        given = Preprocessing.from_dict(values)
        return (given.image_size == architecture.image_size
                and len(given.mean) == len(given.std) == 3
                and all(math.isfinite(value) for value in given.mean)
                and all(math.isfinite(value) and value > 0 for value in given.std)
                and (given.resize_shorter is None or (type(given.resize_shorter) is int and given.resize_shorter > 0)))
    except (TypeError, AttributeError):
        return False


def _completed(card: ModelCard, architecture: SkipNetArch) -> ModelCard:
    """The card with the published data set's preprocessing and labels where it has none of its own.

    Labels only if the file itself names the data set: ten classes of 32x32 pixels could be anything.
    """
    labels = None
    if architecture.name and _published(card.training.get("arch")) == architecture:
        labels = LABELS.get(architecture.name.partition("_")[0])
    return replace(card, labels=card.labels or labels,
                   preprocessing=card.preprocessing or default_preprocessing(architecture.name))


# Writing.

def _summary(architecture: SkipNetArch, card: ModelCard) -> dict[str, Any]:
    """The published entries beside the weights: its CIFAR scripts count iterations, its ImageNet scripts epochs."""
    training = card.training
    usual = "iter" if architecture.stem == "cifar" else "epoch"
    counter = next((name for name in ("iter", "epoch") if name in training), usual)
    return {counter: training.get(counter, 0), "arch": training.get("arch", str(architecture)),
            "best_prec1": training.get("best_prec1", 0.0)}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if all goes well, and is gone if not."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch raises the latter for the former
        raise CheckpointError(str(path), [f"unwritable: {error}"]) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
