"""What holds for every engine on a GPU beyond the conformance suite: graphs, streams, threads and memory."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from networks import SMALL, relative_error, small_images, small_model

import skipnet_rt as srt
from skipnet_rt.engines.registry import REGISTRY

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]

# Those that run on a GPU without waiting for it.
ENGINES = [name for name, engine in REGISTRY.items()
           if (engine.devices is None or "cuda" in engine.devices) and "cuda" not in engine.synchronizes_on]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


def compiled(name, engine, dtype=torch.float32, **options):
    """A runtime, or a skipped test where the engine objects to the network."""
    if reason := REGISTRY[engine].unsupported_reason(SMALL[name], torch.device("cuda"), dtype):
        pytest.skip(f"{engine}: {reason}")
    return srt.compile(small_model(name), engine=engine, device="cuda", dtype=dtype, **options)


def images_for(name, count, seed=5):
    return small_images(name, count, seed).cuda()


@pytest.fixture
def no_waiting():
    """From its call on, anything that waits for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_no_call_waits_for_the_device(engine, name, batch, no_waiting):
    runtime, images = compiled(name, engine), images_for(name, batch)
    routing = torch.ones(SMALL[name].num_gates, dtype=torch.bool, device="cuda")
    calls = (lambda: runtime(images), lambda: runtime.infer(images), lambda: runtime.infer(images, routing=routing))
    for call in calls:
        call()
    torch.cuda.synchronize()
    no_waiting()
    for call in calls:
        call()


@pytest.mark.parametrize("name", ["rnn", "bottleneck", "feedforward1", "dense"])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_callers_graph_may_hold_a_call(engine, name, batch):
    runtime, images = compiled(name, engine), images_for(name, batch)
    others = images_for(name, batch, seed=9)
    expected = [runtime.infer(each).logits for each in (images, others)]
    static = images.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = runtime.infer(static)
    for each, logits in zip((images, others, images), (*expected, expected[0]), strict=True):
        static.copy_(each)
        graph.replay()
        assert torch.equal(result.logits, logits)


@pytest.mark.parametrize("name", ["rnn", "bottleneck"])
def test_two_streams_do_not_disturb_each_other(engine, name):
    """Batches of the same bucket, enqueued without waiting in between."""
    runtime = compiled(name, engine)
    batches = [images_for(name, 5, seed) for seed in (5, 6)]
    expected = [runtime.infer(images).logits for images in batches]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(50):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[which].append(runtime.infer(batches[which]).logits)
    torch.cuda.synchronize()
    for results, logits in zip(got, expected, strict=True):
        assert all(torch.equal(each, logits) for each in results)


@pytest.mark.parametrize("batch", [900, 1024])
def test_buckets_that_only_launches_from_python_are_worth(engine, batch):
    """More pixels than 32 images of 224x224 have: the Triton engine captures them, others launch directly."""
    runtime, images = compiled("bottleneck", engine, torch.float16), images_for("bottleneck", batch)
    whole = [runtime.infer(images).logits for _ in range(2)]
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0][:5], runtime.infer(images[:5]).logits)
    assert torch.equal(whole[0][-3:], runtime.infer(images[-3:]).logits)


def test_a_runtime_serves_other_streams_than_the_one_it_was_made_on(engine):
    images = images_for("bottleneck", 3)
    model = deepcopy(small_model("bottleneck")).cuda()  # or weights were copied from the host, which waits
    expected = srt.compile(model, engine=engine, dtype=torch.float16).infer(images).logits
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)
        runtime = srt.compile(model, engine=engine, dtype=torch.float16)
    with torch.cuda.stream(torch.cuda.Stream()):
        logits = runtime.infer(images).logits
    torch.cuda.synchronize()
    assert torch.equal(logits, expected)


def test_two_threads_with_streams_of_their_own(engine):
    runtime = compiled("rnn", engine)
    batches = [images_for("rnn", count, seed=count) for count in (3, 8)]
    expected = [runtime.infer(images).logits for images in batches]
    torch.cuda.synchronize()

    def wrong(which):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [runtime.infer(batches[which]).logits for _ in range(50)]
        stream.synchronize()
        return sum(not torch.equal(result, expected[which]) for result in results)

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(wrong, (0, 1))) == [0, 0]


def test_a_result_outlives_the_next_call(engine):
    runtime = compiled("rnn", engine)
    first, second = images_for("rnn", 4, seed=5), images_for("rnn", 4, seed=6)
    result = runtime.infer(first)
    kept = [value.clone() for value in (result.logits, result.executed, result.probabilities)]
    runtime.infer(second)
    for value, before in zip((result.logits, result.executed, result.probabilities), kept, strict=True):
        assert torch.equal(value, before)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["rnn", "bottleneck"])
def test_calls_inside_and_outside_of_inference_mode(engine, name, first):
    """What the first call makes to stay, later calls write to."""
    runtime, images = compiled(name, engine), images_for(name, 3)
    with torch.inference_mode(first):
        before = runtime.infer(images).logits.clone()
    with torch.inference_mode(not first):
        assert torch.equal(runtime.infer(images).logits, before)


def test_first_calls_of_several_runtimes_at_once(engine):
    """Each captures a graph while the others launch, allocate and want to capture."""
    runtimes, images = [compiled("rnn", engine) for _ in range(4)], images_for("rnn", 3)
    expected = runtimes[0].infer(images).logits
    torch.cuda.synchronize()

    def wrong(runtime):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [runtime.infer(images[:count]).logits for count in (1, 2, 3)]
        stream.synchronize()
        return sum(not torch.equal(result, expected[:len(result)]) for result in results)

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(wrong, runtimes[1:])) == [0, 0, 0]


def test_inside_torch_compile_with_its_cuda_graphs(engine):
    """Whose memory and ours stay apart, also where a bucket's first call comes from within."""
    runtime, images, others = compiled("rnn", engine), images_for("rnn", 3), images_for("rnn", 3, seed=8)
    fast = torch.compile(lambda images: runtime.infer(images - 1).logits + 1, mode="reduce-overhead")
    expected = compiled("rnn", engine).infer(images - 1).logits + 1
    direct = compiled("rnn", engine).infer(others).logits
    for _ in range(5):
        assert torch.equal(fast(images), expected)
        assert torch.equal(runtime.infer(others).logits, direct)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_stays_what_it_was(engine, dtype):
    """Over 10,000 calls."""
    runtime = compiled("bottleneck", engine, dtype)
    batches = [images_for("bottleneck", count) for count in (1, 3, 8)]
    for images in batches:
        runtime.infer(images)
    torch.cuda.synchronize()
    used, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for call in range(10_000):
        runtime.infer(batches[call % len(batches)])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == used
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.parametrize("name", ["rnn", "bottleneck"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_a_thousand_times(engine, name, dtype):
    """A race would show: the row lists and the pooled sums pass from launch to launch."""
    runtime, images = compiled(name, engine, dtype), images_for(name, 7)
    first = runtime.infer(images)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = runtime.infer(images)
        differing += (again.logits != first.logits).sum() + (again.executed != first.executed).sum()
    assert differing.item() == 0


@pytest.mark.parametrize("name", sorted(SMALL))
def test_agrees_with_the_oracle_on_the_cpu(engine, name):
    images = small_images(name, 9)
    expected = srt.compile(small_model(name), engine="eager").infer(images)
    result = compiled(name, engine).infer(images.cuda())
    assert torch.equal(result.executed.cpu(), expected.executed)
    assert relative_error(result.logits.cpu(), expected.logits) < 1e-5


@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="one CUDA device")
def test_runs_on_another_device_than_the_current_one(engine):
    images = small_images("rnn", 3)
    runtimes = [srt.compile(small_model("rnn"), engine=engine, device=f"cuda:{index}") for index in (0, 1)]
    logits = [runtime.infer(images.to(runtime.device)).logits for runtime in runtimes]
    assert torch.cuda.current_device() == 0
    assert torch.equal(logits[0].cpu(), logits[1].cpu())
