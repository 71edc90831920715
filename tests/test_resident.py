"""What only the CPU's resident strategy has: instruction sets, its way of sharing images, its convolutions."""

import pytest
import torch
from networks import GoldenCase, relative_error, small_images, small_model

from skipnet_rt import _C
from skipnet_rt.engines.cpu_resident import ResidentCpuEngine
from skipnet_rt.packing import pack
from skipnet_rt.tolerances import TOLERANCES

RESIDENT = ["rnn", "rnn-reinforced", "feedforward1", "feedforward2", "dense"]


def engine_for(model, instruction_set=None, dtype=torch.float32):
    return ResidentCpuEngine(pack(model, torch.device("cpu"), dtype), instruction_set)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("name", ["cifar10_rnn_gate_38-s15", "cifar10_feedforward_38-s71",
                                  "cifar10_feedforward_110-s83"])
def test_golden_cases_with_every_instruction_set(instruction_set, name):
    case = GoldenCase(name)
    result = engine_for(case.model, instruction_set).run(case.images, None, case.model.arch.num_gates)
    assert relative_error(result.logits, case.logits) < TOLERANCES[torch.float32].logits
    assert torch.equal(result.decisions.executed.t(), case.executed)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("name", RESIDENT)
def test_odd_shapes_with_every_instruction_set(instruction_set, name):
    model, images = small_model(name), small_images(name, 7)
    with torch.no_grad():
        trace = model.trace(images)
    result = engine_for(model, instruction_set).run(images, None, model.arch.num_gates)
    assert relative_error(result.logits, trace.logits) < 1e-5
    assert torch.equal(result.decisions.executed.t(), trace.masks.bool())


@pytest.mark.skipif("avx512bf16" not in _C.instruction_sets(), reason="needs AVX512-BF16")
def test_bfloat16_products_leave_float32_alone():
    """The same bits as AVX-512 without bfloat16 in a float32 network, others in a bfloat16 one."""
    images = small_images("rnn", 5)
    logits = {(name, dtype): engine_for(small_model("rnn"), name, dtype).run(images.to(dtype), None, 6).logits
              for name in ("avx512", "avx512bf16") for dtype in (torch.float32, torch.bfloat16)}
    assert torch.equal(logits["avx512", torch.float32], logits["avx512bf16", torch.float32])
    assert not torch.equal(logits["avx512", torch.bfloat16], logits["avx512bf16", torch.bfloat16])


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(_C.instruction_sets()), reason="needs AVX2 and AVX-512")
def test_fused_multiply_adds_of_any_width_give_the_same_bits():
    case = GoldenCase("cifar10_rnn_gate_38-s15")
    narrow, wide = (engine_for(case.model, name).run(case.images, None, 17) for name in ("avx2", "avx512"))
    assert torch.equal(narrow.logits, wide.logits)
    assert torch.equal(narrow.decisions.gate_logits, wide.decisions.gate_logits)


def test_portable_code_is_always_there():
    assert _C.instruction_sets()[-1] == "portable"
    with pytest.raises(ValueError, match="instruction_set: 'mmx' is not one"):
        engine_for(small_model("rnn"), "mmx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RESIDENT)
def test_results_do_not_depend_on_the_threads(name, dtype, torch_threads):
    """One image over many threads, few images, many images: the same bits as with one thread."""
    images = small_images(name, 13).to(dtype)
    engine = engine_for(small_model(name), dtype=dtype)
    gates = engine.network.arch.num_gates
    torch_threads(1)
    expected = engine.run(images, None, gates)
    for threads in (2, 3, 4, 7):
        torch_threads(threads)
        for start, stop in ((0, 1), (1, 3), (0, 13)):
            got = engine.run(images[start:stop].contiguous(), None, gates)
            assert torch.equal(got.logits, expected.logits[start:stop])
            assert torch.equal(got.decisions.gate_logits, expected.decisions.gate_logits[:, start:stop])


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize(("kernel", "stride", "channels", "size"), [
    (3, 1, (16, 16), (32, 32)), (3, 1, (64, 64), (8, 8)), (3, 1, (5, 19), (7, 13)), (3, 2, (16, 32), (32, 32)),
    (3, 2, (7, 9), (11, 9)), (1, 2, (32, 64), (16, 16)), (3, 1, (40, 24), (3, 2)), (3, 1, (100, 150), (9, 8))])
def test_convolutions_alone(instruction_set, bfloat16, kernel, stride, channels, size):
    """Winograd (3x3, stride 1) and direct kernels, with padding at every edge: relu(conv2d)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels[1], channels[0], kernel, kernel, generator=generator) / (channels[0] * 3) ** 0.5
    bias, x = torch.randn(channels[1], generator=generator), torch.randn(3, channels[0], *size, generator=generator)
    alone = _C.Convolution("resident", (weight.numpy(), bias.numpy(), stride), bfloat16, 3, size, instruction_set)
    alone.load(x.permute(0, 2, 3, 1).contiguous().numpy())
    alone.run()
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2).relu()
    error = relative_error(torch.from_numpy(alone.read()).permute(0, 3, 1, 2), expected)
    assert error < (1.5e-2 if bfloat16 and instruction_set in ("amx", "avx512bf16") else 2e-6)
