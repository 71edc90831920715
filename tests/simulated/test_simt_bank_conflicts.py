"""No bank of shared memory is met twice at once by a convolution's operands and product, which follows from addresses.

test_simt_resident.py says the same of the resident kernel.
"""

import shutil

import numpy as np
import pytest
import test_simt_gathered_conv
import torch
from simt import library
from test_simt_barriers import build_changed
from test_simt_gathered_conv import Case

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
