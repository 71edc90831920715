"""What nvcc makes of a CUDA source for sm_90, kernel by kernel: instructions as nvdisasm prints them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cuda_resources import readable
from nvcc import FLAGS, find_nvcc
from object_cache import ROOT, compiled

_KERNEL = re.compile(r"^\.text\.(?P<name>\w+):")
_LABEL = re.compile(r"^(?P<label>\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+ )?(?P<text>[A-Z].*?) *;")
_BRANCH = re.compile(r"(?P<condition>@\S+ )?BRA.*`\((?P<label>\.L_x_\d+)\)")
_WIDTHS = {"64": 2, "128": 4}  # registers that a load fills, by its suffix


def find_nvdisasm() -> str | None:
    """Beside the compiler, on the PATH, or Triton's."""
    nvcc = find_nvcc()
    places = [str(Path(nvcc).resolve().parent)] if nvcc else []
    places.append(str(Path(sysconfig.get_path("platlib"), "triton", "backends", "nvidia", "bin")))
    return next(filter(None, (shutil.which("nvdisasm", path=place) for place in [*places, None])), None)


@cache
def listings(source: str) -> dict[str, list[str]]:
    """The code of each kernel in csrc/cuda/SOURCE: instructions with their predicates, and labels."""
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    assert nvcc is not None
    assert nvdisasm is not None
    cubin = compiled([nvcc, *FLAGS, "-gencode=arch=compute_90a,code=sm_90a", "-cubin", f"csrc/cuda/{source}"],
                     [*(ROOT / "csrc").glob("*.h"), ROOT / "csrc" / "cuda"])
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    listing: dict[str, list[str]] = {}
    for line in text.splitlines():
        if kernel := _KERNEL.match(line):
            listing[readable(kernel["name"])] = code = []
        elif label := _LABEL.match(line):
            code.append(label["label"])
        elif instruction := _INSTRUCTION.match(line):
            code.append((instruction["predicate"] or "") + instruction["text"])
    return listing


def without_predicates(code: list[str]) -> list[str]:
    """Instructions alone."""
    return [re.sub(r"^@\S+ ", "", line) for line in code if not line.startswith(".L")]


@cache
def kernels(source: str) -> dict[str, list[str]]:
    """The instructions of each kernel in csrc/cuda/SOURCE, without their predicates."""
    return {name: without_predicates(code) for name, code in listings(source).items()}


def loops(code: list[str]) -> Iterator[list[str]]:
    """What lies between a label and each branch back to it."""
    places = {line: place for place, line in enumerate(code) if line.startswith(".L")}
    for place, line in enumerate(code):
        branch = _BRANCH.match(line)
        if branch and places.get(branch["label"], place) < place:
            yield code[places[branch["label"]]:place + 1]


def main_path(loop: list[str], keep: str) -> list[str]:
    """A loop's instructions when branches are taken over what has a loop of its own, but for what holds ``keep``."""
    places = {line: place for place, line in enumerate(loop) if line.startswith(".L")}
    path, place = [], 0
    while place < len(loop):
        path.append(loop[place])
        branch = _BRANCH.match(loop[place])
        target = places.get(branch["label"], 0) if branch else 0
        skipped = loop[place:target]
        rare = any(True for _ in loops(skipped)) and not any(keep in line for line in skipped)
        place = target if rare else place + 1
    return without_predicates(path)


def count(instructions: list[str], pattern: str) -> int:
    """How many begin with a pattern."""
    return sum(re.match(pattern, instruction) is not None for instruction in instructions)


def loads_under_way(instructions: list[str]) -> Iterator[int]:
    """Wherever a register is used that a load from global memory fills: how many loads were issued since the last such
    place, in the order in which the code lies in memory."""
    pending: dict[str, int] = {}
    issued = 0
    for instruction in instructions:
        if pending.keys() & set(re.findall(r"\bR\d+\b", instruction)):
            yield issued
            pending, issued = {}, 0
        if instruction.startswith("LDG"):
            first = int(re.search(r" R(\d+),", instruction)[1])
            width = max((_WIDTHS.get(suffix, 1) for suffix in instruction.split()[0].split(".")), default=1)
            pending |= {f"R{first + i}": 1 for i in range(width)}
            issued += 1
