"""A cache of what compilers make: the package and its tests compile everything once.

An entry's name is a hash of the command, the compiler's version and the bytes of every source. It lies in
build/objects, or where SKIPNET_OBJECT_CACHE says; `make clean` removes it, and entries that nobody has used for a month
go by themselves.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("SKIPNET_OBJECT_CACHE") or ROOT / "build" / "objects")
_MONTH = 30 * 24 * 60 * 60


class CompileError(Exception):
    """A compiler has refused; the command and its words."""


def compiled(command: Sequence[str | Path], sources: Iterable[Path], folder: Path = FOLDER) -> Path:
    """The file that ``command -o FILE`` writes, made now or before.

    Args:
        command: a compiler's or linker's, run in the project's root; with paths relative to it, an entry serves
            wherever the project lies.
        sources: all files that it reads, headers too (the compiler's own are known by its version); a folder stands for
            every file in it.
        folder: of the cache.
    """
    words = [str(word) for word in command]
    entry = folder / _key(words, sources)
    folder.mkdir(parents=True, exist_ok=True)
    with entry.with_suffix(".lock").open("w") as lock:  # whoever wants the same at the same time waits for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if entry.exists():
            os.utime(entry)
            return entry
        unfinished = entry.with_suffix(f".{os.getpid()}")  # a process that was ended may have left its compiler running
        done = subprocess.run([*words, "-o", str(unfinished)], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{' '.join(words)}\n{done.stderr}")
        unfinished.replace(entry)
    _remove_unused(folder)
    return entry


def _key(words: Sequence[str], sources: Iterable[Path]) -> str:
    # Of a folder to include from counts what is in it, not where it lies: each virtual environment has its own.
    told = [word for word in words if not word.startswith("-I")]
    content = hashlib.sha256(repr((told, _version(words[0]))).encode())
    for source in sorted(sources, key=lambda source: source.name):
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file():
                content.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()[:32]


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _remove_unused(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # by another process
            if file.stat().st_mtime < time.time() - _MONTH:
                file.unlink()
