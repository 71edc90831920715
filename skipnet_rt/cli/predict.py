"""``skipnet-rt predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor

from skipnet_rt.cli.console import out, print_json, progress
from skipnet_rt.cli.options import (
    AskedPreprocessing,
    CommandError,
    Json,
    ModelPath,
    PreprocessingName,
    chosen_preprocessing,
)
from skipnet_rt.serving import PictureError, Prediction, Predictor


def predict_command(
        images: Annotated[list[Path], typer.Argument(
            metavar="IMAGE...", help="Picture files of any size and mode; with --ray folders and Parquet files, too.")],
        model_path: ModelPath = None,
        top: Annotated[int, typer.Option(min=1, metavar="K", help="Classes to show of each picture.")] = 3,
        preprocessing: AskedPreprocessing = None,
        on_ray: Annotated[bool, typer.Option("--ray", help="As a job on a Ray cluster, or on all of this machine's "
                                             "cores; goes on where an interrupted one stopped.")] = False,
        output: Annotated[Path | None, typer.Option(
            metavar="OUT", help="With --ray: the folder for the results, NAME.parquet or NAME.jsonl.")] = None,
        cpus: Annotated[int | None, typer.Option(
            min=1, metavar="N", help="With --ray: CPUs of each actor, and its threads.", show_default="2")] = None,
        as_json: Json = False) -> None:
    """Classify pictures and show how many blocks each of them ran."""
    if on_ray != (output is not None):
        raise typer.BadParameter("--ray and --output go together")
    if output is not None:
        _predict_on_ray(images, output, model_path, preprocessing, cpus, as_json)
        return
    predictor = Predictor(model_path, preprocessing=chosen_preprocessing(preprocessing))
    predictions: list[Prediction] = []
    with progress("classifying") as report:
        remaining = iter(images)
        while chunk := list(islice(remaining, 64)):
            predictions += predictor.infer([_image(predictor, path) for path in chunk])
            report("classifying", len(predictions) / len(images))
    if as_json:
        print_json({"model": str(model_path) if model_path else None, "architecture": str(predictor.arch),
                    "blocks": predictor.arch.num_blocks,
                    "predictions": [_prediction_dict(predictor, path, prediction, top)
                                    for path, prediction in zip(images, predictions, strict=True)]})
        return
    out.print(_table(predictor, zip(images, predictions, strict=True), top))


def _predict_on_ray(sources: list[Path], output: Path, model_path: Path | None,
                    preprocessing: PreprocessingName | None, cpus: int | None, as_json: bool) -> None:
    try:
        from skipnet_rt.serving.batch_job import JobError, run_job
    except ImportError as error:
        raise CommandError(str(error)) from None
    try:
        # Ray tells of restarts on standard output, which is for the result.
        with progress("dividing") as report, redirect_stdout(sys.stderr):
            summary = run_job(sources, output, model_path, preprocessing=chosen_preprocessing(preprocessing), cpus=cpus,
                              report=report)
    except JobError as error:
        raise CommandError(str(error)) from None
    if as_json:
        print_json({"output": str(output), **asdict(summary)})
        return
    out.print(f"{summary.pictures} rows ({summary.errors} of them errors) written to {output} in "
              f"{summary.seconds:.1f} s by {summary.actors} actors; {summary.parts_before} of {summary.parts} parts "
              "were there before.", markup=False, soft_wrap=True)


def _image(predictor: Predictor, path: Path) -> Tensor:
    try:
        return predictor.image(path.read_bytes())
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such file") from None
    except PictureError as error:
        raise CommandError(f"{path}: {error}") from None


def _table(predictor: Predictor, rows: Iterator[tuple[Path, Prediction]], top: int) -> Table:
    table = Table()
    for heading, justify in (("image", "left"), ("class", "left"), ("probability", "right"), ("then", "left"),
                             ("blocks run", "right"), ("computation", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # these are JustifyMethods
    for path, prediction in rows:
        first, *others = predictor.classes(prediction, top)
        table.add_row(Text(str(path)), Text(first["label"]), f"{first['probability']:.1%}",
                      Text(", ".join(f"{other['label']} {other['probability']:.1%}" for other in others)),
                      f"{prediction.blocks_run} of {predictor.arch.num_blocks}", f"{prediction.computation:.1%}")
    return table


def _prediction_dict(predictor: Predictor, path: Path, prediction: Prediction, top: int) -> dict[str, Any]:
    return {"image": str(path), "classes": predictor.classes(prediction, top), "blocks_run": prediction.blocks_run,
            "computation": 100 * prediction.computation, "multiply_adds": prediction.multiply_adds}
