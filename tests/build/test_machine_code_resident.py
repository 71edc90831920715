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
    """Where it decides, for all sizes and for the published ones: no call, nothing waits for global memory."""
    between = list(split(resident, ("BAR",)))[:-1]  # after the last one: what lanes do that have gone other ways
    gates = [part for part in between if count(part, r"MUFU\.EX2") and count(part, "SHFL")]
    assert len(gates) == 2 * 3
    for gate in gates:
        assert count(gate, "CALL") == count(gate, r"LDG\.") == 0
        assert count(gate, "MUFU") == 10, "two for each of five functions"
        assert count(gate, "SHFL") <= 26
        assert len(gate) <= 280


def test_a_published_gate_recalls_its_state_embeds_features_and_decides_without_a_branch(straight):
    """The state alone where a block has been skipped: what its features add is known by then. Three lanes share a unit,
    so that four products of its ten inputs are left to each."""
    recalls = [run for run in straight if count(run, "SHFL") == 4 and count(run, "FFMA") == 12]
    assert len(recalls) == 3
    assert all(len(run) <= 55 for run in recalls)
    embeds = [run for run in straight if count(run, "SHFL") in (7, 8) and count(run, "FFMA") >= 16]
    assert len(embeds) == 2 * 3, "of warps that decide and of those that look ahead"
    assert all(len(run) <= 135 for run in embeds)
    decisions = [run for run in straight if count(run, "MUFU") == 10 and count(run, "SHFL") == 13]
    assert len(decisions) == 3
    assert all(len(run) <= 90 for run in decisions)


def test_a_region_has_no_branch(resident):
    """Its products and what follows them. What a closing convolution adds and pools takes products with the identity:
    no float32 of what has been rounded. Rows are constants apart in whole planes."""
    regions = [run for run in split(resident, BRANCHES) if count(run, "HMMA") >= 12]
    kinds = [tuple(count(run, each) for each in ("HMMA", "LDSM", "SHFL")) for run in regions]
    stem_and_first = [(72, 18, 0)] * 4 + [(88, 22, 2)] * 2
    second = [(72, 27, 0)] * 2 + [(16, 4, 3)] * 2 + [(144, 36, 0)] * 2 + [(160, 40, 3)] * 2
    third = [(72, 30, 0)] * 2 + [(12, 4, 3)] * 2 + [(144, 48, 0)] * 2 + [(152, 50, 3)] * 2
    assert kinds == stem_and_first + second + third, "in whole planes, and in others"
    for run, (_, _, pools) in zip(regions, kinds, strict=True):
        assert count(run, SHARED) == (0 if not pools else 2 if pools == 2 else 1), "the identity"
        assert count(run, "HADD2") == 0
        assert count(run, "FADD") <= 31 * bool(pools), "a bias is what the products are added to"
        assert not count(run, "FSEL") or pools, "the ReLU is the conversion's"
    whole = [run for run in regions[::2] if count(run, "LDG")]
    others = [len(run) - sum(count(run, kind) for kind in ("HMMA", "LDSM", "LDG")) for run in whole]
    assert all(each <= budget for each, budget in zip(others, (130, 200, 170, 240, 195, 245), strict=True)), others
    assert sum(count(run, MOVES) for run in whole) <= 120


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
