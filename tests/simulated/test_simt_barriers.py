"""No barrier or fence is there in vain, and none could be missing unnoticed: without any one, a check fails."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_simt_gathered_conv
import torch
from object_cache import ROOT
from simt import CSRC, SimtError, build, library
from test_simt_gate_step import GateStep, assert_compacted, assert_equals_oracle
from test_simt_gathered_conv import ENOUGH, Case, split_k

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

# What is taken out, one at a time. The gate step's fences are not: the harness knows of weak memory only what passes
# through __stcg and __ldcg.
BARRIER = r"__sync(threads|warp)\(\);"
CONVOLUTION = BARRIER + r"|__threadfence\(\);|cp_async_wait<.*>\(\);"
GATE_SOURCES, CONVOLUTION_SOURCES = ("cuda/compaction.cuh", "cuda/gate_step.cu"), ("cuda/gathered_conv.cu",)


def gate_checks():
    """What test_simt_gate_step.py checks, in short."""
    for seed in range(6):
        yield lambda seed=seed: assert_equals_oracle(GateStep(seed, 130, 32, 4), seed)
        yield lambda seed=seed: assert_equals_oracle(GateStep(seed, 1100, 16, 1, rnn=False), seed)
        yield lambda seed=seed: compact(9001, seed)


def compact(batch, seed):
    native = library("compacted")
    native.configure(seed)
    executed = native.array(np.random.default_rng(seed).random(batch) < 0.5)
    rows, count = native.empty(batch, np.int32), native.empty(1, np.int32)
    native("run_compact", executed, batch, rows, count)
    assert_compacted(executed, rows, count)


def convolution_checks():
    """What test_simt_gathered_conv.py checks, in short."""
    for seed in range(8):
        yield lambda seed=seed: Case(16, 72, size=(9, 9), residual=True, dtype=torch.float16).check(seed, 1)
        yield lambda seed=seed: split_k(torch.bfloat16, size=(4, 5)).check(seed, ENOUGH, calls=2)


def places(pattern, *sources):
    """The lines with what is taken out: (source, line)."""
    return [pytest.param(Path(source).name, number, id=f"{source}:{number}") for source in sources
            for number, line in enumerate((CSRC / source).read_text().splitlines(), 1) if re.search(pattern, line)]


def fails(check):
    try:
        check()
    except (AssertionError, SimtError):
        return True
    return False


def test_with_all_of_them_the_checks_pass():
    assert not any(map(fails, gate_checks()))
    assert not any(map(fails, convolution_checks()))


@pytest.mark.parametrize(("source", "line"), places(BARRIER, *GATE_SOURCES))
def test_without_one_the_gate_step_fails(source, line):
    with library("compacted").without(source, line):
        assert any(map(fails, gate_checks()))


@pytest.mark.parametrize(("source", "line"), places(CONVOLUTION, *CONVOLUTION_SOURCES))
def test_without_one_the_convolution_fails(source, line):
    with library("compacted").without(source, line):
        assert any(map(fails, convolution_checks()))


@pytest.mark.slow
def test_without_zeroed_counters_the_convolution_fails(monkeypatch):
    """No call that the harness could leave out: it takes a source, and a library, of its own."""
    changed, removed = re.subn(r"if .*arrivals\[tile\] = 0;", "", (CSRC / "cuda/gathered_conv.cu").read_text())
    assert removed == 1
    folder = ROOT / "build" / "without_zeroed_counters"
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    (folder / "cuda" / "gathered_conv.cu").write_text(changed)
    broken = build("gathered_conv", folder.relative_to(ROOT))
    monkeypatch.setattr(test_simt_gathered_conv, "library", lambda name: broken)
    assert any(map(fails, convolution_checks()))
