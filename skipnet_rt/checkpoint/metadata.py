"""What a file says beside the weights: our metadata, and the published entries.

Our metadata are the same strings in both formats. What a network is follows from the names and shapes of its weights;
what a file says of itself only fills in what weights cannot tell: the data set, the training stage and the image size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from types import NoneType
from typing import Any

import numpy as np
from torch import Tensor

from skipnet_rt.checkpoint.error import CheckpointError
from skipnet_rt.checkpoint.validation import card_problems, name_problems
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.card import ModelCard

FORMAT_VERSION = "1"
"""Version of our metadata; files of another version are refused."""

VERSION_KEY = "skipnet_rt"
"""In the metadata: the format's version; in a torch.save file: all of our metadata."""


def to_metadata(where: str, architecture: SkipNetArch, card: ModelCard) -> dict[str, str]:
    """Architecture and card as our metadata; ``where`` is for the error of a card that cannot be written."""
    try:
        return {VERSION_KEY: FORMAT_VERSION, "architecture": json.dumps(architecture.to_dict()),
                "card": json.dumps(card.to_dict())}
    except (TypeError, ValueError) as error:
        raise CheckpointError(where, [f"card: its training summary must hold plain values only: {error}"]) from error


def from_metadata(inferred: SkipNetArch, metadata: Mapping[Any, Any]) -> tuple[SkipNetArch, ModelCard]:
    """Architecture and card as our metadata give them, after making sure that the weights agree.

    The weights come first for safety, too: a network of the size that a few digits ask for is never built.

    Raises:
        ValueError: the metadata are of another version, or say what cannot be.
    """
    if metadata.get(VERSION_KEY) != FORMAT_VERSION:
        raise ValueError(f"the metadata's version {metadata.get(VERSION_KEY)!r} is unknown to this skipnet-rt, "
                         f"which reads version {FORMAT_VERSION}")
    architecture = _agreed(inferred, _json_object(metadata, "architecture"))
    card = _json_object(metadata, "card")
    if problems := name_problems(architecture) + card_problems(card, architecture):
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


def published_training(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The published entries beside the weights, as plain values; those that are none are left out."""
    numbers = {name: _number(entries.get(name)) for name in ("iter", "epoch", "best_prec1")}
    training: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    return {**training, "arch": entries["arch"]} if isinstance(entries.get("arch"), str) else training


def _number(value: Any) -> int | float | None:
    """A Python number from what training scripts store as one: a tensor or array scalar of one element, too."""
    if isinstance(value, (Tensor, np.generic)) and math.prod(value.shape) == 1:
        with suppress(RuntimeError):  # a tensor without a value
            value = value.item()
    return value if type(value) in (int, float) else None


def published_entries(architecture: SkipNetArch, card: ModelCard) -> dict[str, Any]:
    """The published entries beside the weights: its CIFAR scripts count iterations, its ImageNet scripts epochs."""
    training = card.training
    usual = "iter" if architecture.stem == "cifar" else "epoch"
    counter = next((name for name in ("iter", "epoch") if name in training), usual)
    return {counter: training.get(counter, 0), "arch": training.get("arch", str(architecture)),
            "best_prec1": training.get("best_prec1", 0.0)}
