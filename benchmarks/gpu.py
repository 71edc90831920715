"""Our engines beside dense ones on a GPU, without the command line's packages: what ``gpu.sh`` runs.

    python benchmarks/gpu.py ceiling --batch 128 --output DIR
    python benchmarks/gpu.py ceiling --batch 128 --output DIR --cudnn-benchmark
    python benchmarks/gpu.py compare --batch 128 --output DIR
    python benchmarks/gpu.py routing --batch 1 --output DIR
    python benchmarks/gpu.py slope --batch 1 --output DIR
    python benchmarks/gpu.py crossover --output DIR
    python benchmarks/gpu.py waves --batch 1024 --output DIR
    python benchmarks/gpu.py gates --output DIR
    python benchmarks/gpu.py kernels --output DIR
    python benchmarks/gpu.py table DIR

``ceiling`` comes first: ``compare`` goes by what it has left in DIR, and says what is lacking there. Times are the
device's own; ``wall`` in the JSON is the host's. Weights are random, activations finite; routes vary from call to call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import skipnet_rt as srt
from skipnet_rt.engines import autoselect
from skipnet_rt.engines.cuda import CudaEngine
from skipnet_rt.engines.cuda_resident import ResidentStrategy
from skipnet_rt.engines.registry import REGISTRY, EngineError
from skipnet_rt.measure.baselines import (
    BASELINES,
    CUDA_GRAPH,
    CUDA_GRAPH_BENCHMARK,
    MASKED,
    PYTORCH,
    PYTORCH_CHANNELS_LAST,
    TORCH_COMPILE,
)
from skipnet_rt.measure.benchmark import (
    GPU_ROUTES,
    BenchmarkError,
    benchmark,
    in_turn,
    measure_crossover,
    random_network,
    random_routing,
    supporting_engines,
)
from skipnet_rt.measure.clock import Timing, time_interleaved
from skipnet_rt.model.packing import PackedEmbedding, PackedNetwork, pack
from skipnet_rt.runtime import usable_device
from skipnet_rt.util import machine

ARCH = "cifar10_rnn_gate_110"
DEVICE = "cuda"


def timed(calls: Mapping[str, Callable[[], object]], seconds: float, *, per: int = 1) -> dict[str, Timing]:
    """See :func:`time_interleaved`; by the device's own clock."""
    return time_interleaved(calls, seconds=seconds, device=torch.device(DEVICE), device_time=True, per=per)


def ceiling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dense engines alone, each timed when it is built and then written down: what takes too long costs no other.

    A process has ``cudnn.benchmark`` on or off: PyTorch asks cuDNN once for a shape and keeps the answer.
    """
    torch.backends.cudnn.benchmark = chosen = arguments.cudnn_benchmark
    # Inductor keeps what it has timed, too, by shape. This also lets an interrupted part go on where it was.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
        Path(tempfile.gettempdir()) / f"inductor-{os.getuid()}-{'benchmark' if chosen else 'plain'}")
    model, dtype = random_network(arguments.arch), getattr(torch, arguments.dtype)
    images = torch.randn(arguments.batch, model.arch.in_channels, *model.arch.image_size, device=DEVICE, dtype=dtype)
    graph = CUDA_GRAPH_BENCHMARK if chosen else CUDA_GRAPH
    wanted = {graph.name: graph}
    for each in (PYTORCH_CHANNELS_LAST, PYTORCH, TORCH_COMPILE):  # the last takes minutes to build
        wanted[f"{each.name}, cudnn.benchmark" if chosen else each.name] = each
    measured: dict[str, Any] = {"architecture": str(model.arch), "dtype": arguments.dtype, "batch": arguments.batch,
                                "baselines": {}, "left_out": dict.fromkeys(wanted, "not finished")}
    for name, baseline in wanted.items():
        if arguments.output:
            write(arguments, measured)
        if reason := baseline.unsupported_reason(dtype, images.device.type):
            measured["left_out"][name] = reason
        else:
            print(f"building and timing {name}", flush=True)
            try:
                call = baseline.build(model, images, dtype)
                measured["baselines"][name] = timed({name: partial(call, images)}, arguments.seconds)[name].to_dict()
                del measured["left_out"][name]
            except Exception as error:  # whatever one of them does, the others are measured
                measured["left_out"][name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return measured


def kept_ceiling(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """Medians in milliseconds that :func:`ceiling` has left for this network and batch, and what it lacks, and why."""
    times: dict[str, float] = {}
    lacking: dict[str, str] = {}
    for chosen in (False, True):
        path = path_of(arguments, "ceiling", chosen)
        try:
            document = json.loads(path.read_text()) if path else {}
        except (OSError, ValueError):
            document = {}
        times |= {name: time["median"] for name, time in document.get("baselines", {}).items()}
        lacking |= document.get("left_out", {"everything with cudnn.benchmark" if chosen else
                                             "everything without cudnn.benchmark": "the part 'ceiling' has not run"})
    return times, lacking


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Engines and baselines at one batch size, half of the gated blocks executed and all of them.

    ``ceiling`` is the fastest dense engine of this part and of those kept; an engine's ``share_of_kept_ceiling`` is by
    medians, since these were not timed in turns.
    """
    model = random_network(arguments.arch)
    device, dtype = torch.device(DEVICE), getattr(torch, arguments.dtype)
    document = benchmark(model, engines=supporting_engines(model.arch, device, dtype, asynchronous=True),
                         batches=[arguments.batch], fractions=(0.5, 1.0), dtype=dtype,
                         baselines=[baseline for baseline in BASELINES if baseline.name not in arguments.without],
                         seconds=arguments.seconds, device=device,
                         on_progress=lambda what, share: print(f"{share:6.1%} {what}", flush=True)).to_dict()
    times, lacking = kept_ceiling(arguments)
    (result,) = document["results"]
    for name, time in result["baselines"].items():
        if name != MASKED.name:
            times[name] = min(time["median"], times.get(name, time["median"]))
    best = min(times, key=times.__getitem__)
    for each in result["engines"]:
        each["share_of_kept_ceiling"] = each["multiply_adds_share"] * times[best] / each["time"]["median"]
    return document | {"ceiling": {"name": best, "milliseconds": times[best], "lacking": lacking}}


def routing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Gates that decide, beside the very same decisions forced: what it costs to be told them."""
    model = random_network(arguments.arch)
    device, dtype = torch.device(DEVICE), getattr(torch, arguments.dtype)
    shape = (arguments.batch, model.arch.in_channels, *model.arch.image_size)
    batches = [(torch.randn(shape, device=device, dtype=dtype),) for _ in range(GPU_ROUTES)]
    calls: dict[str, Callable[[], object]] = {}
    executed: dict[str, float] = {}
    for name in supporting_engines(model.arch, device, dtype, asynchronous=True):
        runtime = srt.compile(model, engine=name, device=device, dtype=dtype)
        routes = [runtime.infer(images).executed for images, in batches]
        executed[name] = torch.cat(routes).double().mean().item()
        calls[f"{name}, free"] = in_turn(runtime.infer, batches)
        calls[f"{name}, forced"] = in_turn(
            runtime.infer, [(images, route) for (images,), route in zip(batches, routes, strict=True)])
    timings = timed(calls, arguments.seconds)
    pairs = {name: (timings[f"{name}, free"], timings[f"{name}, forced"]) for name in executed}
    return {"architecture": str(model.arch), "dtype": arguments.dtype, "batch": arguments.batch, "engines": {
        name: {"executed": executed[name], "free": free.to_dict(), "forced": forced.to_dict(),
               "microseconds_that_forcing_adds": 1e6 * median(
                   one - other for one, other in zip(forced.seconds, free.seconds, strict=True))}
        for name, (free, forced) in pairs.items()}}


def slope(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each engine's time against the executed fraction: how straight it is, and how steep beside the ideal."""
    model = random_network(arguments.arch)
    measured = measure_crossover(model, torch.device(DEVICE), getattr(torch, arguments.dtype),
                                 batches=[arguments.batch], seconds=arguments.seconds, device_clock=True)
    engines = {}
    for name, batches in measured.milliseconds.items():
        times = batches[arguments.batch]
        line = {fraction: times[0.0] + fraction * (times[1.0] - times[0.0]) for fraction in times}
        engines[name] = {
            "milliseconds": times,
            "most_off_the_line": max(abs(times[fraction] / line[fraction] - 1) for fraction in times),
            "share_that_skipping_saves": 1 - times[0.0] / times[1.0],
        }
    return {"architecture": str(model.arch), "dtype": arguments.dtype, "batch": arguments.batch, "engines": engines}


def crossover(arguments: argparse.Namespace) -> dict[str, Any]:
    """Which engine wins, by batch size and executed share; saved, so that ``"auto"`` goes by it here."""
    model = random_network(arguments.arch)
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, arguments.dtype)
    measured = measure_crossover(model, device, dtype, seconds=arguments.seconds)
    autoselect.save(measured.milliseconds, model.arch, device, dtype)
    return {"architecture": str(model.arch), "dtype": arguments.dtype, "milliseconds": measured.milliseconds,
            "winners": {result.batch: result.winners for result in measured.results},
            "order": autoselect.fastest_first(measured.milliseconds)}


def plans(network: PackedNetwork) -> dict[str, ResidentStrategy]:
    """The resident strategy by the images that a thread block takes at a time, clusters taking one included."""
    strategies = {"as planned": ResidentStrategy(network)}
    for count in (1, 2, 3):
        if strategies["as planned"].fits(count):
            strategies[str(count)] = ResidentStrategy(network, images=count)
    for cluster in (2, 4):
        if torch.cuda.get_device_capability(network.device)[0] in (9, 10):
            strategies[f"1/{cluster}"] = ResidentStrategy(network, cluster=cluster)
    return strategies


def waves(arguments: argparse.Namespace) -> dict[str, Any]:
    """The resident engine's time in all of its plans."""
    model = random_network(arguments.arch)
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, arguments.dtype)
    if reason := (REGISTRY["cuda"].unsupported_reason(model.arch, device, dtype)
                  or ResidentStrategy.unsupported_reason(model.arch, device, dtype)):
        raise EngineError(reason)
    network = pack(model, device, dtype)
    images = torch.randn(arguments.batch, 3, *model.arch.image_size, device=device, dtype=dtype)
    routes = random_routing(model.arch, GPU_ROUTES * arguments.batch, 0.5).to(device)
    turns = [(images, route.t(), model.arch.num_gates) for route in torch.split(routes, arguments.batch)]
    timings = timed({name: in_turn(strategy.run, turns) for name, strategy in plans(network).items()},
                    arguments.seconds)
    return {"architecture": str(model.arch), "dtype": arguments.dtype, "batch": arguments.batch,
            "images_per_thread_block": {name: timing.to_dict() for name, timing in timings.items()}}


def gates(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a gate costs in the resident engine: the network with nothing executed, beside one with fewer blocks."""
    device, dtype = torch.device("cuda"), getattr(torch, arguments.dtype)
    times: dict[str, dict[str, Timing]] = {}
    for batch in (1, 128):
        calls = {}
        for name in ("cifar10_rnn_gate_38", "cifar10_rnn_gate_152"):
            runtime = srt.compile(random_network(name), engine="cuda", device=device, dtype=dtype)
            images = torch.randn(batch, 3, 32, 32, device=device, dtype=dtype)
            nothing = torch.zeros(batch, runtime.arch.num_gates, dtype=torch.bool, device=device)
            calls[name] = lambda runtime=runtime, images=images, nothing=nothing: runtime.infer(images, nothing)
        times[str(batch)] = timed(calls, arguments.seconds)
    return {"dtype": arguments.dtype, "microseconds_per_skipped_block": {
        batch: 1e6 * (timed["cifar10_rnn_gate_152"].median - timed["cifar10_rnn_gate_38"].median) / (74 - 17)
        for batch, timed in times.items()}}


def _graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Some work, captured, so that launching it costs next to nothing."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """Gate steps (with compaction) and convolutions over a row list, each many times in a graph of its own."""
    from skipnet_rt.kernels import compact_ref, gate_step_ref
    from skipnet_rt.kernels.cuda import RNNGate, compact, gathered_conv

    torch.backends.cudnn.benchmark = True  # ours stand beside the fastest that there is
    device, dtype, repeats = torch.device("cuda"), getattr(torch, arguments.dtype), 50
    network = pack(random_network(ARCH), device, dtype)
    embedding, lstm = network.gates[-1], network.lstm
    assert isinstance(embedding, PackedEmbedding)
    assert lstm is not None
    gate = RNNGate(embedding, lstm)

    def in_pytorch(pooled: Tensor, state: Tensor) -> object:
        logit, *_ = gate_step_ref(pooled, embedding, lstm, state[0], state[1])
        return compact_ref(torch.sigmoid(logit) > 0.5)

    def cudnn(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return F.relu_(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2))

    work: dict[str, Callable[[], object]] = {}
    for batch in (1, 128, 1024):
        sums, state = torch.randn(batch, 1, 64, device=device), torch.zeros(2, batch, 10, device=device)
        work[f"gate step, {batch} images"] = partial(gate, sums, 64, state[0], state[1])

        work[f"gate step in PyTorch, {batch} images"] = partial(in_pytorch, sums[:, 0], state)
    batch = 32
    for channels, out, kernel, size in ((64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7),
                                        (64, 256, 1, 56), (1024, 256, 1, 14)):
        x = torch.randn(batch, size, size, channels, device=device, dtype=dtype)
        weight = torch.randn(out, kernel, kernel, channels, device=device, dtype=dtype) / 100
        bias, y = torch.zeros(out, device=device), torch.empty(batch, size, size, out, device=device, dtype=dtype)
        shape = f"{channels} to {out}, {kernel}x{kernel}, {size}x{size}, {batch} images"
        work[f"cuDNN {shape}"] = partial(cudnn, x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias.to(dtype))
        for share in (0.5, 1.0):
            rows, count = compact(torch.arange(batch, device=device) < share * batch)
            work[f"{shape}, {share:.0%}"] = partial(gathered_conv, x, weight, bias, y, rows=rows, count=count,
                                                    relu=True)

    def many(once: Callable[[], object]) -> Callable[[], None]:
        return _graph(lambda: [once() for _ in range(repeats)] and None).replay

    calls = {name: many(once) for name, once in work.items()}
    timings = timed(calls, arguments.seconds, per=repeats)
    return {"dtype": arguments.dtype, "kernels": {name: timing.to_dict() for name, timing in timings.items()}}


def touch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every kernel of the CUDA engine on small networks, once: for compute-sanitizer, which takes its time."""
    small = {"resident": srt.SkipNetArch("cifar", "basic", (1, 1, 1), (16, 32, 64), "rnn", image_size=(16, 16)),
             "compacted": srt.SkipNetArch("imagenet", "bottleneck", (1, 2), (16, 16), "rnn", image_size=(32, 32)),
             "feed-forward": srt.SkipNetArch("cifar", "basic", (2, 1), (8, 16), "feedforward1", image_size=(8, 8))}
    device, dtype, batch = usable_device("cuda"), getattr(torch, arguments.dtype), arguments.batch
    executed = {}
    for name, arch in small.items():
        model = random_network(arch)
        images, route = (each.to(device) for each in (torch.randn(batch, 3, *arch.image_size),
                                                      random_routing(arch, batch, 0.5)))
        runtime = srt.compile(model, engine="cuda", device=device, dtype=dtype)
        results = [runtime.infer(images), runtime.infer(images, route)]
        executed[name] = [int(result.executed.sum()) for result in results]
        assert isinstance(runtime.engine, CudaEngine)
        if isinstance(runtime.engine.strategy, ResidentStrategy):
            for strategy in plans(runtime.engine.network).values():
                strategy.run(images.to(dtype), route.t(), arch.num_gates)
    torch.cuda.synchronize()
    return {"executed": executed}


def table(folder: Path) -> None:
    """What the parts wrote, in short."""
    for path in sorted(folder.glob("*.json")):
        print(f"\n{path.stem}")
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            print(f"  cannot be read: {error}")
            continue
        if kept := document.get("ceiling"):
            print(f"  ceiling: {kept['name']}, {1e3 * kept['milliseconds']:.1f} us")
        if document.get("part") == "ceiling":
            for name, time in document["baselines"].items():
                print(f"  {name:35} {_microseconds(time)}")
        for name, reason in (kept["lacking"] if kept else document.get("left_out", {})).items():
            print(f"  NOT MEASURED: {name} ({reason})")
        for result in document.get("results", ()):
            for name, time in result["baselines"].items():
                print(f"  {name:35} {_microseconds(time)}")
            for each in result["engines"]:
                best = result["best_dense"]
                share = each.get("share_of_kept_ceiling", each["share_of_ceiling"])
                print(f"  {each['engine']}, {each['fraction']:4.0%} executed{'':{19 - len(each['engine'])}} "
                      f"{_microseconds(each['time'])}  {share:4.0f}% of the ceiling, "
                      f"{each['speedup_over'][best]:.2f} x {best}")
        for name, time in document.get("kernels", {}).items():
            print(f"  {name:44} {_microseconds(time)}")
        for key in ("engines", "winners", "images_per_thread_block", "microseconds_per_skipped_block"):
            for name, value in document.get(key, {}).items():
                print(f"  {name:20} {json.dumps(value)}")
        _triton(document.get("benchmarks", ()))


def _triton(rows: Sequence[dict[str, Any]]) -> None:
    """What bench_triton.py timed, one line for all batch sizes."""
    times: dict[str, dict[int, list[str]]] = {}
    for row in rows:
        if row["extra_info"]:  # else it was interrupted
            parameters = {name: value for name, value in row["params"].items() if name != "who"}
            batch = parameters.pop("batch")
            what = " ".join([row["name"].partition("[")[0].removeprefix("test_"), *map(str, parameters.values())])
            times.setdefault(what, {}).setdefault(batch, []).append(f"{row['extra_info']['us a launch']:.1f}")
    if times:
        print("  microseconds by batch size; of convolutions over all images, over half of them, and cuDNN's over all")
    for what, batches in times.items():
        print(f"  {what:40}", *(f"{batch}: {' '.join(shown):18}" for batch, shown in batches.items()))


def _microseconds(time: dict[str, float]) -> str:
    median, low, high = (1e3 * time[name] for name in ("median", "p20", "p80"))
    return f"{median:9.1f} us ({low:.1f} - {high:.1f})"


def path_of(arguments: argparse.Namespace, part: str, cudnn_benchmark: bool = False) -> Path | None:
    """Where a part's document is, or None if it goes to the standard output."""
    name = f"{part}-{arguments.arch}-{arguments.dtype}-{arguments.batch}{'-cudnn.benchmark' if cudnn_benchmark else ''}"
    return arguments.output / f"{name}.json" if arguments.output else None


def write(arguments: argparse.Namespace, measured: dict[str, Any]) -> None:
    """A part's document, with what it was measured on, where it belongs."""
    text = json.dumps({"part": arguments.part, "versions": machine.versions(),
                       "gpu": machine.gpu(torch.device(DEVICE)), **measured}, indent=2)
    if path := path_of(arguments, arguments.part, arguments.cudnn_benchmark):
        path.write_text(text + "\n")
    else:
        print(text)


def main() -> None:
    """One part of the measurements."""
    parts = {part.__name__: part for part in (ceiling, compare, routing, slope, crossover, waves, gates, kernels,
                                              touch)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*parts, "table"])
    parser.add_argument("folder", nargs="?", type=Path, help="of the table")
    parser.add_argument("--arch", default=ARCH)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--without", action="append", default=[], help="a baseline to leave out")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="of the ceiling: let PyTorch time algorithms")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "table":
        table(arguments.folder)
        return
    torch.manual_seed(0)
    try:
        usable_device("cuda")
        measured = parts[arguments.part](arguments)
    except (BenchmarkError, EngineError) as error:
        parser.exit(1, f"{error}\n")
    write(arguments, measured)
    if arguments.part == "ceiling" and measured["left_out"]:
        sys.exit("not measured: " + "; ".join(f"{name} ({reason})" for name, reason in measured["left_out"].items()))


if __name__ == "__main__":
    main()
