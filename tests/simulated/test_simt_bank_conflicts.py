"""No bank of shared memory is met twice at once by the compacted engine, which follows from addresses: by ldmatrix, by
cp.async, and by plain loads and stores.

test_simt_resident.py says so of the resident kernel's ldmatrix; its plain accesses are here.
"""

import shutil

import numpy as np
import pytest
import test_simt_gathered_conv
import torch
from simt import SimtError, library
from test_simt_barriers import build_changed
from test_simt_gate_step import GateStep
from test_simt_gathered_conv import Case
from test_simt_harness import NONE, rotate
from test_simt_resident import images_of, model, routings, simulate

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

TILES = {"128x32": (32, 60), "64x64": (72, 60), "128x128": (136, 1)}  # channels, multiprocessors


def conflicts(conv, tile, **element):
    """Phases of ldmatrix, conflicts among them, and the same of what cp.async stores."""
    channels, multiprocessors = TILES[tile]
    counts = np.zeros(4, np.int32)
    conv("count_conflicts", counts)
    Case(40, channels, size=(9, 15), batch=1, **element).run(1, multiprocessors)
    conv("count_conflicts", counts)
    return counts


@pytest.mark.parametrize("element", [dict(dtype=torch.float16), dict(dtype=torch.float32, tf32=True)])
@pytest.mark.parametrize("tile", TILES)
def test_operands_meet_no_bank_twice(tile, element):
    loaded, loads_that_meet, stored, stores_that_meet = conflicts(library("compacted"), tile, **element)
    assert loaded > 100
    assert stored > 100
    assert loads_that_meet == stores_that_meet == 0


def test_the_product_meets_no_bank_twice():
    """As warps leave it and as the epilogue's threads read it, in the 64x64 tile and the 128x128 one."""
    assert library("compacted")._library.count_staging_conflicts() == 0


@pytest.mark.slow
def test_without_the_swizzle_they_do(monkeypatch):
    plain = build_changed("compacted", r"chunk \^ \(row / 2 % kChunks\)", "chunk", source="gathered_conv.cu")
    monkeypatch.setattr(test_simt_gathered_conv, "library", lambda name: plain)
    _, loads_that_meet, *_ = conflicts(plain, "64x64", dtype=torch.float16)
    assert loads_that_meet > 0


ELEMENTS = {"float16": dict(dtype=torch.float16), "tf32": dict(dtype=torch.float32, tf32=True),
            "float32": dict(dtype=torch.float32)}


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("tile", TILES)
def test_plain_accesses_of_a_convolution_meet_no_bank_twice(tile, element):
    """As addresses are in a run: a product's way out, pooled sums, float32's operands. Of 32 columns from tensor cores
    either the stores or the loads have to meet a bank twice, and the loads do."""
    channels, multiprocessors = TILES[tile]
    with library("compacted").plain_accesses() as told:
        Case(40, channels, size=(9, 15), batch=1, **ELEMENTS[element]).run(1, multiprocessors)
    assert {bytes for _, bytes, *_ in told} == {4, 8, 16} - ({8} if element == "float32" else set())
    meeting = {source for source, _, _, turns in told if turns}
    assert meeting == ({"channels.cuh"} if tile == "128x32" and element != "float32" else set())
    assert all(turns <= moved for _, _, moved, turns in told), "twice, not more often"


@pytest.mark.parametrize(("images", "options"), [
    (2, dict(channels=64, tiles=3)), (1, dict(channels=256, tiles=49)), (30, dict(channels=1024, tiles=4)),
    (1, dict(channels=2048, tiles=1)), (30, dict(channels=24, tiles=2, embed=40, hidden=33)),
    (30, dict(channels=64, tiles=2, rnn=False))])
def test_plain_accesses_of_a_gate_meet_no_bank_twice(images, options):
    """The list of more than 27 images is made in shared memory, too."""
    with library("compacted").plain_accesses() as told:
        GateStep(1, images, **options).run(1)
    assert sum(moved for _, _, moved, _ in told) >= 16
    assert not any(turns for *_, turns in told), told


def test_nothing_else_reaches_shared_memory():
    """What the tests above count is all that there is: other accesses than those of ptx.cuh's functions fault."""
    with library("compacted").plain_accesses(closed=True):
        for element in ("float16", "float32"):
            Case(8, 40, size=(3, 5), batch=1, kernel=1, **ELEMENTS[element]).check(1, 60)
        for options in (dict(channels=64), dict(channels=24, hidden=9), dict(channels=24, rnn=False)):
            GateStep(1, 2, tiles=1, **options).run(1)


def test_an_access_that_is_not_counted_faults():
    with library("faults").plain_accesses(closed=True), pytest.raises(SimtError, match="shared memory of block"):
        rotate(seed=0, fault=NONE)


def resident_accesses(closed=False, **spread):
    """Of a network of two blocks a stage whose routes differ from image to image."""
    images, routing = images_of("14", 3), routings("14", 3)["mixed"]
    with library("resident").plain_accesses(closed=closed) as told:
        simulate(model("14"), images, torch.float16, routing=routing, seed=1, **spread)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("spread", [dict(at_a_time=2, multiprocessors=1), dict(cluster=4)], ids=["one", "cluster"])
def test_plain_accesses_of_the_resident_kernel_seldom_meet_a_bank_twice(spread):
    """Ten rows shared by three lanes each cannot all be in different banks, nor can sums of two bands, nor the head's
    images; everything else is."""
    told = resident_accesses(**spread)
    assert {bytes for _, bytes, *_ in told} == {1, 4, 16}
    assert sum(turns > 0 for *_, turns in told) <= 4, told
    assert all(turns <= 1.05 * moved for _, _, moved, turns in told), "twice, not more often"
    assert sum(turns for *_, turns in told) < 0.1 * sum(moved for *_, moved, _ in told), told


@pytest.mark.slow
@pytest.mark.parametrize("spread", [dict(at_a_time=2, multiprocessors=1), dict(cluster=2)], ids=["one", "cluster"])
def test_nothing_else_reaches_the_resident_kernels_shared_memory(spread):
    resident_accesses(closed=True, **spread)
