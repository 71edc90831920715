"""Builds CUDA sources for the CPU and runs them; see README.md beside this file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from object_cache import ROOT, compiled

FOLDER = Path(__file__).parent.relative_to(ROOT)
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing",
         "-U_FORTIFY_SOURCE", "-ftrivial-auto-var-init=pattern", "-Wno-unused-function", "-Wno-unknown-pragmas"]


class SimtError(RuntimeError):
    """What a kernel or a launcher did wrong."""


class Library:
    """Entries of one driver, ``tests/simulated/simt/NAME.cpp``: extern "C" functions that return null or a message."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.simt_allocate.restype = ctypes.c_void_p
        self._library.simt_allocate.argtypes = [ctypes.c_size_t]

    def configure(self, seed: int, multiprocessors: int = 3) -> None:
        """Frees all arrays; ``seed`` decides every order from now on."""
        self._library.simt_release()
        self._library.simt_configure(ctypes.c_uint(seed), multiprocessors)

    def launches(self) -> int:
        """How many grids were launched since the last call."""
        return int(self._library.simt_launches())

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
        """An array full of poison (NaN, -1) whose neighbouring memory faults; valid until :meth:`configure`."""
        dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else shape
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._library.simt_allocate(size))
        return np.frombuffer(memory, dtype).reshape(shape)

    def array(self, values: np.ndarray) -> np.ndarray:
        """A copy in guarded memory."""
        copy = self.empty(values.shape, values.dtype)
        copy[...] = values
        return copy

    @contextmanager
    def without(self, source: str, line: int) -> Iterator[None]:
        """Takes out the barrier, fence or wait in a line of a source, a file's name without its folder."""
        self._library.simt_remove(source.encode(), line)
        try:
            yield
        finally:
            self._library.simt_remove(b"", 0)

    @contextmanager
    def plain_accesses(self, closed: bool = False) -> Iterator[list[tuple[str, int, int, int]]]:
        """Counts loads and stores of shared memory: for each line of a source its name, an access's bytes, how often
        128 bytes were moved, and turns that lanes took beyond those. If ``closed``, others fault."""
        tell, told = self._library.simt_plain_accesses, []
        tell.restype = ctypes.c_char_p
        tell(True, closed)
        try:
            yield told
        finally:
            for line in tell(False, False).decode().splitlines():
                place, size, moved, turns = line.split()
                told.append((place.partition(":")[0], int(size), int(moved), int(turns)))

    def __call__(self, entry: str, *arguments: object) -> None:
        """Calls an entry with arrays (as pointers; None is null), ints, bools and floats; raises SimtError."""
        function = getattr(self._library, entry)
        function.restype = ctypes.c_char_p
        message = function(*map(_as_c, arguments))
        if message is not None:
            raise SimtError(message.decode())


def _as_c(argument: object) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int(int(argument))  # type: ignore[call-overload]


def build(name: str, *folders: Path) -> Library:
    """The driver ``tests/simulated/simt/NAME.cpp``, compiled with the sources in some folders before those in csrc/."""
    read = [*(ROOT / FOLDER).glob("*.[ch]*"), *CSRC.glob("*.h"), *(CSRC / "cuda").iterdir()]
    include = [word for folder in (*folders, "csrc", "csrc/cuda", FOLDER) for word in ("-I", folder)]
    return Library(compiled(["g++", *FLAGS, *include, FOLDER / f"{name}.cpp"],
                            [*sorted(read), *(ROOT / folder for folder in folders)]))


@cache
def library(name: str) -> Library:
    """A driver with the sources as they are."""
    return build(name)
