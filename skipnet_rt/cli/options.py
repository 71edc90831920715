"""Options that several commands share, and options from the fields of a dataclass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from skipnet_rt.checkpoint import load
from skipnet_rt.measure.demo import bundled_model
from skipnet_rt.model.network import SkipNet

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ModelPath = Annotated[Path | None, typer.Option(
    "--model", metavar="CKPT", help="A checkpoint, published or .safetensors.", show_default="the bundled one")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="A torch device: cpu, cuda, cuda:1.")]


class CommandError(Exception):
    """What a user asked for cannot be done; the message is one clear line."""


class DTypeName(str, Enum):
    """The dtypes that engines compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def load_or_bundled(path: Path | None) -> SkipNet:
    """The network of ``--model``."""
    return bundled_model() if path is None else load(path)


def short_names(paths: Sequence[Path | None]) -> list[str]:
    """Names of checkpoints: without folder and extension, if that tells them apart."""
    short = ["the bundled network" if path is None else path.name.partition(".")[0] for path in paths]
    return [name if path is None or short.count(name) == 1 else str(path)
            for path, name in zip(paths, short, strict=True)]


def prepare_plots(option: str, folder: Path) -> None:
    """Find out before long work, not after it, that its figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CommandError(f"{option} needs matplotlib; install it with: pip install 'skipnet-rt[plots]'") from None
    folder.mkdir(parents=True, exist_ok=True)


def field_options(kind: type, helps: Mapping[str, str]) -> list[inspect.Parameter]:
    """An option for every field of a dataclass: named, typed, explained and defaulted as it is there.

    Its value is None where it is not given: a default may depend on other options.

    Args:
        kind: the dataclass; its docstring explains its fields under ``Attributes:``.
        helps: what to say of some fields instead.
    """
    hints, explained, options = get_type_hints(kind), {**_attribute_help(kind), **helps}, []
    for field in fields(kind):
        option = typer.Option(f"--{field.name.replace('_', '-')}", help=explained[field.name],
                              show_default=False if field.default in (None, False) else str(field.default))
        options.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None,
                                         annotation=Annotated[option_type(hints[field.name]) | None, option]))
    return options


def _attribute_help(kind: type) -> dict[str, str]:
    """What the ``Attributes:`` section of a class's docstring says of each of its attributes, in plain text."""
    text = inspect.getdoc(kind) or ""
    section = re.search(r"^Attributes:\n((?: .*\n|\n)*)", text + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    helps = {}
    for names, words in entries:
        text = re.sub(r",? see :\w+:`[^`]*`", "", " ".join(words.split()))  # no use in a terminal
        text = re.sub(r":\w+:`([^`]*)`|``([^`]*)``", r"\1\2", text)
        helps.update(dict.fromkeys(names.split(", "), text))
    return helps


def option_type(hint: Any) -> Any:
    """What typer parses for a type: for a choice an enumeration; of a union the first member, the one to be typed."""
    if get_origin(hint) is Literal:
        return Enum("Choice", {value: value for value in get_args(hint)})
    return get_args(hint)[0] if get_args(hint) else hint
