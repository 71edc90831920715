"""``skipnet-rt evaluate``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table

from skipnet_rt.cli.console import amount, by, groups, out, print_json, print_table, progress, say
from skipnet_rt.cli.options import (
    CommandError,
    Device,
    DTypeName,
    Json,
    ModelPath,
    load_or_bundled,
    prepare_plots,
    short_names,
)
from skipnet_rt.data import DATASETS, Data, load_dataset
from skipnet_rt.engines.registry import engines
from skipnet_rt.measure.evaluate import Evaluation, evaluate
from skipnet_rt.model.flops import count_operations
from skipnet_rt.model.network import SkipNet
from skipnet_rt.runtime import SkipNetRuntime, compile


def evaluate_command(
        model_path: ModelPath = None,
        data: Annotated[str, typer.Option(metavar="NAME", help=f"The data set: {', '.join(DATASETS)}.")] = "digits",
        root: Annotated[Path, typer.Option(metavar="DIR", help="Its folder; digits needs none.")] = Path("data"),
        engine: Annotated[str, typer.Option(
            metavar="NAME", help=f"The engine: auto, {', '.join(engines())}.")] = "auto",
        device: Device = "cpu",
        dtype: Annotated[DTypeName, typer.Option(
            help="Of weights and activations.")] = DTypeName.float32,
        batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 64,
        workers: Annotated[int, typer.Option(min=0, help="Processes that load images; 0 loads in this one.")] = 0,
        agreement: Annotated[int, typer.Option(
            min=0, metavar="N", help="Compare the decisions with the float32 eager engine's on about N images.")] = 512,
        plots: Annotated[Path | None, typer.Option(
            metavar="DIR", help="Draw the paper's figures there; --compare adds accuracy against computation.")] = None,
        compare: Annotated[list[Path] | None, typer.Option(
            metavar="CKPT", help="Evaluate this checkpoint too; may be given several times.")] = None,
        as_json: Json = False) -> None:
    """Measure accuracy and routing of a checkpoint on a data set's held-out images."""
    if plots:
        prepare_plots("--plots", plots)
    paths = [model_path, *(compare or [])]
    names, models = short_names(paths), [load_or_bundled(path) for path in paths]
    runtimes = [compile(model, engine, device, getattr(torch, dtype.value)) for model in models]
    with contextlib.redirect_stdout(sys.stderr):  # torchvision prints while it downloads
        dataset = load_dataset(data, root)
    for model in models:
        _check_fit(model, data, dataset)
    evaluations = []
    total = len(dataset.test)  # type: ignore[arg-type]  # is sized
    with progress("loading") as report:
        for name, model, runtime in zip(names, models, runtimes, strict=True):
            evaluations.append(evaluate(
                runtime, dataset.test, batch_size=batch_size, workers=workers,
                reference=_reference(model, runtime) if agreement else None, reference_images=agreement,
                on_progress=lambda done, name=name: report(f"evaluating {name}", done / total)))  # type: ignore[misc]
    written = _drawn(plots, evaluations, names, dataset, data) if plots else []
    if as_json:
        first, *others = ({"model": str(path) if path else None, "data": data, **evaluation.to_dict()}
                          for path, evaluation in zip(paths, evaluations, strict=True))
        print_json({**first, "compared": others, "plots": [str(path) for path in written]})
        return
    for name, evaluation in zip(names, evaluations, strict=True):
        print_table(f"{name} ({evaluation.arch}) on {len(evaluation)} images of {data}", results_table(evaluation))
        print_table("Executed, in percent of the images, block by block", _rates_table(evaluation))
    for path in written:
        out.print(f"Wrote {path}", markup=False, soft_wrap=True)


def results_table(evaluation: Evaluation) -> Table:
    """Accuracy, computation, routes and agreement of one evaluation."""
    stats = evaluation.stats
    table = Table.grid(padding=(0, 2))
    table.add_row("Accuracy", f"{evaluation.accuracy:.2%}", f"{int(evaluation.correct.sum())} of {len(evaluation)}")
    if evaluation.top5_accuracy is not None:
        table.add_row("Top-5 accuracy", f"{evaluation.top5_accuracy:.2%}", "")
    table.add_row("Computation", f"{stats.computation:.1%}", "of the residual blocks, as the paper counts")
    table.add_row("Multiply-adds", f"{stats.multiply_adds_share:.1%}",
                  f"{amount(stats.multiply_adds)} per image, gates included; "
                  f"dense: {amount(count_operations(evaluation.arch).dense.multiply_adds)}")
    ran = evaluation.blocks_run
    table.add_row("Blocks run", f"{ran.double().mean().item():.1f}",
                  f"of {evaluation.arch.num_blocks} on average, from {int(ran.min())} to {int(ran.max())}")
    table.add_row("Distinct routes", str(evaluation.stats.distinct_routes), "")
    if evaluation.arch.gated:
        table.add_row("Decision entropy", f"{stats.decision_entropy:.3f} bits",
                      "per gate; 0: all images take one route, 1: every gate runs its block for half of them")
    if (agreement := evaluation.agreement) is not None:
        error = "" if agreement.logits_error is None else f"; relative error of the logits {agreement.logits_error:.1e}"
        table.add_row("Decision flips", str(agreement.flips),
                      f"of {agreement.decisions} ({agreement.flip_share:.3%}) against {agreement.reference} on "
                      f"{agreement.images} images{error}")
    table.add_row("Computed with", evaluation.engine, f"on {evaluation.device}, {str(evaluation.dtype)[6:]}")
    return table


def _check_fit(model: SkipNet, name: str, data: Data) -> None:
    expected, given = model.arch.image_size, data.preprocessing.image_size
    if (expected, model.arch.in_channels) != (given, 3):
        raise CommandError(f"{name} has images of 3x{by(given)}, but {model.arch} takes "
                           f"{model.arch.in_channels}x{by(expected)}")
    if model.arch.num_classes != len(data.labels):
        raise CommandError(f"{name} has {len(data.labels)} classes, but {model.arch} has {model.arch.num_classes}")
    if model.card.labels and model.card.labels != data.labels:
        say("warning", f"the checkpoint's classes are not those of {name}: {', '.join(model.card.labels[:5])} ... "
                       f"against {', '.join(data.labels[:5])} ...")
    if model.card.preprocessing and model.card.preprocessing != data.preprocessing:
        say("warning", f"the checkpoint was trained with another preprocessing than that of {name}")


def _reference(model: SkipNet, runtime: SkipNetRuntime) -> SkipNetRuntime | None:
    """The eager engine in float32, unless it would be compared with itself or there are no decisions to compare."""
    if not model.arch.gated or (runtime.engine.name, runtime.dtype) == ("eager", torch.float32):
        return None
    return compile(model, "eager", runtime.device, torch.float32)


def _rates_table(evaluation: Evaluation) -> Table:
    """Execution rates, a row per group."""
    rates = [1.0, *evaluation.stats.execution_rates.tolist()] if evaluation.arch.gated else []
    table = Table()
    table.add_column("group")
    table.add_column("output", justify="right")
    table.add_column("blocks")
    for members in groups(evaluation.arch):
        shown = " ".join(f"{100 * rates[plan.index]:3.0f}" for plan in members) if rates else "all"
        table.add_row(str(members[0].group), f"{members[0].out_channels}x{by(members[0].out_size)}", shown)
    return table


def _drawn(folder: Path, evaluations: Sequence[Evaluation], names: Sequence[str], data: Data, data_name: str
           ) -> list[Path]:
    """The figures of the first evaluation, and of all of them if there are several."""
    from skipnet_rt.measure import plots as analysis

    evaluation = evaluations[0]

    def picture(number: int) -> np.ndarray:
        return analysis.pixels(data.test[number][0], data.preprocessing)

    figures = {
        "execution_rates": analysis.execution_rates(evaluation),
        "skipped_by_class": analysis.skipped_by_class(evaluation, data.labels),
        "easiest_and_hardest": analysis.easiest_and_hardest(evaluation, picture, data.labels),
        "routes": analysis.routes(evaluation, picture, data.labels),
    }
    if len(evaluations) > 1:
        networks = [analysis.TradeOff.of(name, each) for name, each in zip(names, evaluations, strict=True)]
        figures["accuracy_against_computation"] = analysis.accuracy_against_computation(
            networks, f"{data_name}, {len(evaluation)} images")
    return [analysis.save(figure, folder / f"{name}.png") for name, figure in figures.items()]
