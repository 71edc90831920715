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
    """What a closing convolution adds and pools takes products with the identity: one load for it, no float32 of what
    has been rounded, four and two additions for the pieces of a column. Rows are constants apart."""
    straight = list(split(resident, tuple(branch for branch in BRANCHES if branch != "BSSY")))
    closing = [run for run in straight if count(run, "F2FP") >= 8 and count(run, SHARED) and count(run, "LDSM")
               and not count(run, "SEL")]
    kinds = [(count(run, "LDSM"), count(run, "HMMA"), count(run, "SHFL")) for run in closing]
    assert sorted(kinds) == [(2, 8, 3)] * 2 + [(4, 16, 2)] * 2 + [(4, 16, 3)] * 2, "in whole planes, and in others"
    for run in closing:
        assert count(run, SHARED) == 1
        assert count(run, "HADD2") == 0
        assert count(run, "FADD") <= 15
        assert min(to_use(run, "LDSM")) >= 2
    whole = [min(both, key=len) for both in zip(closing[::2], closing[1::2], strict=True)]
    assert all(len(run) <= budget for run, budget in zip(whole, (90, 110, 86), strict=True)), list(map(len, whole))
    inner = [run for run in straight if count(run, "F2FP") >= 7 and not count(run, SHARED) and not count(run, "SHFL")]
    alone = sorted(len(run) for run in inner if not count(run, "HMMA"))
    assert len(alone) == 6
    assert all(most <= budget for most, budget in zip(alone, (30, 40, 50), strict=False)), alone
    assert not [run for run in inner if count(run, "FSEL")], "the ReLU is the conversion's"
    assert not [run for run in inner if count(run, "FADD")], "a bias is what the products are added to"


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
    assert count(resident, "HMMA") == 2 * 592 + 2 * (16 + 16 + 8) + 2 * (8 + 4), "and the identity's"
    assert count(resident, "LDSM") == 2 * 185 + 2 * (4 + 4 + 2), "and the residuals'"
    products = [run for run in split(resident, ("BRA", "BSYNC", "BAR")) if count(run, "HMMA") >= 50]
    assert sum(count(run, MOVES) for run in products) <= 112


def test_places_in_whole_planes_take_few_instructions(resident):
    """An address for a step's ldmatrix, and whether the first and the last row lie inside."""
    others = [len(run) - sum(count(run, kind) for kind in ("HMMA", "LDSM", "LDG"))
              for run in split(resident, ("BRA", "BSYNC", "BAR")) if count(run, "HMMA") in (72, 144)
              and not count(run, "F2FP") and count(run, "LDG")]
    assert len(others) == 6, others
    whole = map(min, zip(others[::2], others[1::2], strict=True))  # and others
    assert all(count <= budget for count, budget in zip(whole, (66, 84, 144), strict=True)), others


def test_a_cluster_stores_without_a_loop():
    """A row to either side, a sum, from a lane's own registers; an address there is one instruction. L1 is emptied
    once, at the start: by the cluster's only barrier, not by its waits."""
    cluster = kernels("resident.cu")["resident<Half, true>"]
    assert count(cluster, "STAS") == 2 * (2 * 6 + 3 * 5)
    for place, instruction in enumerate(cluster):
        if instruction.startswith("STAS"):
            assert 1 <= count(cluster[place - 5:place], "PRMT") <= 2
            assert not count(cluster[place - 5:place], "S2")
    assert count(cluster, "UCGABAR_ARV") == count(cluster, r"CCTL\.IVALL") == count(cluster, r"MEMBAR\.ALL\.GPU") == 1
