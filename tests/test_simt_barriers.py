"""No barrier of the gate step is there in vain, and none could be missing unnoticed: without any one, a check fails."""

import re
import shutil

import numpy as np
import pytest
import test_simt_gate_step
from simt import CSRC, SimtError, build
from test_simt_gate_step import GateStep, assert_compacted, assert_equals_oracle

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

BARRIER = re.compile(r"__sync(threads|warp)\(\);")
PLACES = [(source, number) for source in ("cuda/compaction.cuh", "cuda/gate_step.cu")
          for number in range(len(BARRIER.findall((CSRC / source).read_text())))]


def checks():
    """What test_simt_gate_step.py checks, in short."""
    for seed in range(6):
        yield lambda seed=seed: assert_equals_oracle(GateStep(seed, 130, 32, 4), seed)
        yield lambda seed=seed: assert_equals_oracle(GateStep(seed, 1100, 16, 1, rnn=False), seed)
        yield lambda seed=seed: compact(9001, seed)


def compact(batch, seed):
    native = test_simt_gate_step.library("gate_step")
    native.configure(seed)
    executed = native.array(np.random.default_rng(seed).random(batch) < 0.5)
    rows, count = native.empty(batch, np.int32), native.empty(1, np.int32)
    native("run_compact", executed, batch, rows, count)
    assert_compacted(executed, rows, count)


def fails(check):
    try:
        check()
    except (AssertionError, SimtError):
        return True
    return False


def test_with_all_barriers_the_checks_pass():
    assert PLACES
    assert not any(map(fails, checks()))


@pytest.mark.parametrize(("source", "number"), PLACES)
def test_without_one_barrier_a_check_fails(source, number, tmp_path, monkeypatch):
    shutil.copytree(CSRC, tmp_path / "csrc")
    text = (CSRC / source).read_text()
    start, end = [found.span() for found in BARRIER.finditer(text)][number]
    (tmp_path / "csrc" / source).write_text(text[:start] + text[end:])
    broken = build("gate_step", tmp_path / "csrc")
    monkeypatch.setattr(test_simt_gate_step, "library", lambda name: broken)
    assert any(map(fails, checks()))
