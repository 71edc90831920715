"""No barrier or fence is there in vain, and none could be missing unnoticed: without any one, a check fails."""

import os
import re
import shutil
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import test_simt_gathered_conv
import torch
from object_cache import ROOT
from simt import CSRC, SimtError, build, library
from test_simt_gate_step import GateStep, assert_compacted, assert_equals_oracle
from test_simt_gathered_conv import ENOUGH, Case, split_k
from test_simt_resident import images_of, model, routings, same_bits, simulate

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

# What is taken out, one at a time.
GATE = r"__sync(threads|warp)\(\);|__threadfence\(\);|cp_async_wait<0>\(\);"
CONVOLUTION = r"__sync(threads|warp)\(\);|__threadfence\(\);|cp_async_wait<k.*>\(\);"
RESIDENT = (r"__syncthreads\(\);|cp_async_wait<.*>\(\);|__syncwarp\(\);$|wait_for_stores\(|fence_counters\(\);"
            r"|cluster_arrive\(\)")
GATE_SOURCES = "cuda/compaction.cuh", "cuda/gate_step.cu", "cuda/gate_step.cuh"
CONVOLUTION_SOURCES = "cuda/arrival.cuh", "cuda/gathered_conv.cu"


def gate_checks():
    """What test_simt_gate_step.py checks, in short."""
    for seed in range(6):
        yield lambda seed=seed: assert_equals_oracle(GateStep(seed, 130, 32, 4), seed)
        yield lambda seed=seed: assert_equals_oracle(GateStep(seed, 5, 24, 3, embed=40, hidden=33), seed)
        yield lambda seed=seed: assert_equals_oracle(GateStep(seed, 1100, 16, 1, rnn=False), seed)
        yield lambda seed=seed: compact(9001, seed)
        yield lambda seed=seed: GateStep(seed, 2, 16, 1).run(seed, empty=3)


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


def build_changed(name, pattern, replacement, source=None):
    """The driver NAME.cpp with some places of a source in cuda/ changed: NAME.cu, unless another one is named."""
    source = source or f"{name}.cu"
    changed, places = re.subn(pattern, replacement, (CSRC / "cuda" / source).read_text())
    assert places
    folder = Path("build", "changed", f"{name}-{source}")
    (ROOT / folder / "cuda").mkdir(parents=True, exist_ok=True)
    # A file finds a header beside itself first: with a changed one go all that may include it.
    beside = [] if source.endswith(".cu") else [file for file in (CSRC / "cuda").glob("*.cu*") if file.name != source]
    for file, text in [(source, changed), *((file.name, file.read_text()) for file in beside)]:
        unfinished = ROOT / "build" / "changed" / f"{name}.{os.getpid()}"
        unfinished.write_text(text)
        unfinished.replace(ROOT / folder / "cuda" / file)
    return build(name, folder)


def test_with_all_of_them_the_checks_pass():
    assert not any(map(fails, gate_checks()))
    assert not any(map(fails, convolution_checks()))


@pytest.mark.parametrize(("source", "line"), places(GATE, *GATE_SOURCES))
def test_without_one_the_gate_step_fails(source, line):
    with library("compacted").without(source, line):
        assert any(map(fails, gate_checks()))


@pytest.mark.parametrize(("source", "line"), places(CONVOLUTION, *CONVOLUTION_SOURCES))
def test_without_one_the_convolution_fails(source, line):
    with library("compacted").without(source, line):
        assert any(map(fails, convolution_checks()))


@pytest.mark.slow
def test_without_zeroed_counters_the_convolution_fails(monkeypatch):
    """No call that the harness could leave out: it takes a library of its own."""
    broken = build_changed("compacted", r"if .*\*arrivals_ = 0;", "", source="arrival.cuh")
    monkeypatch.setattr(test_simt_gathered_conv, "library", lambda name: broken)
    assert any(map(fails, convolution_checks()))


def resident_results():
    """Of thread blocks that take one image after another, and of clusters that share one; all of a network the same
    bits. In one network every block begins a stage; in the other one some are skipped in a row, by free decisions, and
    the last one has no gate."""
    spreads = dict(at_a_time=2, multiprocessors=1), dict(cluster=2), dict(cluster=4)
    for name, batch, route, seeds in (("8", 3, "mixed", 6), ("14", 2, "free", 2)):
        images, routing = images_of(name, batch), routings(name, batch)[route]
        for seed, spread in product(range(seeds), spreads):
            yield name, partial(simulate, model(name), images, torch.float16, routing=routing,
                                last_gate=routing is not None, seed=seed, **spread)


@cache
def resident_checks():
    """Each against the first result of its network; with nothing taken out they pass."""
    results = list(resident_results())
    expected = {name: result() for name, result in reversed(results)}

    def check(name, result):
        assert same_bits(result(), expected[name])

    checks = [partial(check, name, result) for name, result in results]
    assert not any(map(fails, checks))
    return checks


@pytest.mark.slow
@pytest.mark.parametrize(("source", "line"), places(RESIDENT, "cuda/resident.cu"))
def test_without_one_the_resident_strategy_fails(source, line):
    checks = resident_checks()
    with library("resident").without(source, line):
        assert any(map(fails, checks))
