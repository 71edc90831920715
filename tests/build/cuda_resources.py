"""What every CUDA kernel takes of a multiprocessor, in ptxas' words; by itself it prints docs/cuda-design.md's table.

    python tests/build/cuda_resources.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
from machine_code import readable  # noqa: E402
from nvcc import ALL_ARCHS, FLAGS, find_nvcc  # noqa: E402

SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE_ROW = re.compile(r"^\| `(?P<kernel>[^`]+)` \| (?P<registers>\d+) \|", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One kernel's resources on one architecture; bytes."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int
    static_shared: int


def compile_for(nvcc: str, source: str, arch: str) -> list[Kernel]:
    """Compiles one source for one architecture, warnings being errors."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [nvcc, *FLAGS, "-Werror=all-warnings", "-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c",
             str(ROOT / "csrc" / "cuda" / source), "-o", str(Path(folder) / "object.o")],
            capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source} for sm_{arch}: {done.stderr}"
    assert "warning" not in done.stderr.lower(), done.stderr
    kernels = []
    for entry in done.stderr.split("Compiling entry function '")[1:]:
        stack, *spills = (int(n) for n in re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups())
        shared = re.search(r"(\d+) bytes smem", entry)
        kernels.append(Kernel(readable(entry.partition("'")[0]), arch, int(re.search(r"Used (\d+) reg", entry)[1]),
                              stack, sum(spills), int(shared[1]) if shared else 0))
    return kernels


def compile_all(archs: Sequence[str] = ALL_ARCHS, jobs: int = 2) -> list[Kernel]:
    """Every kernel on some architectures."""
    nvcc = find_nvcc()
    assert nvcc is not None
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda pair: compile_for(nvcc, *pair),
                        [(source, arch) for source in SOURCES for arch in archs])
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
