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
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(?P<text>[A-Z].*?) *;")
_WIDTHS = {"64": 2, "128": 4}  # registers that a load fills, by its suffix


def find_nvdisasm() -> str | None:
    """Beside the compiler, on the PATH, or Triton's."""
    nvcc = find_nvcc()
    places = [str(Path(nvcc).resolve().parent)] if nvcc else []
    places.append(str(Path(sysconfig.get_path("platlib"), "triton", "backends", "nvidia", "bin")))
    return next(filter(None, (shutil.which("nvdisasm", path=place) for place in [*places, None])), None)


@cache
def kernels(source: str) -> dict[str, list[str]]:
    """The instructions of each kernel in csrc/cuda/SOURCE, without their predicates."""
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    assert nvcc is not None
    assert nvdisasm is not None
    cubin = compiled([nvcc, *FLAGS, "-gencode=arch=compute_90a,code=sm_90a", "-cubin", f"csrc/cuda/{source}"],
                     [*(ROOT / "csrc").glob("*.h"), ROOT / "csrc" / "cuda"])
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    listing: dict[str, list[str]] = {}
    for line in text.splitlines():
        if kernel := _KERNEL.match(line):
            listing[readable(kernel["name"])] = instructions = []
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction["text"])
    return listing


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
