"""The Triton engine: its conformance under Triton's interpreter, and what it says where it cannot run.

The interpreter must be chosen before Triton is imported, so what needs it runs in processes of their own: the kernels'
tests, and some of the conformance suite. All that the engine takes of that:
``TRITON_INTERPRET=1 pytest tests/conformance -k triton``.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import small_model

import skipnet_rt as srt
from skipnet_rt import kernels
from skipnet_rt.kernels.language import power_of_two
from skipnet_rt.measure.doctor import warm

TESTS = Path(__file__).parents[1]
INSTALLED = importlib.util.find_spec("triton") is not None
# https://github.com/triton-lang/triton/issues/9171
NUMPY_TOO_NEW = INSTALLED and metadata.version("triton") < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"

# An image takes the interpreter tenths of a second. The quick session holds every promise to some network, the others
# every network to some promise.
QUICK = ("agrees_with_the_model and (rnn-r or bottleneck-f) or "
         "test_batch_invariance_is_bitwise and imagenet-reinforced and float32 or "
         "leaves_no_trace and rnn-r or nan and rnn-r or empty or bad_ or forcing or routing_of_any_kind and bool")
RIGHT = ("agrees_with_the_model or test_a_call_returns and 1-bottleneck or "
         "cifar10_feedforward_38 and (test_golden_cases or error_bar and bfloat16)")
OTHERS = ("test_batch_invariance_is_bitwise and bottleneck-feedforward and bfloat16 or "
             "leaves_no_trace and (rnn or bottleneck) or nan and bottleneck or left_as or routing_of_any_kind")
KERNELS = ["triton/test_kernels.py", "triton/test_tf32.py"]
PROMISES = "conformance/test_promises.py"
SESSIONS = {
    "quick": [*KERNELS, "triton/test_tuning.py", "triton/test_products.py", PROMISES, "-m", "not slow",
              "-k", f"not test_promises or triton and ({QUICK})"],
    "kernels": [*KERNELS, "-m", "slow"],
    "right": [PROMISES, "-k", f"triton and ({RIGHT}) and not ({QUICK})"],
    "batches, traces and NaN": [PROMISES, "-k", f"triton and ({OTHERS}) and not ({QUICK})"],
}


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(NUMPY_TOO_NEW, reason="the interpreter of Triton before 3.7 does not run with NumPy 2.4")
@pytest.mark.parametrize("session", [pytest.param(name, marks=[] if name == "quick" else pytest.mark.slow)
                                     for name in SESSIONS])
def test_under_the_interpreter(session):
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SESSIONS[session]],
                         cwd=TESTS, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
                         check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " skipped" not in run.stdout.splitlines()[-1], "the engine objected"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_engine_says_why_it_cannot_run():
    reason = "PyTorch sees no GPU" if INSTALLED else "Triton is not installed"
    assert not srt.engines()["triton"]
    assert reason in srt.engines()["triton"].reason
    with pytest.raises(srt.EngineError, match=reason):
        srt.compile(small_model("rnn"), engine="triton")
    with pytest.raises(RuntimeError, match=reason):
        kernels.compact(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(srt.EngineError, match=f"engine 'triton' is not available: {reason}"):
        warm(small_model("rnn"), torch.float16, print)


def test_everything_imports_without_triton(tmp_path):
    """As where it is not installed: the oracles work, and the engine says what is missing."""
    (tmp_path / "triton.py").write_text("raise ImportError('not installed')\n")
    program = ("import json, torch, skipnet_rt as srt; from skipnet_rt import kernels; "
               "rows, count = kernels.compact_ref(torch.tensor([False, True])); "
               "print(json.dumps([rows.tolist(), srt.engines()['triton'].reason]))")
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                         capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[1, -1], "Triton is not installed (pip install skipnet-rt[gpu])"]


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (1000, 1024)])
def test_buckets_are_powers_of_two(batch, size):
    assert power_of_two(batch) == size


def test_auto_prefers_the_cpu_engine_to_the_interpreter():
    names = list(srt.engines())
    assert names.index("cpu") < names.index("triton") < names.index("eager")
