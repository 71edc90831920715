"""What was cured in the machine code stays cured: budgets by kernel, for sm_90; docs/cuda-design.md has the table."""

import re

import pytest
from machine_code import count, find_nvdisasm, kernels, loads_under_way

pytestmark = pytest.mark.skipif(find_nvdisasm() is None, reason="no nvcc or no nvdisasm")


@pytest.mark.parametrize(("gate", "loads"), [("PublishedRnn", [8, 11]), ("Feedforward", [17, 33, 40])])
def test_a_gate_does_not_wait_for_one_load_after_the_other(gate, loads):
    """Issued before the first is waited for, where the pool is taken; RNNGate's bring 16 bytes each."""
    most = sorted(loads_under_way(kernels("gate_step.cu")[f"gate_step_kernel<{gate}>"]))[-len(loads):]
    assert all(issued >= wanted for issued, wanted in zip(most, loads, strict=True)), most


def test_a_gates_weights_come_before_the_grid_before_has_ended():
    """Asked for before it waits for that, and in registers; nothing else is loaded but state and pooled sums."""
    instructions = kernels("gate_step.cu")["gate_step_kernel<PublishedRnn>"]
    (wait,) = (at for at, instruction in enumerate(instructions) if instruction.startswith("ACQBULK"))
    assert count(instructions[:wait], "LDGSTS") == count(instructions, "LDGSTS") > 0
    assert count(instructions[:wait], r"LDS\.128") >= 20
    assert count(instructions[wait:], r"LDG[.]") <= 24
    assert not count(instructions, "CALL")


@pytest.mark.parametrize("gate", ["PublishedRnn", "Rnn", "Feedforward"])
def test_fences_are_the_one_threads_around_its_arrival(gate):
    """No fence after the barrier, where every thread would have it."""
    instructions = kernels("gate_step.cu")[f"gate_step_kernel<{gate}>"]
    order = " ".join(match[0] for match in map(re.compile("MEMBAR|ATOM|BAR").match, instructions) if match)
    assert re.search(r"MEMBAR ATOM MEMBAR BAR( BAR)*$", order), order


@pytest.mark.parametrize(("kernel", "loads", "stores"), [
    ("Half, Half, 3", 9, 1), ("Bfloat16, Bfloat16, 3", 9, 1), ("float, float, 3", 18, 2), ("Half, float, 2", 4, 2),
    ("float, float, 2", 8, 2), ("Half, float, 1", 1, 2)])
def test_a_pool_moves_sixteen_bytes_at_a_time_and_loads_its_window_at_once(kernel, loads, stores):
    instructions = kernels("compacted.cu")[f"max_pool_kernel<{kernel}>"]
    assert count(instructions, r"LDG\.E\.128") == max(loads_under_way(instructions)) == loads
    assert count(instructions, "LDG") == loads + 1, "the number of images"
    assert count(instructions, r"STG\.E\.128") == count(instructions, "STG") == stores
    assert not count(instructions, "CALL"), "no division of 64 bits"


@pytest.mark.parametrize("pairs", ["false", "true"])
@pytest.mark.parametrize(("element", "stores"), [("Half", 2), ("Bfloat16", 2), ("float", 4)])
def test_images_are_stored_sixteen_bytes_at_a_time(element, stores, pairs):
    """Two pixels of eight channels, or two pairs of pixels of four."""
    instructions = kernels("compacted.cu")[f"load_images_kernel<{element}, {pairs}>"]
    assert count(instructions, r"STG\.E\.128") == stores
    assert max(loads_under_way(instructions)) == 16
    assert not count(instructions, "CALL"), "no division of 64 bits"
