"""The CUDA engine's own: which GPUs and networks it takes, and the resident strategy on a GPU.

What every engine on a GPU promises is in test_promises.py and test_gpu_engines.py; that the kernel is right without a
GPU in test_simt_resident.py.
"""

import copy

import pytest
import torch
from networks import SMALL, GoldenCase, relative_error, small_images, small_model

import skipnet_rt as srt
from skipnet_rt import _C
from skipnet_rt.engines.cuda import CudaEngine, built_for
from skipnet_rt.measure.benchmark import random_routing
from skipnet_rt.model.packing import pack

gpu = [pytest.mark.gpu,
       pytest.mark.skipif(not CudaEngine.availability(), reason=f"cuda: {CudaEngine.availability()}")]
built = pytest.mark.skipif(not hasattr(_C, "CudaResident"), reason=f"CUDA sources {_C.cuda_build}")
on_gpu = [pytest.param(dtype, marks=gpu, id=str(dtype)) for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("archs", "capability", "expected"), [
    ("80,90", "8.0", True), ("80,90", "8.9", True), ("80,90", "9.0", True), ("80,90", "12.0", True),
    ("80,90", "7.5", False), ("90a", "9.0", True), ("90a", "8.6", False), ("86", "8.0", False), ("86", "8.9", True),
    ("90a,100,120", "10.3", True), ("100", "12.0", True), ("", "9.0", False)])
def test_which_gpus_the_build_runs_on(monkeypatch, archs, capability, expected):
    """Code runs within its generation on later chips, 90a on its own only; the last one's PTX on everything later."""
    monkeypatch.setattr(_C, "cuda_archs", archs)
    assert built_for(capability) == expected


@built
@pytest.mark.parametrize(("change", "message"), [
    ({"element": "float32"}, "element: expected float16 or bfloat16, got float32"),
    ({"element": "int8"}, "element: expected float32, tf32, float16 or bfloat16, got int8"),
    ({"in_channels": 17}, "in: expected 1 to 16 channels, got 17"),
    ({"blocks": [1, 1, 1, 1]}, "blocks: expected 1 to 3 groups, got 4"),
    ({"blocks": [1, 0]}, "blocks: expected 1 or more in a group, got 0"),
    ({"hidden": 33}, "embed, hidden: expected up to 32, got 10 and 33"),
    ({"embed": 0}, "embed, hidden: expected up to 32, got 0 and 10"),
])
def test_native_code_names_what_is_wrong(change, message):
    numbers = {"element": "float16", "in_channels": 3, "image_size": (32, 32), "classes": 10, "blocks": [1, 1, 1],
               "embed": 10, "hidden": 10}
    with pytest.raises(ValueError, match=message):
        _C.CudaResident(**{**numbers, **change})


@built
def test_the_resident_strategy_says_what_it_does_not_take():
    from skipnet_rt.engines.cuda_resident import ResidentStrategy

    def reason(arch, dtype=torch.float16):
        return ResidentStrategy.unsupported_reason(arch, torch.device("cuda", 0), dtype)

    assert "in 16 bits, not in torch.float32" in reason(SMALL["rnn"], torch.float32)
    for name in ("bottleneck", "imagenet-reinforced", "feedforward1"):
        assert "CIFAR-scale networks of basic blocks without feed-forward gates" in reason(SMALL[name])
    assert "not (16, 32, 128)" in reason(SMALL["rnn"].replace(widths=(16, 32, 128)))
    assert "not 17 and 10" in reason(SMALL["rnn"].replace(in_channels=17))
    assert "not 3 and 40" in reason(SMALL["rnn"].replace(hidden_dim=40))


def resident(name, dtype, **options):
    """The strategy itself, on a GPU."""
    from skipnet_rt.engines.cuda_resident import ResidentStrategy

    return ResidentStrategy(pack(small_model(name), torch.device("cuda", 0), dtype), **options)


def bits(done):
    decisions = done.decisions
    return [part.clone() for part in (done.logits, decisions.gate_logits, decisions.executed, decisions.hidden,
                                      decisions.cell)]


@pytest.mark.parametrize("dtype", on_gpu)
def test_each_strategy_takes_its_networks(dtype):
    for name in SMALL:
        runtime = srt.compile(small_model(name), engine="cuda", device="cuda", dtype=dtype)
        taken = SMALL[name].stem == "cifar" and SMALL[name].block == "basic" and SMALL[name].gate in ("rnn", "none")
        assert type(runtime.engine.strategy).__name__ == ("ResidentStrategy" if taken else "CompactedStrategy")


@pytest.mark.parametrize("dtype", on_gpu)
def test_bits_do_not_depend_on_the_plan(dtype):
    """One image at a time or several, one round or several of a dynamic plan, or a cluster per image."""
    images = small_images("rnn", 700).cuda().to(dtype)
    forced = random_routing(SMALL["rnn"], 700, 0.5).cuda().t()
    expected = bits(resident("rnn", dtype, images=1).run(images, forced, 7))
    for engine in (resident("rnn", dtype), resident("rnn", dtype, images=2), resident("rnn", dtype, images=4)):
        assert all(map(torch.equal, bits(engine.run(images, forced, 7)), expected))
    if torch.cuda.get_device_capability()[0] in (9, 10):
        for cluster in (2, 4):
            engine = resident("rnn", dtype, cluster=cluster)
            assert all(map(torch.equal, bits(engine.run(images, forced, 7)), expected))


@pytest.mark.parametrize("dtype", on_gpu)
def test_no_race_changes_a_bit(dtype):
    case = GoldenCase("cifar10_rnn_gate_38-s15")
    runtime = srt.compile(case.model, engine="cuda", device="cuda", dtype=dtype)
    images = case.images.repeat(150, 1, 1, 1)[:300].cuda()
    routing = random_routing(runtime.arch, len(images), 0.5).cuda()
    expected = runtime.infer(images, routing).logits
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(300):
        wrong += (runtime.infer(images, routing).logits != expected).sum()
    assert wrong.item() == 0


@pytest.mark.parametrize("dtype", on_gpu)
def test_published_depths_agree_with_float64_on_the_same_route(dtype):
    for name in ("cifar10_rnn_gate_110-s33", "cifar10_rnn_gate_152-s44"):
        case = GoldenCase(name)
        runtime = srt.compile(case.model, engine="cuda", device="cuda", dtype=dtype)
        free = runtime.infer(case.images.cuda())
        oracle = srt.compile(copy.deepcopy(case.model).double(), engine="eager")
        exact = oracle.infer(case.images.double(), free.executed.cpu())
        plain = srt.compile(case.model, engine="eager", device="cuda", dtype=dtype)
        bar = 2 * relative_error(plain.infer(case.images.cuda(), free.executed).logits.cpu(), exact.logits)
        assert relative_error(free.logits.cpu(), exact.logits) <= bar


@pytest.mark.parametrize("dtype", on_gpu)
def test_a_call_is_one_launch(dtype):
    runtime = srt.compile(small_model("rnn"), engine="cuda", device="cuda", dtype=dtype)
    images, routing = small_images("rnn", 8).cuda().to(dtype), torch.ones(6, dtype=torch.bool, device="cuda")
    runtime.infer(images, routing)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        runtime.infer(images, routing)
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 1
    assert "resident" in on_device[0]


@pytest.mark.parametrize("dtype", on_gpu)
def test_memory_is_what_was_stated(dtype):
    model = small_model("rnn")
    srt.compile(model, engine="cuda", device="cuda", dtype=dtype)  # the context's own memory
    before = torch.cuda.memory_allocated()
    runtime = srt.compile(model, engine="cuda", device="cuda", dtype=dtype)
    taken = torch.cuda.memory_allocated() - before
    tensors = 100  # each rounded up to 512 bytes
    assert runtime.memory <= taken <= runtime.memory + 512 * tensors
