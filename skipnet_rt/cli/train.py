"""``skipnet-rt train``."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import typer

from skipnet_rt.cli.console import err, out, print_json, progress, say
from skipnet_rt.cli.options import Json, field_options, option_type
from skipnet_rt.runtime import usable_device
from skipnet_rt.training import RECIPES, TrainConfig, train
from skipnet_rt.training.config import Recipe
from skipnet_rt.training.distributed import own_device, place, tell_launcher


def _config(options: Mapping[str, Any]) -> TrainConfig:
    """The configuration that options ask for: the data set's recipe, changed by those that were given."""
    given = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()
             if value is not None}
    return TrainConfig.for_data(given.pop("data", TrainConfig.data), **given)


def train_command(as_json: bool, **options: Any) -> None:
    """Train a SkipNet or a dense base network.

    Defaults are those of the digits; other data sets have the published recipes. With --recipe finetune training begins
    with a trained ResNet, --init. Stop with Ctrl-C, go on with --resume. Several processes:
    torchrun --nproc-per-node N -m skipnet_rt train ...
    """
    config, reports = _config(options), place().rank == 0
    usable_device(own_device(config.device))
    try:
        # What torchvision prints while it downloads is no result.
        with contextlib.redirect_stdout(sys.stderr), progress("loading", shown=reports) as report:
            result = train(config, on_progress=report, on_epoch=_print_epoch)
    except KeyboardInterrupt as stop:
        if reports:
            say("interrupted", str(stop) or "nothing was trained yet")
        raise typer.Exit(130) from None
    except Exception as error:
        tell_launcher(error)
        raise
    if not reports:
        return
    training = result.card.training
    if as_json:
        print_json({"model": str(result.path), "architecture": str(result.model.arch),
                    **{name: training[name] for name in ("data", "accuracy", "computation", "epochs", "seconds")}})
        return
    out.print(f"Trained {result.model.arch} on {config.data}: accuracy {training['accuracy']:.2f} %, "
              f"computation {training['computation']:.1f} %. Wrote {result.path}", markup=False, soft_wrap=True)


def _print_epoch(words: str) -> None:
    err.print(words, markup=False, soft_wrap=True)


train_command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
    inspect.Parameter("recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[
        option_type(Recipe) | None, typer.Option("--recipe", show_default="scratch", help=(
            "scratch trains from random weights, finetune from the trained ResNet of --init."))]),
    *field_options(TrainConfig, {"data": f"name of the data set: {', '.join(RECIPES)}."}),
    inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)])
train_command.__annotations__ = {
    name: parameter.annotation for name, parameter in inspect.signature(train_command).parameters.items()}
