"""Options of a command from the fields of a dataclass, so that what is written there once is not written again."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer


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
                                         annotation=Annotated[_option_type(hints[field.name]) | None, option]))
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


def _option_type(hint: Any) -> Any:
    """What typer parses for a field: for a choice an enumeration; of a union the first member, the one to be typed."""
    if get_origin(hint) is Literal:
        return Enum("Choice", {value: value for value in get_args(hint)})
    return get_args(hint)[0] if get_args(hint) else hint
