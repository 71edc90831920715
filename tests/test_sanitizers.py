"""The native code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, with a fuzz.

Random shapes, channel counts, gates, batches, routes and thread counts against a reference in double precision.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from skipnet_rt import _C

ROOT = Path(__file__).parent.parent
SOURCES = ["tests/native/fuzz_networks.cpp", "csrc/cpu/threads.cpp", "csrc/cpu/instruction_sets.cpp"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


def variants():
    """What setup.py compiles, and how."""
    spec = importlib.util.spec_from_file_location("variants", ROOT / "csrc" / "variants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, *flags):
    """The fuzz program with some compiler flags."""
    known = variants()
    common = ["g++", "-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", "-pthread", *flags,
              *(f"-D{name}={value}" for name, value in known.MACROS)]
    objects = []
    for name, width, isa_flags in known.VARIANTS:
        for source in known.VARIANT_SOURCES:
            objects.append(folder / f"{source}_{name}.o")
            subprocess.run([*common, *isa_flags, f"-DSKIPNET_ISA={name}", f"-DSKIPNET_WIDTH={width}", "-c",
                            f"csrc/cpu/{source}", "-o", objects[-1]], cwd=ROOT, check=True)
    program = folder / "fuzz"
    subprocess.run([*common, *SOURCES, *map(str, objects), "-o", program], cwd=ROOT, check=True)
    return program


@pytest.mark.parametrize("flags", [["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
                                   ["-fsanitize=thread"]], ids=["address-undefined", "thread"])
def test_fuzz_with_sanitizers(tmp_path, flags):
    program = build(tmp_path, *flags)
    for instruction_set in _C.instruction_sets():
        done = subprocess.run([program, "7", "12", instruction_set], capture_output=True, text=True, check=False,
                              timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "12 rounds passed" in done.stdout


def test_fuzz_at_full_speed(tmp_path):
    program = build(tmp_path, "-O3", "-ffp-contract=fast")
    for instruction_set in _C.instruction_sets():
        done = subprocess.run([program, "1", "60", instruction_set], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
