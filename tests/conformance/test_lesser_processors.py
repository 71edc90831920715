"""The suite as a lesser processor would run it: libraries and our own kernels are told to leave instructions alone.

Bits depend on how many numbers a vector holds: what holds with AVX-512 may break with AVX2. What the libraries below us
choose is read once, at their import, so each part runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__ as numpy_dispatch

from skipnet_rt import _C

TESTS = Path(__file__).parents[1]


def processor(instruction_set, torch, onednn, mkl, openblas, numpy):
    """The environment in which PyTorch, oneDNN, MKL, OpenBLAS, NumPy and our engine take a processor for a lesser one.

    Args:
        instruction_set: ours, read by conftest.py.
        torch, onednn, mkl, openblas: in these libraries' words.
        numpy: the newest level that NumPy may use.
    """
    newer = numpy_dispatch[numpy_dispatch.index(numpy) + 1:] if numpy in numpy_dispatch else numpy_dispatch
    return {"SKIPNET_TEST_INSTRUCTION_SET": instruction_set, "ATEN_CPU_CAPABILITY": torch, "ONEDNN_MAX_CPU_ISA": onednn,
            "MKL_ENABLE_INSTRUCTIONS": mkl, "OPENBLAS_CORETYPE": openblas, "NPY_DISABLE_CPU_FEATURES": " ".join(newer)}


PROCESSORS = {
    "avx2": processor("avx2", "avx2", "AVX2", "AVX2", "Haswell", "X86_V3"),
    "portable": processor("portable", "default", "SSE41", "SSE4_2", "Prescott", "X86_V2"),
}

PARTS = {
    "batch invariance": ["conformance/test_promises.py", "-k", "batch_invariance_is_bitwise"],
    "other promises": ["conformance/test_promises.py", "-m", "not slow", "-k", "not batch_invariance_is_bitwise"],
    "training": ["unit/test_training.py"],
    "interpreter": ["triton/test_interpreter.py", "-m", "not slow"],
}
QUICK = {("batch invariance", "avx2")}


@pytest.mark.parametrize(("part", "name"), [
    pytest.param(part, name, marks=[] if (part, name) in QUICK else pytest.mark.slow)
    for part in PARTS for name in PROCESSORS])
def test_as_a_lesser_processor(part, name):
    if name not in _C.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PARTS[part]], cwd=TESTS,
                          env=os.environ | PROCESSORS[name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


LOOK = """
import torch
from numpy._core._multiarray_umath import __cpu_features__ as numpy_features

print("torch", torch.backends.cpu.get_cpu_capability())
print("numpy", [level for level in ("X86_V3", "X86_V4") if numpy_features[level]])
with torch.backends.mkldnn.verbose(1):
    torch.nn.functional.conv2d(torch.ones(4, 16, 32, 32), torch.ones(16, 16, 3, 3))
"""


@pytest.mark.parametrize(("name", "expected"), [
    ("avx2", ["torch AVX2", "numpy ['X86_V3']", "isa:Intel AVX2", "convolution,jit:avx2"]),
    ("portable", ["torch DEFAULT", "numpy []", "isa:Intel SSE4.1", "convolution,jit:sse41"])])
def test_libraries_do_as_they_are_told(name, expected):
    """Otherwise the tests above would run the same code again."""
    if name not in _C.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    done = subprocess.run([sys.executable, "-c", LOOK], env=os.environ | PROCESSORS[name], check=True,
                          capture_output=True, text=True)
    assert [line for line in expected if line not in done.stdout] == []
