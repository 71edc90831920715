"""What was cured in the resident kernel's machine code stays cured; docs/cuda-design.md has the table."""

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import pytest
from machine_code import count, find_nvdisasm, kernels, way

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
    """Between its two barriers, for all sizes and for the published ones: no call, nothing waits for global memory."""
    between = list(split(resident, ("BAR",)))[:-1]  # after the last one: what lanes do that have gone other ways
    gates = [part for part in between if count(part, r"MUFU\.EX2") and count(part, "SHFL")]
    assert len(gates) == 2 * 3
    for gate in gates:
        assert count(gate, "CALL") == count(gate, r"LDG\.") == 0
        assert count(gate, "MUFU") == 10, "two for each of five functions"
        assert count(gate, "SHFL") <= 34
        assert len(gate) <= 520


def test_a_published_gate_recalls_its_state_and_embeds_features_without_a_branch(straight):
    """The state alone where a block has been skipped: what its features add is known by then."""
    recalls = [run for run in straight if count(run, "SHFL") == 10 and count(run, "FFMA") == 40]
    assert len(recalls) == 3
    assert all(len(run) <= 70 for run in recalls)
    embeds = [run for run in straight if count(run, "SHFL") in (13, 14) and count(run, "FFMA") >= 80]
    assert len(embeds) == 3
    assert all(len(run) <= 190 for run in embeds)


def test_whole_regions_are_finished_without_a_branch(resident):
    """What a convolution that closes a block adds is on its way long before it is used."""
    straight = list(split(resident, tuple(branch for branch in BRANCHES if branch != "BSSY")))
    closing = [run for run in straight if count(run, "STS") >= 8 and count(run, SHARED) and count(run, "SHFL")]
    assert [(count(run, SHARED), count(run, "STS")) for run in closing] == [(16, 16), (16, 16), (8, 8)]
    for run in closing:
        assert len(run) <= 17 * count(run, "STS"), "with the sums' four shuffles"
        assert min(to_use(run, "LDS")) >= 12
    inner = [run for run in straight if count(run, "F2FP") >= 8 and not count(run, SHARED) and not count(run, "SHFL")]
    assert sorted(count(run, "STS") for run in inner) == [8, 8, 16, 16, 16, 16]
    assert all(len(run) <= 5.5 * count(run, "STS") for run in inner if not count(run, "HMMA"))
    assert not [run for run in inner if count(run, "FSEL")], "the ReLU is the conversion's"


def test_a_convolution_begins_without_waiting_for_a_load(resident):
    """From a barrier to a region's first product nothing is loaded from global memory, biases neither; but weights
    where a stage begins."""
    ends = [at for at, instruction in enumerate(resident) if instruction.startswith(("BRA", "BSYNC", "BAR"))]
    ways = []
    for start, end in pairwise(ends):
        if count(resident[start:end], "HMMA") in (72, 144) and count(resident[start:end], "LDG"):
            first = next(at for at in range(start, end) if resident[at].startswith("HMMA"))
            for at in ends:
                if resident[at].startswith("BAR"):
                    with suppress(ValueError):
                        ways.append([resident[to] for to in way(resident, at, [lambda to, first=first: to == first])])
    loads = [count(each, r"LDG\.") for each in ways if len(each) <= 170 and not count(each, r"LDG\.E\.128")]
    assert len(loads) >= 3 * 4, "in each stage after two barriers, and after gates of both kinds"
    assert not any(loads)


def test_operands_come_a_step_ahead_of_the_products(resident):
    """Halfway through the products of a step those of the next one are on their way."""
    for run in split(resident, ("BRA", "BSYNC", "BAR", "BSSY")):
        if count(run, "HMMA") in (72, 144):
            places = [place for place, instruction in enumerate(run) if instruction.startswith("HMMA")]
            assert count(run[:places[23]], "LDSM") >= 8


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
              for run in split(resident, ("BRA", "BSYNC", "BAR")) if count(run, "HMMA") in (72, 144)
              and not count(run, "F2FP") and count(run, "LDG")]
    assert len(others) == 6, others
    whole = map(min, zip(others[::2], others[1::2], strict=True))  # and others
    assert all(count <= 3.9 * loads for count, loads in zip(whole, (18, 36, 48), strict=True)), others
