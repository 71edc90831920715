"""What was cured in the convolution's machine code stays cured: budgets per K step and per row that is finished."""

from itertools import pairwise

import pytest
from gpu_cycles import Code
from machine_code import count, find_nvdisasm, kernels

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_nvdisasm() is None, reason="no nvcc or no nvdisasm")]

# Of a warp's K step: products, ldmatrix, cp.async, moves at most, and all instructions at most.
STEPS = {"Half, 128, 128, 2, 4, false": (32, 12, 4, 4, 106), "Half, 128, 128, 2, 4, true": (32, 12, 4, 4, 106),
         "Half, 64, 64, 2, 2, true": (16, 8, 4, 4, 80), "Half, 128, 32, 4, 1, false": (16, 8, 5, 7, 90),
         "Tf32, 64, 64, 2, 2, true": (16, 8, 4, 5, 148)}


@pytest.fixture(scope="module", params=STEPS)
def tile(request):
    return request.param


@pytest.fixture(scope="module")
def code(tile):
    return Code(kernels("gathered_conv.cu")[f"gathered_conv_kernel<Tile<{tile}>, false>"])


def test_a_step_is_little_but_products(code, tile):
    """From one step's products to the next one's, where K goes on in memory."""
    (products,) = code.having(HMMA=8)
    before = max(at for at in range(products.start) if code.barrier(at))
    loads = [block for block in code.having(LDGSTS=1) if before < block.start < products.start]
    step, _ = code.way(products.end - 1, *loads, products)
    assert [count(step, name) for name in ("HMMA", "LDSM", "LDGSTS")] == list(STEPS[tile][:3])
    assert len(step) <= STEPS[tile][4]
    assert count(step, "CALL") == count(step, "LDG[.]") == 0
    assert count(step, r"MOV |IMAD[.]MOV") <= STEPS[tile][3]
    assert count(step, "BAR") == 1


def test_a_row_is_finished_in_few_instructions(code, tile):
    """Eight channels of a pixel: without a residual and a pool, and with both, whose loads are under way together."""
    if tile.startswith("Tf32"):
        pytest.skip("32-bit rows have no conversions to tell them by")
    flat, pooling = code.having(STG=1, F2FP=4, HADD2=0), code.having(STG=1, F2FP=4, HADD2=8)
    added = code.having(HADD2=8, STG=0, FADD=8)
    rows = 2 if ", 32," in tile else 4
    assert len(flat) == len(pooling) == rows
    for first, second in pairwise(flat):
        assert second.end - first.end <= 60, "with the residual's"
    for residual, row in zip(added, pooling, strict=False):
        assert residual.end - residual.start <= 18
        assert row.end - row.start <= 34
    ahead = [block for block in code.having(LDG=2) if code.count(block, "LDG") == rows and
             not code.count(block, "FADD")]
    assert len(ahead) >= 2, "a thread's rows of the residual"
