"""What a checkpoint can have wrong with it, in one exception."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

SHOWN_ALIKE = 8  # of the problems of one kind, in a message
_SHOWN_LENGTH = 240  # characters of one of its lines


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
            same = list(alike)
            lines += map(_cut, same[:SHOWN_ALIKE])
            if len(same) > SHOWN_ALIKE:
                lines.append(f"{kind}: ... and {len(same) - SHOWN_ALIKE} more")
        return "\n  ".join(lines)


def _cut(line: str) -> str:
    return line if len(line) <= _SHOWN_LENGTH else f"{line[:_SHOWN_LENGTH]}..."
