"""The benchmark: routes, turns, the figure of merit, and that all compute the same network; never a time."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from networks import SMALL, GoldenCase, relative_error, small_images, small_model

import skipnet_rt as srt
from skipnet_rt.cli import app as cli
from skipnet_rt.cli.benchmark import _print_batch
from skipnet_rt.cli.console import out as console
from skipnet_rt.measure import clock
from skipnet_rt.measure.baselines import (
    BASELINES,
    CUDA_GRAPH,
    CUDA_GRAPH_BENCHMARK,
    MASKED,
    PYTORCH,
    PYTORCH_CHANNELS_LAST,
    Baseline,
    DenseNetwork,
    onnx_graph,
)
from skipnet_rt.measure.benchmark import (
    BatchResult,
    BenchmarkError,
    EngineResult,
    benchmark,
    in_turn,
    random_network,
    random_routing,
    scaling,
    supporting_engines,
)
from skipnet_rt.measure.clock import MIN_ROUNDS, Timing, time_interleaved
from skipnet_rt.model.flops import count_operations
from skipnet_rt.model.packing import pack

QUICK = (MASKED, PYTORCH)
ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative norm between two engines' logits; of bfloat16 only a rough one, for it is rounded in different places."""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """What is timed does not matter here: threads that go on spinning may disturb it."""
    monkeypatch.setattr(clock, "_PAUSE", 0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


# Routes --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fraction", "executed"), [(0, 0), (0.25, 13), (0.5, 26), (0.75, 40), (1, 53)])
def test_every_image_executes_exactly_the_fraction(fraction, executed):
    routing = random_routing(srt.arch("cifar10_rnn_gate_110"), 20, fraction)
    assert routing.shape == (20, 53)
    assert routing.dtype == torch.bool
    assert routing.sum(dim=1).tolist() == [executed] * 20


def test_routes_differ_between_images_and_repeat_with_the_seed():
    architecture = srt.arch("cifar10_rnn_gate_110")
    routing = random_routing(architecture, 20, 0.5, seed=3)
    assert len(routing.unique(dim=0)) == 20
    assert torch.equal(routing, random_routing(architecture, 20, 0.5, seed=3))
    assert not torch.equal(routing, random_routing(architecture, 20, 0.5, seed=4))


@pytest.mark.parametrize("name", ["cifar10_rnn_gate_110", "imagenet_rnn_gate_101"])
def test_a_networks_activations_stay_in_the_range_of_float16(name):
    """Also with every block executed, and of every layer: what overflows would be timed computing with NaN."""
    torch.manual_seed(0)
    model, largest = random_network(name), 0.0

    def seen(_, __, output):
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.abs().max().item())

    for module in model.modules():
        module.register_forward_hook(seen)
    images = torch.randn(1, 3, *model.arch.image_size)
    with torch.no_grad():
        x = model.features(images)
        for plan in model.arch.blocks:
            x = torch.relu(model.block(plan).residual(x) + model.block(plan).shortcut(x))
            largest = max(largest, x.max().item())
        model(images)
    assert 1 < x.max().item() <= largest < 100
    fresh = srt.build(name).eval()
    assert sum(value.numel() for value in fresh.parameters()) == sum(value.numel() for value in model.parameters())


def test_a_random_networks_gates_differ_in_what_they_decide():
    torch.manual_seed(0)
    model = random_network("cifar10_rnn_gate_38")
    executed = srt.compile(model, "eager").infer(torch.randn(8, 3, 32, 32)).executed.double().mean().item()
    assert 0.05 < executed < 0.95


def test_arguments_take_turns():
    seen = []
    call = in_turn(lambda *arguments: seen.append(arguments), [(1, 2), (3,), ()])
    for _ in range(4):
        call()
    assert seen == [(1, 2), (3,), (), (1, 2)]


def test_routes_vary_from_call_to_call(monkeypatch):
    """All that there are are timed, though every other call is not; the share is the mean of all."""
    model, routes = small_model("rnn"), []
    infer = srt.SkipNetRuntime.infer
    monkeypatch.setattr(srt.SkipNetRuntime, "infer",
                        lambda self, images, routing: routes.append(routing) or infer(self, images, routing))
    monkeypatch.setattr(clock, "MIN_ROUNDS", 7)
    measured = benchmark(model, engines=["eager"], batches=[2], fractions=[0.5], baselines=None, seconds=0, routes=7)
    expected = random_routing(model.arch, 14, 0.5).split(2)
    assert len(routes) == 1 + 2 * 7
    assert all(torch.equal(route, expected[call % 7]) for call, route in enumerate(routes))
    assert {call % 7 for call in range(2, 15, 2)} == set(range(7))
    counts = count_operations(model.arch)
    assert measured.results[0].engines[0].multiply_adds_share == pytest.approx(
        counts.per_image(torch.cat(expected))[0].double().mean().item() / counts.dense.multiply_adds)


# The figure of merit -------------------------------------------------------------------------------------------------

def test_share_of_the_ceiling_is_formed_within_rounds():
    dense, ours = Timing((8.0, 4.0, 100.0)), Timing((2.0, 2.0, 20.0))  # ratios 4, 2 and 5; of the medians it were 4 too
    assert EngineResult("cpu", 0.5, 0.25, ours).share_of_ceiling(dense) == 1
    assert EngineResult("cpu", 0.5, 0.51, Timing((4.0, 4.0, 10.0))).share_of_ceiling(dense) == pytest.approx(0.51 * 2)
    assert EngineResult("cpu", 1 / 3, 0.5, ours).name == "cpu, 33.3% executed"


def test_the_fast_quartile_forgets_who_else_was_there():
    """In most rounds something else ran, during either's call; in two of eight it did not."""
    dense, ours = Timing((2.0, 9.0, 2.0, 9.0, 2.0, 9.0, 9.0, 9.0)), Timing((9.0, 1.0, 9.0, 9.0, 9.0, 1.0, 1.0, 9.0))
    assert ours.fast_quartile == 1
    assert EngineResult("cpu", 0.5, 0.5, ours).fast_share_of_ceiling(dense) == 1


def test_scaling_is_shown_against_all_threads():
    def results(seconds):
        return (EngineResult("cpu", 0.5, 0.5, Timing((seconds,) * 3)),)

    result = BatchResult(1, results(1.0), {"dense": Timing((2.0,) * 3)}, fewer_threads={1: results(1.75)})
    assert scaling(result) == ["cpu, 50% executed, 1 thread: 1.75 times as long (1.75 by the fast quartiles)"]
    (fewer,) = result.to_dict()["fewer_threads"]
    assert (fewer["threads"], fewer["engine"], fewer["fraction"], fewer["scaling"]) == (1, "cpu", 0.5, 1.75)
    assert result.of("cpu", 0.5).timing.median == 1


def test_the_best_dense_engine_is_the_ceiling_and_never_the_masked_one():
    result = BatchResult(8, (EngineResult("cpu", 0.5, 0.5, Timing((1.0, 1.0, 1.0))),), {
        MASKED.name: Timing((0.5, 0.5, 0.5)), "slow": Timing((3.0, 3.0, 3.0)), "fast": Timing((2.0, 2.0, 9.0))})
    assert result.best == "fast"
    assert result.rounds == 3
    assert not result.steady
    document = result.to_dict()
    assert document["best_dense"] == "fast"
    assert document["baselines"]["fast"]["median"] == 2000
    (ours,) = document["engines"]
    assert ours["share_of_ceiling"] == 100
    assert ours["fast_share_of_ceiling"] == 100
    assert ours["multiply_adds_share"] == 50
    assert ours["speedup_over"] == {MASKED.name: 0.5, "slow": 3, "fast": 2}


# Baselines compute what they are measured for ------------------------------------------------------------------------

def dense_logits(model: srt.SkipNet, images: torch.Tensor) -> torch.Tensor:
    everything = torch.ones(model.arch.num_gates, dtype=torch.bool)
    return srt.compile(model, engine="eager").infer(images, routing=everything).logits


@pytest.mark.parametrize(("baseline", "dtype"), [
    pytest.param(baseline, dtype, id=f"{baseline.name}, {str(dtype)[6:]}",
                 marks=[pytest.mark.slow] if baseline.name == "torch.compile" else [])
    for baseline in BASELINES if baseline is not MASKED for dtype in baseline.dtypes])
def test_a_baseline_runs_the_dense_network(baseline, dtype):
    if reason := baseline.unsupported_reason(dtype):
        pytest.skip(reason)
    model, images = small_model("rnn"), small_images("rnn", 3)
    call = baseline.build(model, images, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = [call(part) for part in (images, images.flip(0))]
    expected = dense_logits(model, images)
    assert relative_error(logits[0], expected) < ERROR[dtype]
    assert relative_error(logits[1], expected.flip(0)) < ERROR[dtype]


@pytest.mark.parametrize(("baseline", "chosen"), [(CUDA_GRAPH, False), (CUDA_GRAPH_BENCHMARK, True)])
@pytest.mark.parametrize("before", [False, True])
def test_a_graph_is_captured_with_algorithms_of_its_own(monkeypatch, baseline, chosen, before):
    """PyTorch keeps cuDNN's answers by thread: so it is another one, and there for as long as what it has loaded."""
    seen = []

    class Graph:
        def replay(self):
            seen.append("replay")

    compute = DenseNetwork.forward
    monkeypatch.setattr(DenseNetwork, "forward", lambda self, images: seen.append(
        (threading.current_thread(), torch.backends.cudnn.benchmark)) or compute(self, images))
    for name, value in {"CUDAGraph": Graph, "graph": lambda graph: nullcontext(), "set_device": lambda device: None,
                        "synchronize": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    images = small_images("rnn", 2)
    call = baseline.build(small_model("rnn"), images, torch.float32)
    assert torch.backends.cudnn.benchmark == before
    assert {switch for _, switch in seen} == {chosen}
    (thread,) = {thread for thread, _ in seen}
    assert thread is not threading.current_thread()
    assert relative_error(call(images), dense_logits(small_model("rnn"), images)) < ERROR[torch.float32]
    assert seen[4:] == ["replay"]  # three calls to choose, one to capture
    assert thread.is_alive()
    del call
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("case", ["rnn", "bottleneck", "imagenet-reinforced", "feedforward2"])
def test_the_onnx_graph_is_the_dense_network(case):
    """Both stems, both kinds of blocks, images that are not square."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, images = small_model(case), small_images(case, 2)
    network = pack(model, torch.device("cpu"), torch.float32)
    session = runtime.InferenceSession(onnx_graph(network, 2), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert relative_error(torch.from_numpy(logits), dense_logits(model, images)) < ERROR[torch.float32]
    plain = DenseNetwork(model, torch.device("cpu"), torch.float32, torch.contiguous_format)
    assert relative_error(plain(images), dense_logits(model, images)) < ERROR[torch.float32]


@pytest.mark.parametrize("case", ["rnn", "rnn-reinforced", "feedforward1", "bottleneck", "imagenet-reinforced"])
@pytest.mark.parametrize("count", [1, 9])
def test_the_masked_baseline_takes_its_own_decisions(case, count):
    model, images = small_model(case), small_images(case, count)
    logits = MASKED.build(model, images, torch.float32)(images)
    own = srt.compile(model, engine="eager").infer(images)
    assert not own.executed.all()  # or it would be the dense network
    assert relative_error(logits, own.logits) < ERROR[torch.float32]


def test_the_masked_baseline_agrees_with_the_published_code():
    case = GoldenCase("cifar10_rnn_gate_38-s15")
    logits = MASKED.build(case.model, case.images, torch.float32)(case.images.float())
    assert relative_error(logits, case.logits) < ERROR[torch.float32]


def test_what_is_not_installed_or_not_meant_says_so():
    nowhere = Baseline("nowhere", ("torch", "not_a_package"), (torch.float32,), lambda model, images, dtype: None)
    assert nowhere.unsupported_reason(torch.float32) == "not installed: not_a_package"
    assert MASKED.unsupported_reason(torch.float32) is None
    assert MASKED.unsupported_reason(torch.bfloat16) == "not measured in torch.bfloat16"


# Timing --------------------------------------------------------------------------------------------------------------

def test_calls_take_turns():
    calls: list[str] = []
    names, shares = ["a", "b", "c", "d"], []
    timings = time_interleaved({name: lambda name=name: calls.append(name) for name in names}, seconds=1e-9, per=4,
                               on_progress=shares.append)
    assert calls[:4] == names  # to warm up
    assert calls[4::2] == calls[5::2], "an untimed call right before every timed one"
    rounds = [calls[start:start + 8:2] for start in range(4, len(calls), 8)]
    assert len(rounds) == MIN_ROUNDS
    assert all(sorted(order) == names for order in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert all(len(timing.seconds) == MIN_ROUNDS for timing in timings.values())
    assert len(shares) == MIN_ROUNDS


def test_ratios_are_formed_within_a_round():
    """The machine slows down tenfold in the second round: the ratio of the medians would say 20, the paired one 2."""
    fast, slow = Timing((1.0, 10.0, 1.0)), Timing((2.0, 20.0, 20.0))
    assert fast.speedup_over(slow) == 2
    assert slow.median / fast.median == 20
    assert fast.to_dict() == {"median": 1e3, "fast_quartile": 1e3, "p20": pytest.approx(1e3),
                              "p80": pytest.approx(6.4e3)}


def test_a_busy_machine_is_noticed():
    calm, busy = Timing((1.0, 1.1, 1.2, 1.0)), Timing((1.0, 1.1, 3.0, 3.0))
    for half, dense, pytorch in ((calm, calm, calm), (busy, calm, calm), (calm, busy, calm), (calm, calm, busy)):
        result = BatchResult(1, (EngineResult("eager", 0.5, 0.5, half), EngineResult("eager", 1.0, 1.0, dense)),
                             {PYTORCH.name: pytorch})
        assert result.steady == (busy not in (half, dense, pytorch))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", SMALL)
def test_dense_execution_is_the_network_with_every_block_run(name, memory_format):
    model, images = small_model(name), small_images(name, 3)
    everything = torch.ones(model.arch.num_gates, dtype=torch.bool)
    expected = srt.compile(model, "eager").infer(images, routing=everything).logits
    given = images.clone()
    logits = DenseNetwork(model, torch.device("cpu"), torch.float32, memory_format)(given)
    assert relative_error(logits, expected) < 1e-5
    assert torch.equal(given, images)


# The whole of it -----------------------------------------------------------------------------------------------------

def test_everything_asked_for_is_measured():
    model, progress = small_model("rnn"), []
    measured = benchmark(model, engines=["cpu", "eager"], batches=[1, 3], fractions=[0.5, 1], baselines=QUICK,
                         seconds=0.01, on_progress=lambda what, share: progress.append((what, share)))
    assert [result.batch for result in measured.results] == [1, 3]
    assert measured.left_out == {}
    counts = count_operations(model.arch)
    for result in measured.results:
        assert list(result.baselines) == [MASKED.name, "PyTorch"]
        assert result.best == "PyTorch"
        assert {(each.engine, each.fraction) for each in result.engines} == {
            (engine, fraction) for engine in ("cpu", "eager") for fraction in (0.5, 1)}
        assert result.rounds >= MIN_ROUNDS
        for each in result.engines:
            executed = random_routing(model.arch, result.batch, each.fraction)
            assert each.multiply_adds_share == pytest.approx(
                counts.per_image(executed)[0].double().mean().item() / counts.dense.multiply_adds)
            assert len(each.timing.seconds) == result.rounds
    assert progress[0] == ("batch 1: building masked baseline", 0)
    assert progress[-1] == ("batch 3: timing 6 in turns", 1)
    assert json.loads(json.dumps(measured.to_dict()))["results"][1]["batch"] == 3


def test_an_engine_named_twice_is_timed_once():
    measured = benchmark(small_model("rnn"), engines=["auto", "cpu"], batches=[1], baselines=QUICK, seconds=0)
    assert [(each.engine, each.fraction) for each in measured.results[0].engines] == [("cpu", 0.5), ("cpu", 1.0)]


def test_given_images_are_timed_batch_by_batch_on_the_gates_own_routes():
    """Every engine that takes the network beside both kinds of plain PyTorch, as the demonstration does."""
    model, images = small_model("rnn"), small_images("rnn", 6)
    names = supporting_engines(model.arch, torch.device("cpu"), torch.float32)
    assert {"cpu", "eager"} <= set(names)
    measured = benchmark(model, engines=names, batches=[2, 3], fractions=[None, 1.0], images=images,
                         baselines=[PYTORCH, PYTORCH_CHANNELS_LAST], seconds=0)
    result = srt.compile(model, "eager").infer(images)
    dense = count_operations(model.arch).dense.multiply_adds
    for timed in measured.results:
        assert timed.engine_names == names
        assert timed.of("eager", None).multiply_adds_share == pytest.approx(
            result.multiply_adds.double().mean().item() / dense)
        assert timed.of("eager", 1.0).multiply_adds_share > 1  # the gates' own come on top
        assert set(timed.baselines) == {"PyTorch", "PyTorch channels-last"}
    assert measured.milliseconds["cpu"][3] == {1.0: 1e3 * measured.results[1].of("cpu", 1.0).timing.median}
    with pytest.raises(ValueError, match="whole batches of 4, got 6"):
        benchmark(model, batches=[4], images=images, baselines=QUICK)


def test_a_baseline_that_cannot_be_measured_is_left_out_with_its_reason():
    measured = benchmark(small_model("rnn"), batches=[1], baselines=QUICK, dtype=torch.bfloat16, seconds=0.01)
    assert measured.left_out == {MASKED.name: "not measured in torch.bfloat16"}
    assert measured.results[0].masked is None


@pytest.mark.parametrize(("case", "options", "why"), [
    ("dense", {}, "has nothing to skip"),
    ("rnn", {"baselines": [MASKED]}, "no dense engine to measure against"),
    ("rnn", {"dtype": torch.float64}, "PyTorch: not measured in torch.float64"),
])
def test_what_cannot_be_measured_is_refused(case, options, why):
    with pytest.raises(BenchmarkError, match=why):
        benchmark(small_model(case), **{"baselines": QUICK, **options})


# benchmarks/gpu.py ---------------------------------------------------------------------------------------------------

GPU_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails_with_one_line(tmp_path):
    done = subprocess.run([sys.executable, GPU_SCRIPT, "compare", "--output", tmp_path], capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"device 'cuda' cannot be used here: .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, with the CPU as its device."""
    spec = importlib.util.spec_from_file_location("gpu_script", GPU_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "timed", lambda calls, seconds, per=1: time_interleaved(calls, seconds=0, per=per))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which a ceiling sets, as it does the switch
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return module


def arguments_for(tmp_path, part, **options):
    return argparse.Namespace(**{
        "part": part, "arch": SMALL["rnn"], "dtype": "float32", "batch": 2, "seconds": 0.0, "without": [],
        "output": tmp_path, "cudnn_benchmark": False, **options})


def quick(monkeypatch, gpu, compiled):
    """Baselines that run here, and something in place of torch.compile."""
    monkeypatch.setattr(gpu, "CUDA_GRAPH", Baseline("graph", (), (torch.float32,), PYTORCH.build))
    monkeypatch.setattr(gpu, "CUDA_GRAPH_BENCHMARK", Baseline("graph, cudnn.benchmark", (), (torch.float32,),
                                                              PYTORCH.build))
    monkeypatch.setattr(gpu, "TORCH_COMPILE", Baseline("torch.compile", (), (torch.float32,), compiled))


@pytest.mark.parametrize(("chosen", "names"), [
    (False, ["graph", "PyTorch channels-last", "PyTorch", "torch.compile"]),
    (True, ["graph, cudnn.benchmark", "PyTorch channels-last, cudnn.benchmark", "PyTorch, cudnn.benchmark",
            "torch.compile, cudnn.benchmark"])])
def test_a_ceiling_has_every_dense_engine(gpu, monkeypatch, tmp_path, chosen, names):
    switched = []

    def compiled(*arguments):
        switched.append(torch.backends.cudnn.benchmark)
        return PYTORCH.build(*arguments)

    quick(monkeypatch, gpu, compiled)
    measured = gpu.ceiling(arguments_for(tmp_path, "ceiling", cudnn_benchmark=chosen))
    assert list(measured["baselines"]) == names
    assert measured["left_out"] == {}
    assert switched == [chosen]


@pytest.mark.parametrize(("error", "why"), [(KeyboardInterrupt(), "not finished"),
                                            (RuntimeError("too deep\nto say"), "RuntimeError: too deep")])
def test_a_ceiling_that_is_interrupted_keeps_what_it_has_and_says_what_it_lacks(gpu, monkeypatch, tmp_path, error, why):
    """torch.compile takes minutes, and may fail: neither costs the other engines, nor goes unnoticed."""
    def compiled(model, images, dtype):
        raise error

    quick(monkeypatch, gpu, compiled)
    arguments = arguments_for(tmp_path, "ceiling")
    monkeypatch.setattr(gpu, "usable_device", torch.device)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: arguments)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        gpu.main()
    assert stopped.type is KeyboardInterrupt or stopped.value.code == f"not measured: torch.compile ({why})"
    times, lacking = gpu.kept_ceiling(arguments_for(tmp_path, "compare"))
    assert list(times) == ["graph", "PyTorch channels-last", "PyTorch"]
    assert lacking == {"torch.compile": why,
                       "everything with cudnn.benchmark": "the part 'ceiling' has not run"}


def test_a_comparison_goes_by_the_ceiling_that_was_kept(gpu, monkeypatch, tmp_path, capsys):
    arguments = arguments_for(tmp_path, "compare", without=[
        baseline.name for baseline in BASELINES if baseline not in QUICK])
    kept = {"baselines": {"torch.compile": {"median": 1e-6, "p20": 1e-6, "p80": 1e-6}}, "left_out": {}}
    gpu.path_of(arguments, "ceiling").write_text(json.dumps(kept | {"part": "ceiling"}))
    measured = gpu.compare(arguments)
    assert measured["ceiling"] == {"name": "torch.compile", "milliseconds": 1e-6, "lacking": {
        "everything with cudnn.benchmark": "the part 'ceiling' has not run"}}
    for each in measured["results"][0]["engines"]:
        assert each["share_of_kept_ceiling"] == pytest.approx(
            each["multiply_adds_share"] * 1e-6 / each["time"]["median"])
    gpu.write(arguments, measured)
    gpu.table(tmp_path)
    shown = capsys.readouterr().out
    assert "ceiling: torch.compile, 0.0 us" in shown
    assert "NOT MEASURED: everything with cudnn.benchmark" in shown
    assert "   0% of the ceiling" in shown
    gpu.path_of(arguments, "ceiling").unlink()
    measured = gpu.compare(arguments)
    assert measured["ceiling"]["name"] == "PyTorch"  # never the masked one
    assert len(measured["ceiling"]["lacking"]) == 2


def test_free_routing_stands_beside_the_same_decisions_forced(gpu, monkeypatch, tmp_path):
    routed = []
    infer = srt.SkipNetRuntime.infer

    def noted(self, images, routing=None):
        result = infer(self, images, routing)
        routed.append((self.engine.name, routing is None, images, result.executed))
        return result

    monkeypatch.setattr(srt.SkipNetRuntime, "infer", noted)
    measured = gpu.routing(arguments_for(tmp_path, "routing"))
    assert {"cpu", "eager"} <= set(measured["engines"])
    assert all(each["executed"] > 0 and "microseconds_that_forcing_adds" in each
               for each in measured["engines"].values())
    for engine in measured["engines"]:
        free, forced = ([(images, executed) for name, decides, images, executed in routed[7:]
                         if (name, decides) == (engine, kind)][-4:] for kind in (True, False))
        assert len({id(images) for images, _ in free}) == 4  # another batch with every call
        for (images, executed), (again, told) in zip(free, forced, strict=True):
            assert images is again
            assert torch.equal(executed, told)


@pytest.fixture
def script(tmp_path):
    """Runs gpu.sh with a Python that notes what it is asked for, and fails where this says so."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text("""#!/bin/bash
[ "$1" != benchmarks/gpu.py ] || echo "$*" >>"$NOTES"
[ "$2" != table ] || ls "$3.tar.gz"
case "$*" in $FAILS) echo "no such luck"; exit 3 ;; esac
""")
    python.chmod(0o755)

    def run(*parts, fails="nothing at all"):
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "NOTES": str(tmp_path / "notes"), "FAILS": fails}
        done = subprocess.run(["bash", GPU_SCRIPT.with_suffix(".sh"), tmp_path / "out", *parts], capture_output=True,
                              text=True, check=False, env=environment)
        return done, [line.split()[1:] for line in (tmp_path / "notes").read_text().splitlines()]
    return run


def test_the_script_leaves_one_archive(script, tmp_path):
    """Already when the first part is over, and whatever fails."""
    done, _ = script("nothing")
    assert done.returncode == 1
    assert "nothing: FAILED" in done.stdout
    assert (tmp_path / "out" / "table.txt").read_text() == f"{tmp_path}/out.tar.gz\n"
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert set(archive.getnames()) == {"out", *(f"out/{name}" for name in (
            "nothing.log", "machine.log", "table.txt"))}


@pytest.mark.parametrize("fails", ["", "*--cudnn-benchmark*", "*ceiling*--seconds?3"])
def test_ceilings_are_two_processes_and_comparisons_leave_out_what_compiles_for_minutes(script, fails):
    done, calls = script("ceiling-8", "compare-8", fails=fails)
    asked = [call[call.index("--output") + 2:] for call in calls if call[0] != "table"]
    assert asked == [["ceiling", "--batch", "8", "--seconds", "3", "--cudnn-benchmark"],
                     ["ceiling", "--batch", "8", "--seconds", "3"],
                     ["compare", "--batch", "8", "--seconds", "3", "--without", "torch.compile"]]
    assert done.returncode == bool(fails)
    assert ("ceiling-8: FAILED" in done.stdout) == ("no such luck" in done.stdout) == bool(fails)
    assert "compare-8: done" in done.stdout


def test_the_table_prints_whatever_there_is(tmp_path):
    measured = benchmark(small_model("rnn"), batches=[2], baselines=QUICK, seconds=0).to_dict()
    rows = [{"name": "test_convolution[1-(8, 3)-gathered]", "params": {"who": "gathered", "batch": 1, "shape": [8, 3]},
             "extra_info": {"us a launch": 2.5}},
            {"name": "test_compaction[1]", "params": {"batch": 1}, "extra_info": {}}]
    for name, text in (("compare", json.dumps(measured)), ("cut", "{"), ("triton", json.dumps({"benchmarks": rows}))):
        (tmp_path / f"{name}.json").write_text(text)
    done = subprocess.run([sys.executable, GPU_SCRIPT, "table", tmp_path], capture_output=True, text=True, check=True)
    for expected in ("PyTorch ", "cpu,  50% executed ", "% of the ceiling", "cannot be read", "convolution [8, 3]",
                     "1: 2.5"):
        assert expected in done.stdout
    assert "compaction" not in done.stdout


# The command ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(capsys, tmp_path):
    """Runs ``skipnet-rt benchmark`` on a small network, for a moment, without the baselines that take long to build."""
    path = tmp_path / "small.safetensors"
    srt.save(small_model("rnn"), path)

    def command(*arguments: str) -> tuple[int, str, str]:
        slow = [word for baseline in BASELINES if baseline not in QUICK for word in ("--without", baseline.name)]
        with pytest.raises(SystemExit) as stopped:
            cli.main(["benchmark", "--model", str(path), "--seconds", "0", *slow, *arguments])
        return stopped.value.code or 0, *capsys.readouterr()
    return command


def test_command_prints_one_document(run):
    status, out, err = run("--json", "--batch", "1", "--batch", "2", "--fraction", "0.5", "--threads", "1")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["model"].endswith("small.safetensors")
    assert document["cpu"]["threads"] == 1
    assert document["versions"]["torch"] == torch.__version__
    assert [result["batch"] for result in document["results"]] == [1, 2]
    assert [(each["engine"], each["fraction"]) for each in document["results"][0]["engines"]] == [("cpu", 0.5)]


def test_command_shows_how_our_engines_scale(run):
    arguments = ("--batch", "1", "--fraction", "1", "--threads", "2", "--threads", "1")
    before = torch.get_num_threads()
    try:
        (result,) = json.loads(run("--json", *arguments)[1])["results"]
        assert torch.get_num_threads() == 2
        out = run(*arguments)[1]
    finally:
        torch.set_num_threads(before)
    assert [(each["threads"], each["engine"], each["fraction"]) for each in result["fewer_threads"]] == [(1, "cpu", 1)]
    assert len(result["engines"]) == 1
    assert "cpu, 100% executed, 1 thread: " in out
    assert "2 threads" in out


def test_command_prints_a_table_per_batch_size(run):
    status, out, err = run("--batch", "1", "--batch", "2", "--engine", "eager")
    assert (status, err) == (0, "")
    for expected in ("batch of 1", "batch of 2", "masked baseline", "eager, 50% executed", "eager, 100% executed",
                     "p25", "x best dense", "x masked", "share of the ceiling", "by p25",
                     "Best dense engine: PyTorch."):
        assert expected in out
    assert max(map(len, out.splitlines())) <= 120
    assert "Without masked baseline: not measured in torch.bfloat16" in run("--dtype", "bfloat16", "--batch", "1")[1]


def test_all_names_fit_in_their_table(monkeypatch):
    """With every baseline, whether or not it is installed here."""
    timing = Timing((123.456,) * 3)
    result = BatchResult(64, (EngineResult("compacted", 1 / 3, 0.5, timing),),
                         {baseline.name: timing for baseline in BASELINES})
    measured = benchmark(small_model("rnn"), batches=[1], baselines=QUICK, seconds=0)
    with console.capture() as shown:
        _print_batch(measured, result)
    for baseline in BASELINES:
        assert f" {baseline.name} " in shown.get()


def test_command_writes_document_and_plot(run, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, _ = run("--batch", "1", "--output", str(tmp_path / "new"), "--json")
    assert status == 0
    path = tmp_path / "new" / "cpu-small-float32.json"
    assert json.loads(path.read_text()) == json.loads(out)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {path}" in run("--batch", "1", "--output", str(tmp_path / "new"))[1]


@pytest.mark.parametrize(("arguments", "why"), [
    (["--without", "TensorFlow"], "no baseline is called 'TensorFlow'; known: masked baseline, PyTorch, "),
    (["--without", "PyTorch"], "no dense engine to measure against"),
    (["--engine", "tpu"], "no engine is called 'tpu'"),
    (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    (["--model", "nowhere.pth"], "nowhere.pth"),
    (["--dtype", "float64"], "not measured in torch.float64"),
])
def test_a_mistake_gets_one_line(run, arguments, why):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert why in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_plot_needs_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert run("--output", str(tmp_path / "new"))[2] == (
        "error: --output needs matplotlib; install it with: pip install 'skipnet-rt[plots]'\n")
    assert not (tmp_path / "new").exists()
