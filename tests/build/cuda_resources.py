"""What every CUDA kernel takes of a multiprocessor, says cuobjdump; by itself it prints docs/cuda-design.md's table.

    python tests/build/cuda_resources.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
from machine_code import cubin, find_tool, readable  # noqa: E402
from nvcc import ALL_ARCHS  # noqa: E402

SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
RESERVED = 1024  # bytes of shared memory that the system takes from sm_90 on, of every kernel that has some
TABLE_ROW = re.compile(r"^\| `(?P<kernel>[^`]+)` \| (?P<registers>\d+) \|", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One kernel's resources on one architecture; bytes. What registers cannot hold goes to the stack."""

    name: str
    arch: str
    registers: int
    stack: int
    static_shared: int


def compile_for(source: str, arch: str) -> list[Kernel]:
    """Compiles one source for one architecture."""
    cuobjdump = find_tool("cuobjdump")
    assert cuobjdump is not None
    listing = subprocess.run([cuobjdump, "-res-usage", str(cubin(source, arch))], capture_output=True, text=True,
                             check=True).stdout
    found = re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", listing)
    reserved = RESERVED if int(arch.rstrip("a")) >= 90 else 0
    return [Kernel(readable(name), arch, int(registers), int(stack), max(0, int(shared) - reserved))
            for name, registers, stack, shared in (each.groups() for each in found)]


def compile_all(archs: Sequence[str] = ALL_ARCHS, jobs: int = 2) -> list[Kernel]:
    """Every kernel on some architectures."""
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda pair: compile_for(*pair), [(source, arch) for source in SOURCES for arch in archs])
        return [kernel for kernels in done for kernel in kernels]


def table(kernels: list[Kernel]) -> str:
    """Markdown: the budget, which is the most registers anywhere in the hardware's units of 8, and each count."""
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    lines = ["| kernel | budget | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
             "|---|---|" + "---|" * len(archs)]
    for name in sorted({kernel.name for kernel in kernels}):
        counts = {kernel.arch: kernel.registers for kernel in kernels if kernel.name == name}
        lines.append(f"| `{name}` | {min(255, -(-max(counts.values()) // 8) * 8)} | "
                     + " | ".join(str(counts.get(arch, "")) for arch in archs) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(compile_all()) + "\n")
