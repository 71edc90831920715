"""The CUDA sources compile for every architecture without a warning; none takes more than docs/cuda-design.md says."""

import pytest
from cuda_resources import ALL_ARCHS, ROOT, TABLE_ROW, compile_all
from machine_code import find_tool
from nvcc import find_nvcc

pytestmark = [pytest.mark.slow, pytest.mark.skipif(None in (find_nvcc(), find_tool("cuobjdump")),
                                                   reason="no nvcc or no cuobjdump")]


@pytest.fixture(scope="module", params=ALL_ARCHS)
def kernels(request):
    """All of one architecture."""
    return compile_all([request.param])


@pytest.fixture(scope="module")
def budgets():
    """Registers per thread by kernel, from the table in docs/cuda-design.md."""
    rows = TABLE_ROW.finditer((ROOT / "docs" / "cuda-design.md").read_text())
    return {row["kernel"]: int(row["registers"]) for row in rows}


def test_nothing_spills(kernels):
    """Registers suffice, and no array was left in local memory."""
    assert [kernel for kernel in kernels if kernel.stack] == []


def test_shared_memory_is_dynamic(kernels):
    """Its size is the launcher's to say (csrc/cuda/ptx.cuh)."""
    assert [kernel for kernel in kernels if kernel.static_shared] == []


def test_registers_stay_within_the_table(kernels, budgets):
    assert {kernel.name for kernel in kernels} == set(budgets), "run python tests/build/cuda_resources.py"
    assert [kernel for kernel in kernels if kernel.registers > budgets[kernel.name]] == []
