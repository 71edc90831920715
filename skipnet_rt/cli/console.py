"""What commands print: results to standard output; progress, warnings and errors to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, NoReturn, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from skipnet_rt.model.arch import BlockPlan, SkipNetArch
from skipnet_rt.training.distributed import place

UNSTEADY = "Times vary a lot from round to round: something else is running, and these figures are rough."


def _console(*, stderr: bool) -> Console:
    """Rich takes a pipe for 80 columns wide; our tables want a little more."""
    given = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, highlight=False, width=None if given else 120)


out, err = _console(stderr=False), _console(stderr=True)


def fail(message: str) -> NoReturn:
    """End with status 1 and one line that says why, and of several ranks which one says it."""
    here = place()
    say(f"error (rank {here.rank} of {here.count})" if here.count > 1 else "error", message)
    raise SystemExit(1)


def say(kind: str, message: str) -> None:
    """One line on standard error, e.g. ``warning: ...``."""
    err.print(Text.assemble((f"{kind}: ", "bold"), message), soft_wrap=True)


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    """:func:`warnings.showwarning`: one line, without the place in the code."""
    say("warning", str(message))


def print_table(title: str, table: Table, note: str = "") -> None:
    """A table under its title, a note under both."""
    out.print()
    out.print(Text(title, style="bold"))
    out.print(table)
    if note:
        out.print(note, markup=False)


def print_json(document: Mapping[str, Any]) -> None:
    """The one document of ``--json``."""
    print(json.dumps(document, indent=2))


@contextlib.contextmanager
def progress(beginning: str, *, shown: bool = True) -> Iterator[Callable[[str, float], None]]:
    """A bar, if there is a terminal and it is to be shown.

    The result is told what is being done and the share of it that is done, 0 to 1.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err if shown and err.is_terminal else Console(quiet=True), transient=True) as bar:
        task = bar.add_task(beginning, total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def amount(count: float) -> str:
    """A count with three or four digits that say something."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f}"


def by(size: tuple[int, int]) -> str:
    """Height and width, e.g. ``32x32``."""
    return f"{size[0]}x{size[1]}"


def groups(architecture: SkipNetArch) -> list[list[BlockPlan]]:
    """The residual blocks of each group."""
    return [list(members) for _, members in groupby(architecture.blocks, key=lambda plan: plan.group)]
