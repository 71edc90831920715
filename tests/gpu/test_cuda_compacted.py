"""The GPU's compacted strategy: what its captured graphs add to the promises of test_promises.py."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import SMALL, plain_logits, relative_error, small_images, small_model

from skipnet_rt.engines.cuda import CudaEngine
from skipnet_rt.engines.cuda_compacted import CompactedStrategy
from skipnet_rt.engines.tolerances import TOLERANCES
from skipnet_rt.model.packing import pack

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not CudaEngine.availability(), reason=f"cuda: {CudaEngine.availability()}")]


def engine(name, dtype=torch.float16):
    network = pack(small_model(name), torch.device("cuda", 0), dtype)
    return CudaEngine(network, CompactedStrategy(network))


def images_of(name, count, dtype=torch.float16, seed=5):
    return small_images(name, count, seed).to("cuda", dtype)


def forced(routing):
    """As engines take it: gate-major."""
    return None if routing is None else routing.t()


def call(compacted, images, routing=None):
    """Everything that a call returns."""
    return parts(compacted.run(images, forced(routing), compacted.network.arch.num_gates))


def call_directly(compacted, images, routing=None):
    """The same without a graph."""
    return parts(compacted.strategy._forward(images, forced(routing), None, compacted.network.arch.num_gates))


def parts(done):
    decisions = done.decisions
    return (done.logits, decisions.gate_logits, decisions.probabilities, decisions.executed, decisions.hidden,
            decisions.cell)


def assert_same(results, expected):
    for value, wanted in zip(results, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rnn", "bottleneck", "feedforward1", "dense"])
def test_replays_equal_the_direct_launches(name, dtype, forced):
    """Six images in a graph of eight, after eight that have left something in its places."""
    compacted = engine(name, dtype)
    gates = compacted.network.arch.num_gates
    everything = torch.ones(8, gates, dtype=torch.bool, device="cuda") if forced else None
    call(compacted, images_of(name, 8, dtype, seed=1), everything)
    for seed in (5, 6, 7, 5):
        images = images_of(name, 6, dtype, seed)
        routing = torch.rand(6, gates, generator=torch.Generator().manual_seed(seed)) < 0.5 if forced else None
        routing = None if routing is None else routing.cuda()
        assert_same(call(compacted, images, routing), call_directly(compacted, images, routing))


def test_tf32_where_it_is_asked_for():
    """Read once, when the engine is built; as exact as plain PyTorch with the same setting."""
    model, images = small_model("bottleneck"), images_of("bottleneck", 6, torch.float32)
    routing = torch.rand(6, SMALL["bottleneck"].num_gates, generator=torch.Generator().manual_seed(3)) < 0.5
    exact = plain_logits(copy.deepcopy(model).double(), images.double().cpu(), routing)
    ordinary = engine("bottleneck", torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        asked = engine("bottleneck", torch.float32)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
            plain = plain_logits(copy.deepcopy(model).cuda(), images, routing.cuda()).cpu()
        strict = call(ordinary, images, routing.cuda())[0].cpu()
    finally:
        torch.set_float32_matmul_precision(precision)
    rounded = call(asked, images, routing.cuda())[0].cpu()
    assert relative_error(strict, exact) < TOLERANCES[torch.float32].logits
    assert 1e-5 < relative_error(rounded, exact) <= 2 * relative_error(plain, exact)
    alone = call(asked, images[2:3], routing[2:3].cuda())[0].cpu()
    assert torch.equal(alone[0], rounded[2])


def test_results_outlive_the_next_replay():
    compacted = engine("rnn")
    first, second = images_of("rnn", 4), images_of("rnn", 4, seed=6)
    call(compacted, first)
    results = call(compacted, first)
    kept = [value.clone() for value in results]
    call(compacted, second)
    assert_same(results, kept)


def test_a_bucket_takes_every_batch_up_to_its_size():
    compacted = engine("rnn")
    images = images_of("rnn", 13)
    whole = call(compacted, images)
    call(compacted, images[:8])
    held = compacted.memory
    for count in (8, 5, 6, 7, 9, 13):
        logits, *_ = call(compacted, images[:count])
        assert torch.equal(logits, whole[0][:count])
        assert compacted.memory == held, "no further graph"


def test_a_large_batch_is_not_captured():
    compacted = engine("rnn")
    before = compacted.memory
    images = torch.randn(4100, 3, 16, 16, dtype=torch.float16, device="cuda")  # 8,192 places: too many pixels
    whole = call(compacted, images)
    assert compacted.memory == before
    for value, wanted in zip(call(compacted, images[:3]), whole, strict=True):
        axis = 0 if len(value) == 3 else 1
        assert torch.equal(value, wanted.narrow(axis, 0, 3))


def test_streams_and_threads_share_the_graphs():
    compacted = engine("rnn")
    batches = [images_of("rnn", 5, seed=seed) for seed in range(4)]
    expected = [call(engine("rnn"), images) for images in batches]
    call(compacted, batches[0])
    torch.cuda.synchronize()

    def wrong(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [call(compacted, batches[number]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return sum(not all(map(torch.equal, result, expected[number])) for result in results)

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(wrong, range(4))) == [0] * 4


def test_nothing_waits_and_memory_is_stated():
    compacted = engine("rnn")
    images = images_of("rnn", 8)
    before = compacted.memory
    call(compacted, images)
    held = compacted.memory
    workspace = compacted.strategy._native.workspace_bytes(8)
    assert held - before > workspace, "the graph holds a workspace, its images and results"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            call(compacted, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    for _ in range(1000):
        call(compacted, images)
    assert compacted.memory == held
    assert torch.cuda.memory_allocated() == allocated


def test_a_capture_of_the_callers():
    compacted = engine("rnn")
    images = images_of("rnn", 3)
    expected = [value.clone() for value in call(compacted, images)]
    call(compacted, images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(compacted, images)
    graph.replay()
    assert_same(results, expected)
