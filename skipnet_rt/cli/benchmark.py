"""``skipnet-rt benchmark``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from skipnet_rt.checkpoint import load
from skipnet_rt.cli.console import UNSTEADY, out, print_json, print_table, progress
from skipnet_rt.cli.options import CommandError, Device, DTypeName, Json, prepare_plots, short_names
from skipnet_rt.engines.registry import engines
from skipnet_rt.measure.baselines import BASELINES, Baseline
from skipnet_rt.measure.benchmark import BATCHES, FRACTIONS, BatchResult, Benchmark, benchmark, random_network, scaling


def benchmark_command(
        arch_name: Annotated[str, typer.Option(
            "--arch", metavar="NAME", help="A published name; the weights are random.")] = "cifar10_rnn_gate_110",
        model_path: Annotated[Path | None, typer.Option(
            "--model", metavar="CKPT", help="A checkpoint instead, published or .safetensors.")] = None,
        engine: Annotated[list[str] | None, typer.Option(
            metavar="NAME", help=f"One of ours: auto, {', '.join(engines())}; may be given several times.",
            show_default="auto")] = None,
        device: Device = "cpu",
        batch: Annotated[list[int] | None, typer.Option(
            min=1, help="Images per call; may be given several times.",
            show_default=", ".join(map(str, BATCHES)))] = None,
        fraction: Annotated[list[float] | None, typer.Option(
            min=0, max=1, help="Of the gated blocks to execute, others in each image; may be given several times.",
            show_default=", ".join(map(str, FRACTIONS)))] = None,
        dtype: Annotated[DTypeName, typer.Option(help="Of weights and activations.")] = DTypeName.float32,
        threads: Annotated[list[int] | None, typer.Option(
            min=1, help="Of every engine; given several times, ours are timed with fewer as well.",
            show_default="PyTorch's")] = None,
        seconds: Annotated[float, typer.Option(min=0, help="To measure for, at each batch size.")] = 10.0,
        without: Annotated[list[str] | None, typer.Option(
            metavar="BASELINE", help=f"Leave it out: {' | '.join(baseline.name for baseline in BASELINES)}.")] = None,
        output: Annotated[Path | None, typer.Option(
            metavar="DIR", help="Write the JSON document and a plot there.")] = None,
        as_json: Json = False) -> None:
    """Time our engines, skipping, beside dense engines on one device: all take turns, in one run."""
    if output:
        prepare_plots("--output", output)
    if threads:
        torch.set_num_threads(max(threads))
    baselines = _baselines_without(without or [])
    torch.manual_seed(0)
    model = load(model_path) if model_path else random_network(arch_name)
    with progress("compiling") as report:
        measured = benchmark(
            model, engines=engine or ["auto"], batches=batch or BATCHES, fractions=fraction or FRACTIONS,
            dtype=getattr(torch, dtype.value), baselines=baselines, seconds=seconds, device=device,
            fewer_threads=sorted(set(threads or []))[:-1], on_progress=report)
    document = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "model": str(model_path) if model_path else None, **measured.to_dict()}
    name = f"{torch.device(device).type}-{short_names([model_path])[0] if model_path else arch_name}-{dtype.value}"
    written = _written(output, name, document, measured) if output else []
    if as_json:
        print_json(document)
        return
    for result in measured.results:
        _print_batch(measured, result)
    out.print("\nCeiling: the best dense engine's time, times the executed share of the multiply-adds. At 100% every "
              "skipped block is\na saving in full; above it our kernels beat that engine's, too.")
    for baseline, reason in measured.left_out.items():
        out.print(f"Without {baseline}: {reason}", markup=False)
    for path in written:
        out.print(f"Wrote {path}", markup=False, soft_wrap=True)


def _baselines_without(names: Sequence[str]) -> list[Baseline]:
    known = [baseline.name for baseline in BASELINES]
    for name in names:
        if name not in known:
            raise CommandError(f"no baseline is called {name!r}; known: {', '.join(known)}")
    return [baseline for baseline in BASELINES if baseline.name not in names]


def _print_batch(measured: Benchmark, result: BatchResult) -> None:
    table = Table()
    table.add_column("engine")
    for heading in ("median", "p25", "x best dense", "x masked", "share of the ceiling", "by p25"):
        table.add_column(heading, justify="right")
    rows = [*((name, timing, ()) for name, timing in result.baselines.items()),
            *((each.name, each.timing, (f"{each.share_of_ceiling(result.best_dense):.0%}",
                                        f"{each.fast_share_of_ceiling(result.best_dense):.0%}"))
              for each in result.engines)]
    for name, timing, shares in rows:
        table.add_row(name, f"{1e3 * timing.median:.2f}", f"{1e3 * timing.fast_quartile:.2f}",
                      f"{timing.speedup_over(result.best_dense):.2f}",
                      f"{timing.speedup_over(result.masked):.2f}" if result.masked else "", *shares)
    print_table(f"{measured.arch}, batch of {result.batch}: milliseconds ({measured.where}, {str(measured.dtype)[6:]}, "
                f"{result.rounds} interleaved rounds)", table, f"Best dense engine: {result.best}.")
    for line in scaling(result):
        out.print(line, markup=False)
    if not result.steady:
        out.print(UNSTEADY)


def _written(folder: Path, name: str, document: Mapping[str, Any], measured: Benchmark) -> list[Path]:
    from skipnet_rt.measure import plots as analysis

    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [path, analysis.save(analysis.time_against_computation(measured), folder / f"{name}.png")]
