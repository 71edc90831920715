"""What was cured in the resident kernel's machine code stays cured; docs/cuda-design.md has the table."""

import re
from collections.abc import Iterator

import pytest
from machine_code import count, find_nvdisasm, kernels

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_nvdisasm() is None, reason="no nvcc or no nvdisasm")]

BRANCHES = ("BRA", "BSSY", "BSYNC", "BAR", "CALL", "RET", "EXIT", "WARPSYNC")
MOVES = r"MOV |IMAD\.MOV"
SHARED = r"LDS\b"  # not ldmatrix


def split(instructions: list[str], at: tuple[str, ...]) -> Iterator[list[str]]:
    """What lies between instructions that begin in a certain way."""
    run: list[str] = []
    for instruction in [*instructions, at[0]]:
        if instruction.startswith(at):
            yield run
            run = []
        else:
            run.append(instruction)


def to_use(instructions: list[str], load: str) -> Iterator[int]:
    """For each load how many instructions later its register is used first."""
    for place, instruction in enumerate(instructions):
        if instruction.startswith(load):
            register = re.compile(rf"\b{instruction.split()[1].rstrip(',')}\b")
            yield next(later for later, text in enumerate(instructions[place + 1:], 1) if register.search(text))


@pytest.fixture(scope="module", params=["Half", "Bfloat16"])
def resident(request):
    return kernels("resident.cu")[f"resident<{request.param}, false>"]


@pytest.fixture(scope="module")
def straight(resident):
    """Its stretches without a branch."""
    return list(split(resident, BRANCHES))


def test_a_gate_is_short(resident):
    """Between its two barriers, for the published sizes and for all others: no call, nothing from global memory."""
    between = list(split(resident, ("BAR",)))[:-1]  # after the last one: what lanes do that have gone other ways
    gates = [part for part in between if count(part, r"MUFU\.EX2") and count(part, "SHFL")]
    assert len(gates) == 3
    for gate in gates:
        assert count(gate, "CALL") == count(gate, "LDG") == 0
        assert count(gate, "MUFU") == 2 * 10, "two for each of five functions, in both"
        assert count(gate, "SHFL") <= 60
        assert len(gate) <= 760


def test_a_published_gate_has_no_branch(straight):
    """From the pool to the logit; lanes that have gone other ways are dealt with elsewhere (BRA.DIV)."""
    runs = [run for run in straight if count(run, "SHFL") >= 30]
    assert [count(run, "MUFU") for run in runs] == [10, 10, 10]
    assert all(count(run, "SHFL") <= 36 for run in runs)


def test_whole_regions_are_finished_without_a_branch(straight):
    """What a convolution that closes a block adds is on its way long before it is used."""
    closing = [run for run in straight if count(run, "F2FP") >= 8 and count(run, SHARED) >= 8]
    assert [(count(run, SHARED), count(run, "STS")) for run in closing] == [(16, 16), (16, 16), (8, 8)]
    for run in closing:
        assert len(run) <= 15 * count(run, "STS")
        assert min(to_use(run, "LDS")) >= 12
    inner = [run for run in straight if count(run, "F2FP") >= 8 and not count(run, SHARED) and not count(run, "SHFL")]
    assert sorted(count(run, "STS") for run in inner) == [8, 8, 16, 16, 16, 16]
    assert all(len(run) <= 5.5 * count(run, "STS") for run in inner if not count(run, "HMMA"))
    assert not [run for run in inner if count(run, "FSEL")], "the ReLU is the conversion's"


def test_products_take_operands_as_they_come(resident):
    """From ldmatrix, without a move: 18, 36 and 48 loads for the 72, 144 and 144 products of an inner region, once for
    whole planes and once for others."""
    assert count(resident, "HMMA") == 2 * 592
    assert count(resident, "LDSM") == 2 * 185
    products = [run for run in split(resident, ("BRA", "BSYNC", "BAR")) if count(run, "HMMA") >= 50]
    assert sum(count(run, MOVES) for run in products) <= 80


def test_places_in_whole_planes_take_few_instructions(resident):
    """A step from row to row for each ldmatrix, and whether the first and the last row lie inside."""
    others = [len(run) - sum(count(run, kind) for kind in ("HMMA", "LDSM", "LDG"))
              for run in split(resident, ("BRA", "BSYNC", "BAR", "BSSY")) if count(run, "HMMA") in (72, 144)
              and not count(run, "F2FP") and count(run, "LDG")]
    assert len(others) == 6, others
    whole = map(min, zip(others[::2], others[1::2], strict=True))  # and others
    assert all(count <= 3.6 * loads for count, loads in zip(whole, (18, 36, 48), strict=True)), others
