"""What nvcc makes of a CUDA source for sm_90: a kernel's instructions as nvdisasm prints them, and ways through it."""

from __future__ import annotations

import heapq
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from nvcc import FLAGS, find_nvcc
from object_cache import ROOT, compiled

_KERNEL = re.compile(r"^\.text\.(?P<name>\w+):")
_LABEL = re.compile(r"^(?P<name>\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+ )?\s*(?P<text>[A-Z].*?) *;\s+/\* 0x[0-9a-f]{16} \*/")
_UPPER_HALF = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_WIDTHS = {"64": 2, "128": 4}  # registers that a load fills, by its suffix
_ENDS = ("EXIT", "RET", "BRX")


class Instruction(str):
    """An instruction's text without its predicate, and what the compiler tells the scheduler with it.

    Attributes:
        predicated: it may not be executed.
        stall: cycles before the warp's next instruction.
        awaits: a mask of six scoreboards that must be free before it issues.
        result, operands: the scoreboard that is free once its result is there, its operands are read; 7: none.
        target: of a branch, the index of an instruction in its kernel.
    """

    predicated: bool
    stall: int
    awaits: int
    result: int
    operands: int
    target: int | None = None

    def __new__(cls, text: str, predicated: bool, upper_half: int) -> Instruction:
        self = super().__new__(cls, text)
        self.predicated = predicated
        self.stall = upper_half >> 41 & 15
        self.result = upper_half >> 46 & 7
        self.operands = upper_half >> 49 & 7
        self.awaits = upper_half >> 52 & 63
        return self

    def replaced(self, text: str) -> Instruction:
        """Another instruction that the scheduler is told the same with."""
        other = str.__new__(Instruction, text)
        vars(other).update(vars(self))
        return other


def readable(mangled: str) -> str:
    """A kernel's name without its namespaces and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|skipnet::(cuda::)?", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for place, letter in enumerate(name):  # the parameters start at the first parenthesis outside of <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    return re.sub(r"\((?:int|bool)\)", "", name).replace("> >", ">>")


def find_tool(name: str) -> str | None:
    """nvdisasm or cuobjdump: beside the compiler, on the PATH, or Triton's."""
    nvcc = find_nvcc()
    places = [str(Path(nvcc).resolve().parent)] if nvcc else []
    places.append(str(Path(sysconfig.get_path("platlib"), "triton", "backends", "nvidia", "bin")))
    return next(filter(None, (shutil.which(name, path=place) for place in [*places, None])), None)


def find_nvdisasm() -> str | None:
    return find_tool("nvdisasm")


def cubin(source: str, arch: str) -> Path:
    """csrc/cuda/SOURCE compiled for one architecture, without what runs on the host; a warning is an error."""
    nvcc = find_nvcc()
    assert nvcc is not None
    return compiled([nvcc, *FLAGS, "-Werror=all-warnings", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
                     f"csrc/cuda/{source}"], [*(ROOT / "csrc").glob("*.h"), ROOT / "csrc" / "cuda"])


@cache
def kernels(source: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in csrc/cuda/SOURCE."""
    nvdisasm = find_nvdisasm()
    assert nvdisasm is not None
    lines = subprocess.run([nvdisasm, "-c", "-hex", str(cubin(source, "90a"))], capture_output=True, text=True,
                           check=True).stdout.splitlines()
    listing: dict[str, list[Instruction]] = {}
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for number, line in enumerate(lines):
        if kernel := _KERNEL.match(line):
            listing[readable(kernel["name"])] = instructions = []
        elif label := _LABEL.match(line):
            labels[label["name"]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            upper_half = _UPPER_HALF.search(lines[number + 1])
            assert upper_half is not None, line
            instructions.append(Instruction(found["text"], bool(found["predicate"]), int(upper_half[1], 16)))
    for instruction in (instruction for each in listing.values() for instruction in each):
        if target := re.search(r"`\((\.L_x_\d+)\)", instruction):
            instruction.target = labels[target[1]]
    return listing


def count(instructions: Sequence[str], pattern: str) -> int:
    """How many begin with a pattern."""
    return sum(re.match(pattern, instruction) is not None for instruction in instructions)


def loads_under_way(instructions: Sequence[str]) -> Iterator[int]:
    """Wherever a register is used that a load from global memory fills: how many loads were issued since the last such
    place, in the order in which the code lies in memory."""
    pending: dict[str, int] = {}
    issued = 0
    for instruction in instructions:
        if pending.keys() & set(re.findall(r"\bR\d+\b", instruction)):
            yield issued
            pending, issued = {}, 0
        if instruction.startswith("LDG."):
            first = re.search(r" R(\d+),", instruction)
            assert first is not None
            width = max((_WIDTHS.get(suffix, 1) for suffix in instruction.split()[0].split(".")), default=1)
            pending |= {f"R{int(first[1]) + i}": 1 for i in range(width)}
            issued += 1


def successors(instructions: Sequence[Instruction], at: int) -> list[int]:
    """Where a warp may go on whose lanes stay together."""
    instruction = instructions[at]
    if instruction.startswith("BRA") and not instruction.startswith("BRA.DIV"):
        always = not instruction.predicated and instruction.startswith(("BRA `", "BRA.U `"))
        return [target for target in [instruction.target, None if always else at + 1] if target is not None]
    if instruction.startswith(_ENDS) and not instruction.predicated:
        return []
    return [at + 1] if at + 1 < len(instructions) else []


def way(instructions: Sequence[Instruction], start: int, places: Sequence[Callable[[int], bool]]) -> list[int]:
    """The shortest way from an instruction through one of each kind of place, in order: the places' indices and all
    between them, without the first."""
    passed: list[int] = []
    for is_there in places:
        previous: dict[int, int] = {}
        heap = [(1, after, start) for after in successors(instructions, start)]
        while True:
            if not heap:
                raise ValueError(f"no way from instruction {start}: {instructions[start]}")
            distance, at, before = heapq.heappop(heap)
            if at in previous:
                continue
            previous[at] = before
            if is_there(at):
                break
            for after in successors(instructions, at):
                heapq.heappush(heap, (distance + 1, after, at))
        back = [at]
        while previous[back[-1]] != start:
            back.append(previous[back[-1]])
        passed += reversed(back)
        start = at
    return passed
