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


def compiler(*flags, x86=True):
    """With debug information for stacks, not for debuggers."""
    return ["g++", "-std=c++17", "-g1", "-O1", "-fno-omit-frame-pointer", "-pthread", "-DSKIPNET_SOFTWARE_AMX",
            *(f"-D{name}={value}" for name, value in variants.MACROS if x86), *flags]


def objects(commands):
    """Compiled files, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda command: compiled(command, INCLUDED), commands))


def program(compiler, instruction_sets):
    """The fuzz, linked with the code for some instruction sets."""
    common = [[*compiler, "-c", source] for source in SOURCES]
    files = objects([*common, *variants.commands(compiler, instruction_sets)])
    return compiled([*compiler, *files], files)


def instruction_sets():
    """What this machine runs; AMX, with its tiles in software, wherever the rest of it runs."""
    known = set(_C.instruction_sets())
    return sorted(known | {"amx"} if "avx512bf16" in known else known)


def fuzz(program, *arguments):
    """Runs the fuzz; how it failed, or an empty string."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=600)
    return f"exit status {done.returncode}: {done.stderr[-4000:]}" if done.returncode else ""


# Calls in place of AddressSanitizer's inlined checks, and a trap (SIGILL) in place of UndefinedBehaviorSanitizer's
# words: as much is found, and the compiler takes half the time. To read the words: -fno-sanitize-recover=all instead.
ADDRESS = compiler("-fsanitize=address,undefined", "-fsanitize-undefined-trap-on-error",
                   "--param=asan-instrumentation-with-call-threshold=0")


@pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda variant: variant[0])
def test_code_for_each_instruction_set_compiles(variant):
    """By itself: all of them take minutes, which no single test should."""
    objects(variants.commands(ADDRESS, [variant]))


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_fuzz_with_address_and_undefined_behaviour_sanitizers(instruction_set):
    assert fuzz(program(ADDRESS, variants.VARIANTS), "7", "12", instruction_set) == ""


def test_fuzz_with_thread_sanitizer():
    """The portable code alone: what threads share is the same for all instruction sets."""
    portable = program(compiler("-fsanitize=thread", x86=False), variants.VARIANTS[:1])
    assert fuzz(portable, "7", "12", "portable") == ""
