"""What both of the CPU's native strategies keep: right on every instruction set, alike on any number of threads.

And callers of many threads, forks, workspaces that are reused.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from networks import GoldenCase, relative_error, small_images, small_model

from skipnet_rt import _C
from skipnet_rt.engines.cpu import CpuEngine
from skipnet_rt.engines.tolerances import TOLERANCES
from skipnet_rt.model.packing import pack

STRATEGIES = ("resident", "compacted")

GOLDEN = [("resident", "cifar10_rnn_gate_38-s15"), ("resident", "cifar10_feedforward_38-s71"),
          ("resident", "cifar10_feedforward_110-s83"), ("compacted", "imagenet_rnn_gate_18-s111"),
          ("compacted", "imagenet_rnn_gate_50-s134")]

# The compacted strategy takes any network.
NETWORKS = [*(("resident", name) for name in ("rnn", "rnn-reinforced", "feedforward1", "feedforward2", "dense")),
            *(("compacted", name) for name in ("rnn", "feedforward1", "feedforward2", "bottleneck",
                                               "imagenet-reinforced", "bottleneck-feedforward", "dense"))]

# Strategy, kernel, stride, channels, size.
CONVOLUTIONS = [
    *(("resident", *shape) for shape in (
        (3, 1, (16, 16), (32, 32)), (3, 1, (64, 64), (8, 8)), (3, 1, (5, 19), (7, 13)), (3, 2, (16, 32), (32, 32)),
        (3, 2, (7, 9), (11, 9)), (1, 2, (32, 64), (16, 16)), (3, 1, (40, 24), (3, 2)), (3, 1, (100, 150), (9, 8)))),
    *(("compacted", *shape) for shape in (
        (7, 2, (3, 64), (30, 27)), (1, 1, (64, 40), (14, 14)), (1, 1, (5, 100), (7, 9)), (1, 2, (32, 64), (15, 12)),
        (3, 1, (64, 64), (28, 28)), (3, 1, (5, 19), (21, 30)), (3, 1, (70, 24), (7, 7)), (3, 1, (40, 24), (3, 2)),
        (3, 2, (16, 33), (17, 32)), (3, 2, (7, 9), (11, 9))))]


def engine_for(strategy, model, instruction_set=None, dtype=torch.float32):
    return CpuEngine(pack(model, torch.device("cpu"), dtype), strategy, instruction_set)


def run(engine, images, routing=None):
    return engine.run(images, None if routing is None else routing.t(), engine.network.arch.num_gates)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize(("strategy", "name"), GOLDEN)
def test_golden_cases_with_every_instruction_set(instruction_set, strategy, name):
    case = GoldenCase(name)
    result = run(engine_for(strategy, case.model, instruction_set), case.images)
    assert relative_error(result.logits, case.logits) < TOLERANCES[torch.float32].logits
    assert torch.equal(result.decisions.executed.t(), case.executed)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize(("strategy", "name"), NETWORKS)
def test_odd_shapes_with_every_instruction_set(instruction_set, strategy, name):
    model, images = small_model(name), small_images(name, 11)
    with torch.no_grad():
        trace = model.trace(images)
    result = run(engine_for(strategy, model, instruction_set), images)
    assert relative_error(result.logits, trace.logits) < 1e-5
    assert torch.equal(result.decisions.executed.t(), trace.masks.bool())


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize(("strategy", "kernel", "stride", "channels", "size"), CONVOLUTIONS)
def test_convolutions_alone(instruction_set, bfloat16, strategy, kernel, stride, channels, size):
    """Stems, 1x1, Winograd with either tile and strided kernels, with padding at every edge: relu(conv2d)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels[1], channels[0], kernel, kernel, generator=generator) / (channels[0] * 3) ** 0.5
    bias, x = torch.randn(channels[1], generator=generator), torch.randn(10, channels[0], *size, generator=generator)
    alone = _C.Convolution(strategy, (weight.numpy(), bias.numpy(), stride), bfloat16, 10, size, instruction_set)
    alone.load(x.permute(0, 2, 3, 1).contiguous().numpy())
    alone.run()
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2).relu()
    error = relative_error(torch.from_numpy(alone.read()).permute(0, 3, 1, 2), expected)
    assert error < (1.5e-2 if bfloat16 and instruction_set in ("avx512bf16", "amx") else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("strategy", "name"), NETWORKS)
def test_results_do_not_depend_on_the_threads(strategy, name, dtype, torch_threads, monkeypatch):
    """One image, few images, more than go through the network together: the same bits as with one thread.

    There are more threads than processors, so that they come late, stop halfway and take over from each other.
    """
    monkeypatch.setattr(_C, "allowed_processors", lambda: 64)
    images = small_images(name, 19).to(dtype)
    engine = engine_for(strategy, small_model(name), dtype=dtype)
    torch_threads(1)
    expected = run(engine, images)
    for threads in (2, 3, 4, 7):
        torch_threads(threads)
        for start, stop in ((0, 1), (1, 3), (0, 19)):
            got = run(engine, images[start:stop].contiguous())
            assert torch.equal(got.logits, expected.logits[start:stop])
            assert torch.equal(got.decisions.gate_logits, expected.decisions.gate_logits[:, start:stop])


@pytest.fixture(params=[("resident", "rnn", "feedforward1"), ("compacted", "bottleneck", "imagenet-reinforced")],
                ids=STRATEGIES)
def engines(request):
    """(engine, images) of two networks that the strategy takes."""
    strategy, *names = request.param
    return [(engine_for(strategy, small_model(name)), small_images(name, 6)) for name in names]


def test_runtimes_called_at_once_get_right_answers(engines, torch_threads):
    """More callers than cores, each asking for two threads: who finds them busy computes alone."""
    torch_threads(2)
    expected = [run(*target).logits for target in engines]

    def wrong(which):
        torch.set_num_threads(2)
        return sum(not torch.equal(run(*engines[which % 2]).logits, expected[which % 2]) for _ in range(30))

    with ThreadPoolExecutor() as callers:
        assert list(callers.map(wrong, range(4))) == [0] * 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_threads_that_share_a_processor_get_right_answers(engines, torch_threads, monkeypatch):
    """Nobody can be kept off the caller's processor; who comes late joins late."""
    monkeypatch.setattr(_C, "allowed_processors", lambda: 64)
    expected = [run(*target).logits for target in engines]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        for threads in (2, 5):
            torch_threads(threads)
            for (engine, images), logits in zip(engines, expected, strict=True):
                assert torch.equal(run(engine, images).logits, logits)
                assert torch.equal(run(engine, images[:1].contiguous()).logits, logits[:1])
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
                    reason="needs two processors and affinity")
def test_a_thread_whose_processor_is_busy_changes_nothing(engines, torch_threads):
    """Another process keeps one of the processors busy."""
    torch_threads(2)
    busy = max(os.sched_getaffinity(0))
    expected = [run(*target).logits for target in engines]
    spinning = f"import os; os.sched_setaffinity(0, {{{busy}}})\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", spinning])
    try:
        for _ in range(20):
            for (engine, images), logits in zip(engines, expected, strict=True):
                assert torch.equal(run(engine, images).logits, logits)
                assert torch.equal(run(engine, images[:1].contiguous()).logits, logits[:1])
    finally:
        other.kill()
        other.wait()


def test_no_more_threads_than_affinity_and_quota_allow(monkeypatch):
    """Whatever PyTorch's number is, the native call is told the least of the three."""
    asked = []

    class Native:
        def __init__(self, **packed):
            pass

        def run(self, *arguments):
            asked.append(arguments[-1])

    monkeypatch.setattr(_C, "Network", Native)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for quota, allowed in ((None, 8), (None, 4), (3, 4), (1, 4)):
        monkeypatch.setattr(sys.modules[CpuEngine.__module__], "cpu_quota", lambda quota=quota: quota)
        monkeypatch.setattr(_C, "allowed_processors", lambda allowed=allowed: allowed)
        run(engine_for("resident", small_model("rnn")), small_images("rnn", 1))
    assert asked == [6, 4, 3, 1]


def test_how_long_threads_spin_is_a_number(monkeypatch):
    set_to = []
    monkeypatch.setattr(_C, "set_spin_microseconds", set_to.append)
    for value in ("0", "20000", ""):
        monkeypatch.setenv("SKIPNET_SPIN_MICROSECONDS", value)
        engine_for("resident", small_model("rnn"))
    assert set_to == [0, 20000, 5000]
    for value in ("-1", "1e3", "forever"):
        monkeypatch.setenv("SKIPNET_SPIN_MICROSECONDS", value)
        with pytest.raises(ValueError, match=f"SKIPNET_SPIN_MICROSECONDS: expected a whole .*, got '{value}'"):
            engine_for("resident", small_model("rnn"))


IDLE = """
import time
import torch
from networks import small_images, small_model
import skipnet_rt as srt

torch.set_num_threads(2)
runtime = srt.compile(small_model("rnn"), engine="cpu")
images = small_images("rnn", 4)
for _ in range(50):
    expected = runtime.infer(images).logits
    time.sleep(0.001)
time.sleep(0.1)  # PyTorch's own threads have gone to sleep by then
begun = time.process_time()
time.sleep(0.3)
print(time.process_time() - begun < 0.1, torch.equal(runtime.infer(images).logits, expected))
"""


@pytest.mark.parametrize("spin", ["0", pytest.param("5000", marks=pytest.mark.slow)])
def test_an_idle_process_keeps_no_processor_busy(spin):
    done = subprocess.run([sys.executable, "-c", IDLE], cwd=Path(__file__).parents[1], check=True, text=True,
                          env=os.environ | {"SKIPNET_SPIN_MICROSECONDS": spin, "OMP_NUM_THREADS": "2",
                                            "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True)
    assert done.stdout == "True True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_may_call(engines, torch_threads):
    torch_threads(2)
    target = engines[0]
    expected = run(*target).logits
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run(*target).logits, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_workspace_keeps_nothing_of_the_last_call(engines):
    """The same call before and after others of other batch sizes, routes and NaN gives the same bits."""
    engine, images = engines[0]
    expected = run(engine, images)
    everything = torch.ones(len(images), engine.network.arch.num_gates, dtype=torch.bool)
    run(engine, torch.full_like(images, float("nan")), everything)
    run(engine, images[:1].contiguous() * 1e30)
    again = run(engine, images)
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.decisions.gate_logits, expected.decisions.gate_logits)
