"""What only the CPU's compacted strategy has: bottlenecks on threads of its own, channel-blocked convolutions."""

import pytest
import torch
from networks import GoldenCase, relative_error, small_images, small_model

from skipnet_rt import _C
from skipnet_rt.engines.cpu_compacted import CompactedCpuEngine
from skipnet_rt.packing import pack
from skipnet_rt.tolerances import TOLERANCES

NETWORKS = ["rnn", "feedforward1", "feedforward2", "bottleneck", "imagenet-reinforced", "bottleneck-feedforward",
            "dense"]


def engine_for(model, instruction_set=None, dtype=torch.float32):
    return CompactedCpuEngine(pack(model, torch.device("cpu"), dtype), instruction_set)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("name", ["imagenet_rnn_gate_18-s111", "imagenet_rnn_gate_50-s134"])
def test_golden_cases_with_every_instruction_set(instruction_set, name):
    case = GoldenCase(name)
    result = engine_for(case.model, instruction_set).run(case.images, None, case.model.arch.num_gates)
    assert relative_error(result.logits, case.logits) < TOLERANCES[torch.float32].logits
    assert torch.equal(result.decisions.executed.t(), case.executed)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("name", NETWORKS)
def test_odd_shapes_with_every_instruction_set(instruction_set, name):
    """CIFAR-scale networks too: the strategy takes any."""
    model, images = small_model(name), small_images(name, 11)
    with torch.no_grad():
        trace = model.trace(images)
    result = engine_for(model, instruction_set).run(images, None, model.arch.num_gates)
    assert relative_error(result.logits, trace.logits) < 1e-5
    assert torch.equal(result.decisions.executed.t(), trace.masks.bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_results_do_not_depend_on_the_threads(name, dtype, torch_threads):
    """One image, few images, more than go through the network together: the same bits as with one thread."""
    images = small_images(name, 19).to(dtype)
    engine = engine_for(small_model(name), dtype=dtype)
    gates = engine.network.arch.num_gates
    torch_threads(1)
    expected = engine.run(images, None, gates)
    for threads in (2, 3, 4, 7):
        torch_threads(threads)
        for start, stop in ((0, 1), (1, 3), (0, 19)):
            got = engine.run(images[start:stop].contiguous(), None, gates)
            assert torch.equal(got.logits, expected.logits[start:stop])
            assert torch.equal(got.decisions.gate_logits, expected.decisions.gate_logits[:, start:stop])


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck-feedforward"])
def test_a_batch_that_nobody_executes_and_one_that_all_do(name, torch_threads):
    """Blocks without an image pass at once, on every thread: no thread may wait for one that has nothing to do."""
    torch_threads(3)
    model, images = small_model(name), small_images(name, 3)
    engine, gates = engine_for(model), model.arch.num_gates
    routes = torch.cat([torch.zeros(2, gates, dtype=torch.bool), torch.ones(1, gates, dtype=torch.bool)])
    together = engine.run(images, routes, gates).logits
    for _ in range(50):
        for row in range(3):
            alone = engine.run(images[row:row + 1].contiguous(), routes[row:row + 1], gates).logits
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize(("kernel", "stride", "channels", "size"), [
    (7, 2, (3, 64), (30, 27)), (1, 1, (64, 40), (14, 14)), (1, 1, (5, 100), (7, 9)), (1, 2, (32, 64), (15, 12)),
    (3, 1, (64, 64), (28, 28)), (3, 1, (5, 19), (21, 30)), (3, 1, (70, 24), (7, 7)), (3, 1, (40, 24), (3, 2)),
    (3, 2, (16, 33), (17, 32)), (3, 2, (7, 9), (11, 9))])
def test_convolutions_alone(instruction_set, bfloat16, kernel, stride, channels, size):
    """Stem, 1x1, Winograd with either tile and strided kernels, with padding at every edge: relu(conv2d)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels[1], channels[0], kernel, kernel, generator=generator) / (channels[0] * 3) ** 0.5
    bias, x = torch.randn(channels[1], generator=generator), torch.randn(10, channels[0], *size, generator=generator)
    alone = _C.Convolution("compacted", (weight.numpy(), bias.numpy(), stride), bfloat16, 10, size, instruction_set)
    alone.load(x.permute(0, 2, 3, 1).contiguous().numpy())
    alone.run()
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2).relu()
    error = relative_error(torch.from_numpy(alone.read()).permute(0, 3, 1, 2), expected)
    assert error < (1.5e-2 if bfloat16 and instruction_set in ("avx512bf16", "amx") else 2e-6)


