"""From the way docstrings are written here to what the site's generator understands."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
# "    device, dtype: where and in what to compute." and the deeper lines that go on with it.
TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.+(?:\n\1 +.+)*)", re.MULTILINE)

# What follows "Returns:", and in it a line that goes on with the one before, not "rows: int32 [N] ...".
RETURNS = re.compile(r"(?<=Returns:\n)(?: +\S.*\n?)+")
GOES_ON = re.compile(r"(?<=\n)(?= +(?!\w+: ))")


def link(role: re.Match[str]) -> str:
    """:func:`skipnet_rt.load` as a link; where the name is not documented the name alone stands there."""
    short, name = role.groups()
    shown = name.rpartition(".")[2] if short else name.removeprefix("skipnet_rt.")
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'


def apart(entry: re.Match[str]) -> str:
    """An entry for several parameters as one for each."""
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


def one_text(section: re.Match[str]) -> str:
    """A returned value's description as one entry, however many lines it has."""
    return GOES_ON.sub("    ", section[0])


class Docstrings(griffe.Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was collected."""
        if obj.docstring:
            text = ROLE.sub(link, obj.docstring.value)
            obj.docstring.value = RETURNS.sub(one_text, TOGETHER.sub(apart, text))
