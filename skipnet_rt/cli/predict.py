"""``skipnet-rt predict``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor

from skipnet_rt.cli.console import by, out, print_json, progress
from skipnet_rt.cli.options import CommandError, Json, ModelPath, load_or_bundled
from skipnet_rt.data import DIGITS
from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.preprocessing import CIFAR, IMAGENET, SVHN, Preprocessing
from skipnet_rt.runtime import SkipNetRuntime, compile


class PreprocessingName(str, Enum):
    """The data sets whose preprocessing can be asked for."""

    digits = "digits"
    cifar = "cifar"
    svhn = "svhn"
    imagenet = "imagenet"


_PREPROCESSINGS = {PreprocessingName.digits: DIGITS, PreprocessingName.cifar: CIFAR, PreprocessingName.svhn: SVHN,
                   PreprocessingName.imagenet: IMAGENET}


@dataclass(frozen=True)
class _Prediction:
    """One picture's classes, best first, and what they cost."""

    image: Path
    classes: list[tuple[int, str, float]]  # number, label, probability
    blocks_run: int
    computation: float
    multiply_adds: int


def predict_command(
        images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files of any size and mode.")],
        model_path: ModelPath = None,
        top: Annotated[int, typer.Option(min=1, metavar="K", help="Classes to show of each picture.")] = 3,
        preprocessing: Annotated[PreprocessingName | None, typer.Option(
            help="How pictures become inputs.", show_default="what the checkpoint says")] = None,
        as_json: Json = False) -> None:
    """Classify pictures and show how many blocks each of them ran."""
    model = load_or_bundled(model_path)
    prepare = _preprocessing(model, preprocessing)
    runtime = compile(model)
    labels = model.card.labels or tuple(map(str, range(model.arch.num_classes)))
    predictions: list[_Prediction] = []
    with progress("classifying") as report:
        remaining = iter(images)
        while chunk := list(islice(remaining, 64)):
            predictions += _predicted(runtime, chunk, prepare, labels, top)
            report("classifying", len(predictions) / len(images))
    if as_json:
        print_json({"model": str(model_path) if model_path else None, "architecture": str(model.arch),
                    "blocks": model.arch.num_blocks,
                    "predictions": [_prediction_dict(prediction) for prediction in predictions]})
        return
    table = Table()
    for heading, justify in (("image", "left"), ("class", "left"), ("probability", "right"), ("then", "left"),
                             ("blocks run", "right"), ("computation", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # these are JustifyMethods
    for prediction in predictions:
        (_, label, probability), *others = prediction.classes
        table.add_row(Text(str(prediction.image)), Text(label), f"{probability:.1%}",
                      Text(", ".join(f"{other} {share:.1%}" for _, other, share in others)),
                      f"{prediction.blocks_run} of {model.arch.num_blocks}", f"{prediction.computation:.1%}")
    out.print(table)


def _preprocessing(model: SkipNet, asked: PreprocessingName | None) -> Preprocessing:
    """What was asked for, else the checkpoint's own."""
    chosen = _PREPROCESSINGS[asked] if asked else model.card.preprocessing
    if chosen is None:
        raise CommandError("the checkpoint doesn't say how pictures become inputs; "
                           f"choose with --preprocessing {'|'.join(name.value for name in PreprocessingName)}")
    if chosen.image_size != model.arch.image_size or model.arch.in_channels != 3:
        raise CommandError(f"this preprocessing makes images of 3x{by(chosen.image_size)}, "
                           f"but {model.arch} takes {model.arch.in_channels}x{by(model.arch.image_size)}")
    return chosen


def _opened(path: Path, prepare: Preprocessing) -> Tensor:
    try:
        with Image.open(path) as picture:
            return prepare(picture)
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such file") from None
    except Exception as error:  # what a damaged picture raises depends on its format
        raise CommandError(f"{path}: not a picture that can be read ({error})") from None


def _predicted(runtime: SkipNetRuntime, paths: Sequence[Path], prepare: Preprocessing, labels: Sequence[str],
               top: int) -> Iterator[_Prediction]:
    result = runtime.infer(torch.stack([_opened(path, prepare) for path in paths]))
    values, numbers = result.logits.softmax(dim=1).topk(min(top, len(labels)), dim=1)
    rows = zip(paths, values.tolist(), numbers.tolist(), result.blocks_run.tolist(), result.computation.tolist(),
               result.multiply_adds.tolist(), strict=True)
    for path, shares, classes, ran, computation, multiply_adds in rows:
        best = [(number, labels[number], share) for number, share in zip(classes, shares, strict=True)]
        yield _Prediction(path, best, ran, computation, multiply_adds)


def _prediction_dict(prediction: _Prediction) -> dict[str, Any]:
    return {"image": str(prediction.image),
            "classes": [{"class": number, "label": label, "probability": share}
                        for number, label, share in prediction.classes],
            "blocks_run": prediction.blocks_run, "computation": 100 * prediction.computation,
            "multiply_adds": prediction.multiply_adds}
