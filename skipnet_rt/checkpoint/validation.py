"""What keeps weights and a card from being those of a network: names, shapes, types and values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from skipnet_rt.model.arch import PUBLISHED, SkipNetArch
from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.preprocessing import Interpolation, Preprocessing

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def empty_network(architecture: SkipNetArch) -> SkipNet:
    """The network without values: it costs no memory, and initialises nothing."""
    with torch.device("meta"):
        return SkipNet(architecture).eval()


def own_name(name: str) -> str:
    """The block's name for its projection, which the published networks hold under a second one, too."""
    return re.sub(r"^(group[0-9]+)_ds([0-9]+)\.", r"\1_layer\2.downsample.", name)


def checked_weights(raw: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
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
        own = own_name(name)
        if not _equal(state.setdefault(own, plain), plain):
            problems.append(f"projection: {own!r} has other values under its second name, groupG_dsI")
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


def differences(state: Mapping[str, Tensor], network: SkipNet) -> list[str]:
    """What keeps weights from being those of this network: names, shapes and values."""
    expected = {own_name(name): tensor.shape for name, tensor in network.state_dict().items()}
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


def name_problems(architecture: SkipNetArch) -> list[str]:
    """What is wrong with an architecture's name: a published one belongs to the published architecture."""
    known = PUBLISHED.get(architecture.name or "", architecture)
    return [] if known.replace() == architecture.replace() else [f"name: this architecture is not {architecture.name}"]


def card_problems(values: dict[str, Any], architecture: SkipNetArch) -> list[str]:
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
                and given.interpolation in get_args(Interpolation)
                and len(given.mean) == len(given.std) == 3
                and all(math.isfinite(value) for value in given.mean)
                and all(math.isfinite(value) and value > 0 for value in given.std)
                and (given.resize_shorter is None or (type(given.resize_shorter) is int and given.resize_shorter > 0)))
    except (TypeError, AttributeError):
        return False
