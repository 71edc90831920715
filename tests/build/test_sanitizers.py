"""The native code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, with a fuzz.

Random shapes, channel counts, gates, batches, routes and thread counts against a reference in double precision.
"""

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skipnet_rt import _C

ROOT = Path(__file__).parents[2]
SOURCES = ["tests/build/native/fuzz_networks.cpp", "csrc/cpu/thread_team.cpp", "csrc/cpu/instruction_sets.cpp"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


def variants():
    """What setup.py compiles, and how."""
    spec = importlib.util.spec_from_file_location("variants", ROOT / "csrc" / "variants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, *flags, x86=True):
    """The fuzz program with some compiler flags; without ``x86`` the portable code alone."""
    known = variants()
    compiler = ["g++", "-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", "-pthread", "-DSKIPNET_SOFTWARE_AMX",
                *flags]
    sources = {folder / f"{Path(source).stem}.o": [source] for source in SOURCES}
    if x86:
        compiler += [f"-D{name}={value}" for name, value in known.MACROS]
    for name, width, isa_flags in known.VARIANTS if x86 else known.VARIANTS[:1]:
        for source in known.VARIANT_SOURCES:
            sources[folder / f"{Path(source).stem}_{name}.o"] = [
                f"csrc/cpu/{source}", f"-DSKIPNET_ISA={name}", f"-DSKIPNET_WIDTH={width}", *isa_flags]
    commands = [[*compiler, "-c", *source, "-o", target] for target, source in sources.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, cwd=ROOT, check=True), commands))
    program = folder / "fuzz"
    subprocess.run([*compiler, *sources, "-o", program], check=True)
    return program


def instruction_sets():
    """What this machine runs; AMX, with its tiles in software, wherever the rest of it runs."""
    supported = set(_C.instruction_sets())
    return sorted(supported | {"amx"} if "avx512bf16" in supported else supported)


def fuzz(program, *arguments):
    """Runs the fuzz; how it failed, or an empty string."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=600)
    return f"exit status {done.returncode}: {done.stderr[-4000:]}" if done.returncode else ""


def test_fuzz_with_address_and_undefined_behaviour_sanitizers(tmp_path):
    program = build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for instruction_set in instruction_sets():
        assert fuzz(program, "7", "12", instruction_set) == ""


def test_fuzz_with_thread_sanitizer(tmp_path):
    """The portable code alone: what threads share is the same for all instruction sets."""
    assert fuzz(build(tmp_path, "-fsanitize=thread", x86=False), "7", "12", "portable") == ""
