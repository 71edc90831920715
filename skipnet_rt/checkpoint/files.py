"""What a file holds, read without ever running anything that is in it.

Two formats, told apart by their content and not by their extension:

- the published one, written by ``torch.save`` (zip archives and the older plain pickles): a dictionary of ``iter`` or
  ``epoch``, ``arch``, ``state_dict`` and ``best_prec1``. Source: the published code's training scripts. A bare state
  dictionary is read too, and one under ``model``, where torchvision's training script puts it;
- our own: safetensors, with the architecture and the card as JSON in its metadata.
"""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipnet_rt.checkpoint.error import CheckpointError
from skipnet_rt.checkpoint.metadata import VERSION_KEY, published_training
from skipnet_rt.model.arch import Stage

# `best_prec1` and `iter` can be NumPy scalars, whose pickle names these; the module's name differs by NumPy's version.
# All are pairs of object and name: leaving the context then takes away only these, and no registration of the caller's.
_NUMPY_SCALARS: list[Any] = [
    (np.dtype, "numpy.dtype"),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((kind, f"numpy.dtypes.{kind.__name__}") for kind in (type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8"))),
]
_allowing = threading.Lock()  # PyTorch's list of allowed globals belongs to the process, not to a thread


@dataclass(frozen=True)
class Contents:
    """What is in a file or a module, not yet judged."""

    where: str
    state: Mapping[Any, Any]
    metadata: dict[Any, Any] | None = None  # ours: strings by name, if all is well
    training: dict[str, Any] = field(default_factory=dict)  # the published entries beside the weights
    stage: Stage = "supervised"


def read_contents(path: Path) -> Contents:
    """What a file of either format holds.

    Raises:
        CheckpointError: it cannot be read, or is of another kind.
    """
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


def _safetensors_contents(path: Path) -> Contents:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return Contents(str(path), {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                            metadata if VERSION_KEY in metadata else None)
    except Exception as error:  # what a broken file raises is not documented
        raise CheckpointError(str(path), [f"unreadable: {error}"]) from error


def _torch_contents(path: Path) -> Contents:
    try:
        with _allowing, torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise anything
        raise CheckpointError(str(path), [f"unreadable, and nothing in it was run: {_reason(error)}"]) from None
    entries = _dictionary(path, "content", content)
    name = "state_dict"
    if name not in entries:
        if not (isinstance(entries.get("model"), dict) and entries["model"]):
            return Contents(str(path), entries)
        name = "model"
    return Contents(str(path), _dictionary(path, name, entries[name]),
                    _dictionary(path, VERSION_KEY, entries[VERSION_KEY]) if VERSION_KEY in entries else None,
                    published_training(entries))


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
