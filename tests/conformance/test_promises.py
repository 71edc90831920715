"""The conformance suite: every engine that registers keeps every promise of docs/architecture.md, on every network."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import CASES, SMALL, GoldenCase, plain_logits, relative_error, small_images, small_model
from torch.utils.flop_counter import FlopCounterMode

import skipnet_rt as srt
from skipnet_rt.engines.registry import REGISTRY
from skipnet_rt.engines.tolerances import TOLERANCES
from skipnet_rt.model.flops import count_operations

NETWORKS = sorted(SMALL)
GATED = sorted(set(SMALL) - {"dense"})


def engine_devices():
    """Every registered engine on every kind of device there is here."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [(name, kind) for name, engine in REGISTRY.items() for kind in kinds
            if engine.devices is None or kind in engine.devices]


@pytest.fixture(params=engine_devices(), ids="-".join)
def target(request):
    """(engine, device) for srt.compile."""
    return dict(zip(("engine", "device"), request.param, strict=True))


def compiled(model, target, dtype=torch.float32, **options):
    """A runtime, or a skipped test where the engine objects to this network or dtype."""
    engine = REGISTRY[target["engine"]]
    if reason := engine.unsupported_reason(model.arch, torch.device(target["device"]), dtype):
        pytest.skip(f"{engine.name}: {reason}")
    return srt.compile(model, dtype=dtype, **target, **options)


def alternating_routing(count, gates):
    """Decisions that differ from image to image: bool [count, gates], about half of them true."""
    return torch.rand(count, gates, generator=torch.Generator().manual_seed(3)) < 0.5


# Promise 1: right.

@pytest.mark.parametrize("name", CASES)
def test_golden_cases(target, name):
    case = GoldenCase(name)
    runtime = compiled(case.model, target)
    images = case.images.to(runtime.device)
    result = runtime.infer(images)
    tolerance = TOLERANCES[torch.float32]
    assert relative_error(result.logits.cpu(), case.logits) < tolerance.logits
    assert torch.equal(result.executed.cpu(), case.executed)
    torch.testing.assert_close(result.probabilities.cpu().double(), case.probabilities, atol=1e-5, rtol=0)
    single = runtime.infer(images[:1])
    assert torch.equal(single.executed.cpu(), case.executed[:1])
    assert torch.equal(single.logits, result.logits[:1])


def other_dtypes():
    """Cases with dtypes; float16 has no fast kernels on a CPU and is left to three networks."""
    quick = {"cifar10_rnn_gate_38-s15", "cifar10_feedforward_38-s71"}
    for case in (case for case in CASES if "cifar" in case or "_18" in case):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            if dtype != torch.float16 or case in quick | {"cifar10_rnn_gate_74-s23"}:
                yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=[] if case in quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "dtype"), list(other_dtypes()))
def test_other_dtypes_stay_within_the_error_bar(target, name, dtype):
    case = GoldenCase(name)
    runtime = compiled(case.model, target, dtype)
    images = case.images.to(runtime.device)
    result = runtime.infer(images, routing=case.executed.to(runtime.device))
    tolerance = TOLERANCES[dtype]
    bar = tolerance.logits
    if bar is None:
        plain = plain_logits(copy.deepcopy(case.model).to(dtype), case.images.to(dtype), case.executed)
        bar = 2 * relative_error(plain, case.logits)
    assert result.logits.dtype == dtype
    assert relative_error(result.logits.cpu(), case.logits) <= bar
    clear = (case.probabilities - 0.5).abs() > tolerance.decision
    decided = result.probabilities.cpu() > 0.5
    assert torch.equal(decided[clear], case.executed[clear])


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_the_model_free_and_forced(target, name):
    model, images = small_model(name), small_images(name, 7)
    runtime = compiled(model, target)
    with torch.no_grad():
        trace = model.trace(images)
    free = runtime.infer(images.to(runtime.device))
    assert torch.equal(free.executed.cpu(), trace.masks.bool())
    assert relative_error(free.logits.cpu(), trace.logits) < 1e-5
    routing = alternating_routing(7, model.arch.num_gates)
    forced = runtime.infer(images.to(runtime.device), routing=routing.to(runtime.device))
    assert torch.equal(forced.executed.cpu(), routing)
    assert relative_error(forced.logits.cpu(), plain_logits(model, images, routing)) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_call_returns_what_the_model_returns(target, name, batch):
    model, images = small_model(name), small_images(name, batch)
    runtime = compiled(model, target)
    with torch.no_grad():
        expected = model(images)
    got = runtime(images.to(runtime.device))
    torch.testing.assert_close(got, expected, check_device=False, atol=1e-4, rtol=1e-4)


def test_small_networks_both_execute_and_skip():
    """The other tests would say little otherwise."""
    for name in GATED:
        executed = srt.compile(small_model(name), engine="eager").infer(small_images(name, 7)).executed
        assert 0.1 < executed.double().mean() < 0.9, name


# Promise 2: an image's result does not depend on its company.

@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance_is_bitwise(target, name, dtype):
    runtime = compiled(small_model(name), target, dtype)
    images = small_images(name, 19).to(runtime.device)
    whole = runtime.infer(images)
    again = runtime.infer(images)
    assert torch.equal(whole.logits, again.logits)
    for start, stop in [(0, 1), (4, 5), (18, 19), (0, 2), (3, 8), (1, 19)]:
        part = runtime.infer(images[start:stop])
        assert torch.equal(part.logits, whole.logits[start:stop])
        assert torch.equal(part.probabilities, whole.probabilities[start:stop])
        assert torch.equal(part.executed, whole.executed[start:stop])
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1)).to(runtime.device)
    assert torch.equal(runtime.infer(images[order]).logits, whole.logits[order])


def test_probabilities_do_not_depend_on_vectors():
    """A library computes a batch's first numbers with vectors, of up to 32 in a step, and the others one by one."""
    runtime, images = srt.compile(small_model("rnn"), engine="eager"), small_images("rnn", 67)
    whole = runtime.infer(images).probabilities
    assert torch.equal(whole, torch.cat([runtime.infer(image).probabilities for image in images.split(1)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10_rnn_gate_110-s33", "cifar10_feedforward_38-s71",
                                  "imagenet_rnn_gate_50-s134"])
def test_batch_invariance_of_published_networks(target, name):
    case = GoldenCase(name)
    runtime = compiled(case.model, target)
    images = case.images.to(runtime.device)
    whole = runtime.infer(images.repeat(3, 1, 1, 1)).logits
    for row in range(len(images)):
        assert torch.equal(runtime.infer(images[row:row + 1]).logits[0], whole[row])
        assert torch.equal(whole[row], whole[len(images) + row])


def test_results_do_not_depend_on_max_batch(target):
    images = small_images("rnn", 11)
    whole = compiled(small_model("rnn"), target)
    split = compiled(small_model("rnn"), target, max_batch=4)
    on_device = images.to(whole.device)
    assert torch.equal(whole.infer(on_device).logits, split.infer(on_device).logits)
    torch.testing.assert_close(split(on_device), whole(on_device), atol=0, rtol=0)
    routing = alternating_routing(11, 6).to(whole.device)
    assert torch.equal(whole.infer(on_device, routing).logits, split.infer(on_device, routing).logits)


# Promise 3: a skipped block does not touch the image.

@pytest.mark.parametrize("name", GATED)
def test_a_skipped_block_leaves_no_trace(target, name):
    """Its weights may be anything at all, NaN included, for the images that skip it."""
    model = copy.deepcopy(small_model(name))
    images = small_images(name, 6)
    plan = model.arch.blocks[1]
    routing = alternating_routing(6, model.arch.num_gates)
    routing[:, 0] = torch.tensor([True, False, True, False, False, True])
    sound = compiled(model, target)
    with torch.no_grad():
        model.block(plan).conv1.weight.fill_(float("nan"))
    poisoned = compiled(model, target)
    on_device, forced = images.to(sound.device), routing.to(sound.device)
    expected = sound.infer(on_device, routing=forced).logits
    got = poisoned.infer(on_device, routing=forced).logits
    skipped = ~routing[:, 0]
    assert torch.equal(got[skipped], expected[skipped])


@pytest.mark.parametrize("name", NETWORKS)
def test_eager_computes_exactly_the_executing_images_blocks(name):
    """PyTorch's own counter sees the multiply-adds that our accounting promises, and no more."""
    model, images = small_model(name), small_images(name, 6)
    architecture = model.arch
    runtime = srt.compile(model, engine="eager")
    with FlopCounterMode(display=False) as counter:
        result = runtime.infer(images)
    expected = result.multiply_adds.sum().item() + 6 * architecture.features * architecture.num_classes
    if architecture.gated and architecture.gate != "rnn":  # the engine folds the two logits into one
        expected -= 6 * sum(plan.out_channels for plan in architecture.blocks[:-1])
    assert counter.get_total_flops() == 2 * expected
    if architecture.gated:
        counts = count_operations(architecture)
        everything = counts.dense.multiply_adds + sum(gate.multiply_adds for gate in counts.gates)
        assert result.multiply_adds.sum() < 6 * everything


# Promise 4: no waiting for the device.

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", GATED)
def test_never_waits_for_the_device(target, name):
    if target["device"] in REGISTRY[target["engine"]].synchronizes_on or target["device"] == "cpu":
        pytest.skip(f"{target['engine']} does not promise this on {target['device']}")
    runtime = compiled(small_model(name), target)
    images = small_images(name, 9).to(runtime.device)
    runtime(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runtime(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Promise 5: any input gets the right result or one clear exception.

@pytest.mark.parametrize("name", NETWORKS)
def test_empty_batches(target, name):
    runtime = compiled(small_model(name), target)
    images = small_images(name, 2)[:0]
    result = runtime.infer(images.to(runtime.device))
    gates = SMALL[name].num_gates
    assert result.logits.shape == (0, SMALL[name].num_classes)
    assert result.executed.shape == result.probabilities.shape == (0, gates)
    assert result.executed.dtype == torch.bool
    with torch.no_grad():
        full = small_model(name)(small_images(name, 2))
    empty = runtime(images.to(runtime.device))
    if name == "dense":
        assert empty.shape == (0, 10)
    else:
        assert [len(part) for part in empty] == [0, *(len(part) for part in full[1:])]
        assert all(len(mask) == 0 for mask in empty[1])


def test_any_memory_layout(target):
    runtime = compiled(small_model("rnn"), target)
    images = small_images("rnn", 8).to(runtime.device)
    expected = runtime.infer(images).logits
    wide = torch.zeros(8, 3, 16, 32, device=runtime.device)
    wide[..., ::2] = images
    layouts = {"channels last": images.contiguous(memory_format=torch.channels_last), "strided": wide[..., ::2],
               "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
               "requiring a gradient": images.clone().requires_grad_()}
    for layout, view in layouts.items():
        result = runtime.infer(view).logits
        assert torch.equal(result, expected), layout
        assert not result.requires_grad
    assert torch.equal(runtime.infer(images[::2]).logits, expected[::2])
    assert torch.equal(runtime.infer(images[2:3].expand(4, -1, -1, -1)).logits, expected[2:3].expand(4, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floating_inputs_are_converted(target, dtype):
    runtime = compiled(small_model("rnn"), target)
    images = small_images("rnn", 3).to(runtime.device, dtype)
    result = runtime.infer(images)
    assert result.logits.dtype == torch.float32
    assert torch.equal(result.logits, runtime.infer(images.float()).logits)


def test_inputs_are_left_as_they_are(target):
    runtime = compiled(small_model("rnn"), target)
    images = small_images("rnn", 4).to(runtime.device)
    routing = alternating_routing(4, 6).to(runtime.device)
    before = images.clone(), routing.clone()
    runtime.infer(images, routing=routing)
    runtime(images)
    assert torch.equal(images, before[0])
    assert torch.equal(routing, before[1])


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda x: x.numpy(), TypeError, "images must be a torch.Tensor, got ndarray"),
    (lambda x: (x * 50).to(torch.uint8), TypeError, "images must be floating point.*torch.uint8"),
    (lambda x: x.to(torch.complex64), TypeError, "images must be floating point.*complex64"),
    (lambda x: x[:, :2], ValueError, r"images must have shape \[N, 3, 16, 16\].*got \[2, 2, 16, 16\]"),
    (lambda x: x[..., :15], ValueError, r"got \[2, 3, 16, 15\]"),
    (lambda x: x[0], ValueError, r"got \[3, 16, 16\]"),
    (lambda x: x.to("meta"), ValueError, "images must be on .*got meta"),
])
def test_bad_images_get_one_clear_exception(target, change, error, message):
    runtime = compiled(small_model("rnn"), target)
    for call in (runtime, runtime.infer):
        with pytest.raises(error, match=message):
            call(change(small_images("rnn", 2)))


@pytest.mark.parametrize(("routing", "error", "message"), [
    ([True] * 6, TypeError, "routing must be a torch.Tensor, got list"),
    (torch.ones(5, dtype=torch.bool), ValueError, r"routing must have shape \[6\] or \[2, 6\].*got \[5\]"),
    (torch.ones(3, 6, dtype=torch.bool), ValueError, r"got \[3, 6\]"),
    (torch.full((6,), 0.5), ValueError, "routing must be bool, or 0 and 1, got 0.5"),
    (torch.ones(6, dtype=torch.bool, device="meta"), ValueError, "routing must be on"),
])
def test_bad_routing_gets_one_clear_exception(target, routing, error, message):
    runtime = compiled(small_model("rnn"), target)
    if isinstance(routing, torch.Tensor) and routing.device.type != "meta":
        routing = routing.to(runtime.device)
    with pytest.raises(error, match=message):
        runtime.infer(small_images("rnn", 2).to(runtime.device), routing=routing)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8], ids=str)
def test_routing_of_any_kind(target, dtype):
    runtime = compiled(small_model("rnn"), target)
    images = small_images("rnn", 3).to(runtime.device)
    routing = torch.tensor([1, 0, 1, 1, 0, 0], dtype=dtype, device=runtime.device)
    result = runtime.infer(images, routing=routing)
    assert torch.equal(result.executed, routing.bool().expand(3, 6))
    assert torch.equal(runtime.infer(images, routing=routing.expand(3, 6)).logits, result.logits)


def test_forcing_the_gates_own_decisions_changes_nothing(target):
    runtime = compiled(small_model("bottleneck"), target)
    images = small_images("bottleneck", 4).to(runtime.device)
    free = runtime.infer(images)
    forced = runtime.infer(images, routing=free.executed)
    assert torch.equal(forced.logits, free.logits)
    assert torch.equal(forced.probabilities, free.probabilities)
    assert torch.equal(free.executed, free.probabilities > 0.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_with_nan_gets_nan_and_spoils_no_other(target, name):
    runtime = compiled(small_model(name), target)
    images = small_images(name, 5).to(runtime.device)
    clean = runtime.infer(images)
    images = images.clone()
    images[3, 0, 4, 5] = float("nan")
    result = runtime.infer(images)
    assert result.logits[3].isnan().all()
    assert result.probabilities[3].isnan().all()
    assert not result.executed[3].any()
    others = [0, 1, 2, 4]
    assert torch.equal(result.logits[others], clean.logits[others])
    forced = runtime.infer(images, routing=torch.ones(SMALL[name].num_gates, dtype=torch.bool, device=runtime.device))
    assert forced.logits[3].isnan().all()
    assert forced.executed.all()


def test_two_threads_may_call_one_runtime(target):
    runtime = compiled(small_model("rnn"), target)
    batches = [small_images("rnn", count, seed=count).to(runtime.device) for count in (3, 8)]
    expected = [runtime.infer(images).logits for images in batches]

    def wrong(which):
        return sum(not torch.equal(runtime.infer(batches[which]).logits, expected[which]) for _ in range(20))

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(wrong, (0, 1))) == [0, 0]
