"""The native code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, with a fuzz.

Random shapes, channel counts, gates, batches, routes and thread counts against a reference in double precision.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import variants
from object_cache import ROOT, compiled

from skipnet_rt import _C

SOURCES = ["tests/build/native/fuzz_networks.cpp", "csrc/cpu/thread_team.cpp", "csrc/cpu/instruction_sets.cpp"]
INCLUDED = [ROOT / "csrc" / "cpu", ROOT / "tests" / "build" / "native", *(ROOT / "csrc").glob("*.h")]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


def build(*flags, x86=True):
    """The fuzz program with some compiler flags; without ``x86`` the portable code alone."""
    compiler = ["g++", "-std=c++17", "-g1", "-O1", "-fno-omit-frame-pointer", "-pthread", "-DSKIPNET_SOFTWARE_AMX",
                *(f"-D{name}={value}" for name, value in variants.MACROS if x86), *flags]
    commands = [[*compiler, "-c", source] for source in SOURCES]
    commands += variants.commands(compiler, variants.VARIANTS if x86 else variants.VARIANTS[:1])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda command: compiled(command, INCLUDED), commands))
    return compiled([*compiler, *objects], objects)


def instruction_sets():
    """What this machine runs; AMX, with its tiles in software, wherever the rest of it runs."""
    known = set(_C.instruction_sets())
    return sorted(known | {"amx"} if "avx512bf16" in known else known)


def fuzz(program, *arguments):
    """Runs the fuzz; how it failed, or an empty string."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=600)
    return f"exit status {done.returncode}: {done.stderr[-4000:]}" if done.returncode else ""


def test_fuzz_with_address_and_undefined_behaviour_sanitizers():
    program = build("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for instruction_set in instruction_sets():
        assert fuzz(program, "7", "12", instruction_set) == ""


def test_fuzz_with_thread_sanitizer():
    """The portable code alone: what threads share is the same for all instruction sets."""
    assert fuzz(build("-fsanitize=thread", x86=False), "7", "12", "portable") == ""
