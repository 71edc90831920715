"""The model of time on a GPU: the replay on code made for it, and what is committed against the machine code."""

import json
from pathlib import Path

import gpu_cycles
import gpu_model
import pytest
from gpu_replay import UNITS, Units, replay
from machine_code import Instruction, find_nvdisasm, way

ROOT = Path(__file__).parents[2]


def instruction(text, stall=1, awaits=0, result=7, operands=7, target=None, predicated=False):
    encoded = stall << 41 | result << 46 | operands << 49 | awaits << 52
    made = Instruction(text, predicated, encoded)
    made.target = target
    return made


def test_a_warp_waits_for_stalls_and_scoreboards():
    code = [instruction("IADD3 R0, R0, R1, RZ", stall=5), instruction("LDS R1, [R0]", result=2),
            instruction("FADD R2, R1, R1", awaits=1 << 2, stall=4)]
    assert replay(code, Units(product=8), 1).cycles == 5 + 29 + 4


def test_two_warps_hide_latency_but_share_the_tensor_cores():
    wait = [instruction("LDS R1, [R0]", result=2), instruction("FADD R2, R1, R1", awaits=1 << 2)]
    products = [instruction("HMMA.16816.F32 R0, R4, R8, R0")] * 10
    units = Units(product=8)
    assert replay(wait * 4, units, 2).cycles < 1.2 * replay(wait * 4, units, 1).cycles
    assert replay(products, units, 2).cycles == pytest.approx(2 * 10 * 8, abs=8)
    assert replay(products, units, 2).bound(2) == "tensor cores"


@pytest.mark.parametrize(("blocks", "cycles"), [(1, 2 * 9 + 20), (2, 9 + 20)])
def test_a_barrier_gathers_a_thread_blocks_warps(blocks, cycles):
    code = [instruction("HMMA.16816.F32 R0, R4, R8, R0", stall=9), instruction("BAR.SYNC 0x0"), instruction("EXIT")]
    first_through = replay(code, Units(product=9), 2, blocks)
    assert first_through.cycles >= cycles


def test_a_way_takes_the_shortest_branch_through_its_places():
    code = [instruction("BRA `(.L_x_1)", target=3, predicated=True), instruction("LDS R0, [R1]"),
            instruction("STS [R1], R0"), instruction("FADD R0, R0, R0"), instruction("EXIT")]
    assert way(code, 0, [lambda at: at == 4]) == [3, 4]
    assert way(code, 0, [lambda at: at == 2, lambda at: at == 4]) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="no way"):
        way(code, 3, [lambda at: at == 1])


def test_docs_show_what_the_model_predicts():
    page = (ROOT / "docs" / "gpu-model.md").read_text()
    shown = page.partition("<!-- predictions -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == gpu_model.table(gpu_model.predictions()), "run python benchmarks/gpu_model.py"


def test_a_prediction_grows_with_work():
    h200, *_ = gpu_model.DEVICES
    for name, (predict, batches) in gpu_model.RUNS.items():
        arch = gpu_model.srt.arch(name)
        for batch in batches:
            less, half, all_blocks = (predict(arch, h200, batch, share).seconds for share in (0.25, 0.5, 1.0))
            assert less < half < all_blocks
            assert predict(arch, h200, 2 * batch, 0.5).seconds >= half


@pytest.mark.parametrize("batch", [1, 8])
def test_gates_take_a_tenth_of_an_imagenet_network_at_most(batch):
    h200, *_ = gpu_model.DEVICES
    prediction = gpu_model.compacted(gpu_model.srt.arch("imagenet_rnn_gate_101"), h200, batch, 0.5)
    assert prediction.share(phase="gate_step") <= 0.1


@pytest.mark.slow
@pytest.mark.skipif(find_nvdisasm() is None, reason="no nvcc or no nvdisasm")
def test_committed_cycles_are_the_machine_codes():
    committed = json.loads(gpu_cycles.CYCLES.read_text())
    assert committed == {name: gpu_cycles.pieces(units) for name, units in UNITS.items()}, (
        "run python benchmarks/gpu_cycles.py")
