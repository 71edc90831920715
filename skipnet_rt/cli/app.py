"""The command line. Results go to standard output, progress and complaints to standard error.

Exit status: 0 done; 1 the operation failed or its input was no good (one line on standard error says why); 2 the
command line itself was wrong; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import shlex
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from skipnet_rt import __version__
from skipnet_rt.checkpoint import CheckpointError, convert, load
from skipnet_rt.cli.options import field_options
from skipnet_rt.data import DATASETS, DIGITS, Data, DataError, load_dataset
from skipnet_rt.engines.registry import EngineError, engines
from skipnet_rt.measure import demo as demonstration
from skipnet_rt.measure.baselines import PEERS, Peer
from skipnet_rt.measure.benchmark import BATCHES, FRACTIONS, BatchResult, Benchmark, BenchmarkError, benchmark
from skipnet_rt.measure.clock import Comparison
from skipnet_rt.measure.doctor import Diagnosis, diagnose, warm
from skipnet_rt.measure.evaluate import Evaluation, evaluate
from skipnet_rt.model.arch import PUBLISHED, ArchError, BlockPlan, SkipNetArch, arch
from skipnet_rt.model.flops import NetworkCount, count_operations
from skipnet_rt.model.network import SkipNet, build
from skipnet_rt.model.preprocessing import CIFAR, IMAGENET, SVHN, Preprocessing
from skipnet_rt.runtime import SkipNetRuntime, compile, usable_device
from skipnet_rt.training.loop import RECIPES, TrainConfig, TrainError, train


class CommandError(Exception):
    """What a user asked for cannot be done; the message is one clear line."""


_MISTAKES = (CommandError, ArchError, BenchmarkError, CheckpointError, DataError, EngineError, TrainError)
"""What a user can get wrong, beside files. Anything else is a bug of ours and keeps its stack trace."""

class DTypeName(str, Enum):
    """The dtypes that engines compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class PreprocessingName(str, Enum):
    """The data sets whose preprocessing can be asked for."""

    digits = "digits"
    cifar = "cifar"
    svhn = "svhn"
    imagenet = "imagenet"


_PREPROCESSINGS = {PreprocessingName.digits: DIGITS, PreprocessingName.cifar: CIFAR, PreprocessingName.svhn: SVHN,
                   PreprocessingName.imagenet: IMAGENET}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})


def _console(*, stderr: bool) -> Console:
    """Rich takes a pipe for 80 columns wide; our tables want a little more."""
    given = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, highlight=False, width=None if given else 120)


_out, _err = _console(stderr=False), _console(stderr=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The ``skipnet-rt`` command.

    Args:
        argv: the arguments; those of the process by default.

    Raises:
        SystemExit: always, with the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our characters is no reason to fail
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(args=None if argv is None else list(argv), prog_name="skipnet-rt")
        except torch.OutOfMemoryError as error:
            _fail(f"out of memory: {str(error).splitlines()[0]}; a smaller batch needs less")
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except _MISTAKES as error:
            _fail(str(error))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"skipnet-rt {__version__}")
        raise typer.Exit


@app.callback()
def _skipnet_rt(_version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    """Run SkipNets: networks that decide, image by image, which residual blocks to run."""


def _fail(message: str) -> None:
    _say("error", message)
    raise SystemExit(1)


def _say(kind: str, message: str) -> None:
    _err.print(Text.assemble((f"{kind}: ", "bold"), message), soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    _say("warning", str(message))


def _print_table(title: str, table: Table, note: str = "") -> None:
    _out.print()
    _out.print(Text(title, style="bold"))
    _out.print(table)
    if note:
        _out.print(note, markup=False)


def _print_json(document: Mapping[str, Any]) -> None:
    print(json.dumps(document, indent=2))


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err if _err.is_terminal else Console(quiet=True), transient=True) as progress:
        yield progress


# Options that several commands share ---------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ModelPath = Annotated[Path | None, typer.Option(
    "--model", metavar="CKPT", help="A checkpoint, published or .safetensors.", show_default="the bundled one")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="A torch device: cpu, cuda, cuda:1.")]


def _model(path: Path | None) -> SkipNet:
    return demonstration.bundled_model() if path is None else load(path)


# demo ----------------------------------------------------------------------------------------------------------------

@app.command()
def demo(as_json: Json = False) -> None:
    """Classify 360 held-out digits with the bundled SkipNet and time every engine beside dense execution."""
    with _progress() as progress:
        task = progress.add_task("loading", total=1.0)
        found = demonstration.demonstrate(lambda what, share: progress.update(task, description=what, completed=share))
    if as_json:
        _print_json(found.to_dict())
        return
    evaluation = found.evaluation
    _print_table(f"{evaluation.arch} on {len(evaluation)} held-out handwritten digits", _results_table(evaluation))
    _out.print()
    _out.print(_extremes(found))
    for comparison in found.comparisons:
        _print_timings(comparison)
    _out.print("\nThe eager engine is the reference: exact before fast, it takes one image at a time.")
    for name, availability in found.engines.items():
        if not availability:
            _out.print(f"Engine {name}: {availability}", markup=False)


def _results_table(evaluation: Evaluation) -> Table:
    stats = evaluation.stats
    table = Table.grid(padding=(0, 2))
    table.add_row("Accuracy", f"{evaluation.accuracy:.2%}", f"{int(evaluation.correct.sum())} of {len(evaluation)}")
    if evaluation.top5_accuracy is not None:
        table.add_row("Top-5 accuracy", f"{evaluation.top5_accuracy:.2%}", "")
    table.add_row("Computation", f"{stats.computation:.1%}", "of the residual blocks, as the paper counts")
    table.add_row("Multiply-adds", f"{stats.multiply_adds_share:.1%}",
                  f"{_amount(stats.multiply_adds)} an image, gates included; "
                  f"dense: {_amount(count_operations(evaluation.arch).dense.multiply_adds)}")
    ran = evaluation.blocks_run
    table.add_row("Blocks run", f"{ran.double().mean().item():.1f}",
                  f"of {evaluation.arch.num_blocks} on average, from {int(ran.min())} to {int(ran.max())}")
    table.add_row("Distinct routes", str(evaluation.stats.distinct_routes), "")
    if (agreement := evaluation.agreement) is not None:
        error = "" if agreement.logits_error is None else f"; relative error of the logits {agreement.logits_error:.1e}"
        table.add_row("Decision flips", str(agreement.flips),
                      f"of {agreement.decisions} ({agreement.flip_share:.3%}) against {agreement.reference} on "
                      f"{agreement.images} images{error}")
    table.add_row("Computed with", evaluation.engine, f"on {evaluation.device}, {str(evaluation.dtype)[6:]}")
    return table


def _amount(count: float) -> str:
    """A count with three or four digits that say something."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f}"


def _extremes(found: demonstration.Demonstration) -> Table:
    """The easiest and the hardest digit side by side."""
    evaluation, table = found.evaluation, Table.grid(padding=(0, 6))
    captions, drawings = [], []
    for kind, number in (("Easiest", found.easiest), ("Hardest", found.hardest)):
        target, prediction = int(evaluation.targets[number]), int(evaluation.predictions[number])
        verdict = "recognised" if target == prediction else f"taken for {prediction}"
        captions.append(f"{kind}: digit {target}, {verdict},\nran {int(evaluation.blocks_run[number])} of "
                        f"{evaluation.arch.num_blocks} blocks")
        drawings.append(draw(found.pictures[number]))
    table.add_row(*captions)
    table.add_row(*drawings)
    return table


def draw(picture: Image.Image) -> str:
    """A small grey picture in half-block characters: 16x16 dots in 8 lines of 16."""
    dots = picture.resize((16, 16), Image.Resampling.BICUBIC).point(lambda value: value > 96)
    lit = [[bool(dots.getpixel((x, y))) for x in range(16)] for y in range(16)]
    characters = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    return "\n".join("".join(characters[pair] for pair in zip(upper, lower, strict=True))
                     for upper, lower in zip(lit[::2], lit[1::2], strict=True))


_UNSTEADY = "Times vary a lot from round to round: something else is running, and these figures are rough."


def _print_timings(comparison: Comparison) -> None:
    threads = "" if comparison.device != "cpu" else f", {comparison.threads} thread{'s' * (comparison.threads > 1)}"
    table = Table()
    table.add_column("engine")
    for heading in ("skipping", "all blocks", "gain by skipping", "over PyTorch dense"):
        table.add_column(heading, justify="right")
    for timed in comparison.engines:
        table.add_row(timed.engine, f"{1e3 * timed.skipping.median:.2f}", f"{1e3 * timed.dense.median:.2f}",
                      f"{timed.skipping.speedup_over(timed.dense):.2f}x",
                      f"{timed.skipping.speedup_over(comparison.pytorch):.2f}x")
    table.add_row("PyTorch dense", "", f"{1e3 * comparison.pytorch.median:.2f}", "", "")
    rounds, dtype = len(comparison.pytorch.seconds), str(comparison.dtype)[6:]
    _print_table(f"Milliseconds a batch of {comparison.batch} ({comparison.device}{threads}, {dtype}, "
                 f"medians of {rounds} alternating rounds)", table,
                 f"Skipping leaves {comparison.multiply_adds_share:.0%} of the multiply-adds. "
                 f"PyTorch dense: eager PyTorch without gates, {comparison.variant}.")
    if not comparison.steady:
        _out.print(_UNSTEADY)


# predict -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Prediction:
    """One picture's classes, best first, and what they cost."""

    image: Path
    classes: list[tuple[int, str, float]]  # number, label, probability
    blocks_run: int
    computation: float
    multiply_adds: int


@app.command()
def predict(
        images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files of any size and mode.")],
        model_path: ModelPath = None,
        top: Annotated[int, typer.Option(min=1, metavar="K", help="Classes to show of each picture.")] = 3,
        preprocessing: Annotated[PreprocessingName | None, typer.Option(
            help="How pictures become inputs.", show_default="what the checkpoint says")] = None,
        as_json: Json = False) -> None:
    """Classify pictures and show how many blocks each of them ran."""
    model = _model(model_path)
    prepare = _preprocessing(model, preprocessing)
    runtime = compile(model)
    labels = model.card.labels or tuple(map(str, range(model.arch.num_classes)))
    predictions: list[_Prediction] = []
    with _progress() as progress:
        task = progress.add_task("classifying", total=len(images))
        remaining = iter(images)
        while chunk := list(islice(remaining, 64)):
            predictions += _predicted(runtime, chunk, prepare, labels, top)
            progress.update(task, completed=len(predictions))
    if as_json:
        _print_json({"model": str(model_path) if model_path else None, "architecture": str(model.arch),
                     "blocks": model.arch.num_blocks,
                     "predictions": [_prediction_dict(found) for found in predictions]})
        return
    table = Table()
    for heading, justify in (("image", "left"), ("class", "left"), ("probability", "right"), ("then", "left"),
                             ("blocks run", "right"), ("computation", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # these are JustifyMethods
    for found in predictions:
        (_, label, probability), *others = found.classes
        table.add_row(Text(str(found.image)), Text(label), f"{probability:.1%}",
                      Text(", ".join(f"{other} {share:.1%}" for _, other, share in others)),
                      f"{found.blocks_run} of {model.arch.num_blocks}", f"{found.computation:.1%}")
    _out.print(table)


def _preprocessing(model: SkipNet, asked: PreprocessingName | None) -> Preprocessing:
    """What was asked for, else the checkpoint's own."""
    chosen = _PREPROCESSINGS[asked] if asked else model.card.preprocessing
    if chosen is None:
        raise CommandError("the checkpoint doesn't say how pictures become inputs; "
                           f"choose with --preprocessing {'|'.join(name.value for name in PreprocessingName)}")
    if chosen.image_size != model.arch.image_size or model.arch.in_channels != 3:
        raise CommandError(f"this preprocessing makes images of 3x{_by(chosen.image_size)}, "
                           f"but {model.arch} takes {model.arch.in_channels}x{_by(model.arch.image_size)}")
    return chosen


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


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


def _prediction_dict(found: _Prediction) -> dict[str, Any]:
    return {"image": str(found.image),
            "classes": [{"class": number, "label": label, "probability": share}
                        for number, label, share in found.classes],
            "blocks_run": found.blocks_run, "computation": 100 * found.computation,
            "multiply_adds": found.multiply_adds}


# evaluate ------------------------------------------------------------------------------------------------------------

@app.command("evaluate")
def evaluate_command(
        model_path: ModelPath = None,
        data: Annotated[str, typer.Option(metavar="NAME", help=f"The data set: {', '.join(DATASETS)}.")] = "digits",
        root: Annotated[Path, typer.Option(metavar="DIR", help="Its folder; digits needs none.")] = Path("data"),
        engine: Annotated[str, typer.Option(
            metavar="NAME", help=f"The engine: auto, {', '.join(engines())}.")] = "auto",
        device: Device = "cpu",
        dtype: Annotated[DTypeName, typer.Option(
            help="Of weights and activations.")] = DTypeName.float32,
        batch_size: Annotated[int, typer.Option(min=1, help="Images a call.")] = 64,
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
        _prepare_plots("--plots", plots)
    paths = [model_path, *(compare or [])]
    names, models = _names(paths), [_model(path) for path in paths]
    runtimes = [compile(model, engine, device, getattr(torch, dtype.value)) for model in models]
    with contextlib.redirect_stdout(sys.stderr):  # torchvision prints while it downloads
        found = load_dataset(data, root)
    for model in models:
        _check_fit(model, data, found)
    evaluations = []
    with _progress() as progress:
        for name, model, runtime in zip(names, models, runtimes, strict=True):
            task = progress.add_task(f"evaluating {name}", total=len(found.test))  # type: ignore[arg-type]  # is sized
            evaluations.append(evaluate(
                runtime, found.test, batch_size=batch_size, workers=workers,
                reference=_reference(model, runtime) if agreement else None, reference_images=agreement,
                on_progress=partial(_advance, progress, task)))
    written = _drawn(plots, evaluations, names, found, data) if plots else []
    if as_json:
        first, *others = ({"model": str(path) if path else None, "data": data, **evaluation.to_dict()}
                          for path, evaluation in zip(paths, evaluations, strict=True))
        _print_json({**first, "compared": others, "plots": [str(path) for path in written]})
        return
    for name, evaluation in zip(names, evaluations, strict=True):
        _print_table(f"{name} ({evaluation.arch}) on {len(evaluation)} images of {data}", _results_table(evaluation))
        _print_table("Executed, in percent of the images, block by block", _rates_table(evaluation))
    for path in written:
        _out.print(f"Wrote {path}", markup=False, soft_wrap=True)


def _names(paths: Sequence[Path | None]) -> list[str]:
    """Short names of checkpoints: without folder and extension, if that tells them apart."""
    short = ["the bundled network" if path is None else path.name.partition(".")[0] for path in paths]
    return [name if path is None or short.count(name) == 1 else str(path)
            for path, name in zip(paths, short, strict=True)]


def _check_fit(model: SkipNet, name: str, data: Data) -> None:
    expected, found = model.arch.image_size, data.preprocessing.image_size
    if (expected, model.arch.in_channels) != (found, 3):
        raise CommandError(f"{name} has images of 3x{_by(found)}, but {model.arch} takes "
                           f"{model.arch.in_channels}x{_by(expected)}")
    if model.arch.num_classes != len(data.labels):
        raise CommandError(f"{name} has {len(data.labels)} classes, but {model.arch} has {model.arch.num_classes}")
    if model.card.labels and model.card.labels != data.labels:
        _say("warning", f"the checkpoint's classes are not those of {name}: {', '.join(model.card.labels[:5])} ... "
                        f"against {', '.join(data.labels[:5])} ...")
    if model.card.preprocessing and model.card.preprocessing != data.preprocessing:
        _say("warning", f"the checkpoint was trained with another preprocessing than that of {name}")


def _reference(model: SkipNet, runtime: SkipNetRuntime) -> SkipNetRuntime | None:
    """The eager engine in float32, unless it would be compared with itself or there are no decisions to compare."""
    if not model.arch.gated or (runtime.engine.name, runtime.dtype) == ("eager", torch.float32):
        return None
    return compile(model, "eager", runtime.device, torch.float32)


def _advance(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def _rates_table(evaluation: Evaluation) -> Table:
    """Execution rates, a row a group."""
    rates = [1.0, *evaluation.stats.execution_rates.tolist()] if evaluation.arch.gated else []
    table = Table()
    table.add_column("group")
    table.add_column("output", justify="right")
    table.add_column("blocks")
    for members in _groups(evaluation.arch):
        shown = " ".join(f"{100 * rates[plan.index]:3.0f}" for plan in members) if rates else "all"
        table.add_row(str(members[0].group), f"{members[0].out_channels}x{_by(members[0].out_size)}", shown)
    return table


def _groups(architecture: SkipNetArch) -> list[list[BlockPlan]]:
    """The blocks of each group."""
    return [list(members) for _, members in groupby(architecture.blocks, key=lambda plan: plan.group)]


def _prepare_plots(option: str, folder: Path) -> None:
    """Find out before long work, not after it, that its figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CommandError(f"{option} needs matplotlib; install it with: pip install 'skipnet-rt[plots]'") from None
    folder.mkdir(parents=True, exist_ok=True)


def _drawn(folder: Path, evaluations: Sequence[Evaluation], names: Sequence[str], data: Data,
           dataset: str) -> list[Path]:
    """The figures of the first evaluation, and of all of them if there are several."""
    from skipnet_rt.measure import plots as analysis

    evaluation = evaluations[0]
    figures = {
        "execution_rates": analysis.execution_rates(evaluation),
        "skipped_by_class": analysis.skipped_by_class(evaluation, data.labels),
        "easiest_and_hardest": analysis.easiest_and_hardest(
            evaluation, lambda number: analysis.pixels(data.test[number][0], data.preprocessing), data.labels),
    }
    if len(evaluations) > 1:
        networks = [analysis.TradeOff.of(name, found) for name, found in zip(names, evaluations, strict=True)]
        figures["accuracy_against_computation"] = analysis.accuracy_against_computation(
            networks, f"{dataset}, {len(evaluation)} images")
    return [analysis.save(figure, folder / f"{name}.png") for name, figure in figures.items()]


# benchmark -----------------------------------------------------------------------------------------------------------

@app.command("benchmark")
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
            min=1, help="Images a call; may be given several times.",
            show_default=", ".join(map(str, BATCHES)))] = None,
        fraction: Annotated[list[float] | None, typer.Option(
            min=0, max=1, help="Of the gated blocks to execute, others in each image; may be given several times.",
            show_default=", ".join(map(str, FRACTIONS)))] = None,
        dtype: Annotated[DTypeName, typer.Option(help="Of weights and activations.")] = DTypeName.float32,
        threads: Annotated[int | None, typer.Option(min=1, help="Of every engine.", show_default="PyTorch's")] = None,
        seconds: Annotated[float, typer.Option(min=0, help="To measure for, each batch size.")] = 10.0,
        without: Annotated[list[str] | None, typer.Option(
            metavar="PEER", help=f"Leave this one out: {' | '.join(peer.name for peer in PEERS)}.")] = None,
        output: Annotated[Path | None, typer.Option(
            metavar="DIR", help="Write the JSON document and a plot there.")] = None,
        as_json: Json = False) -> None:
    """Time our engines, skipping, beside dense engines on one device: all take turns, in one run."""
    if output:
        _prepare_plots("--output", output)
    if threads:
        torch.set_num_threads(threads)
    peers = _peers_without(without or [])
    torch.manual_seed(0)
    model = load(model_path) if model_path else build(arch_name).eval()
    with _progress() as progress:
        task = progress.add_task("compiling", total=1.0)
        found = benchmark(
            model, engines=engine or ["auto"], batches=batch or BATCHES, fractions=fraction or FRACTIONS,
            dtype=getattr(torch, dtype.value), peers=peers, seconds=seconds, device=device,
            on_progress=lambda what, share: progress.update(task, description=what, completed=share))
    document = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "model": str(model_path) if model_path else None, **found.to_dict()}
    name = f"{torch.device(device).type}-{_names([model_path])[0] if model_path else arch_name}-{dtype.value}"
    written = _written(output, name, document, found) if output else []
    if as_json:
        _print_json(document)
        return
    for result in found.results:
        _print_batch(found, result)
    _out.print("\nCeiling: the best dense engine's time, times the executed share of the multiply-adds. At 100% every "
               "skipped block is\na saving in full; above it our kernels beat that engine's, too.")
    for peer, reason in found.left_out.items():
        _out.print(f"Without {peer}: {reason}", markup=False)
    for path in written:
        _out.print(f"Wrote {path}", markup=False, soft_wrap=True)


def _peers_without(names: Sequence[str]) -> list[Peer]:
    known = [peer.name for peer in PEERS]
    for name in names:
        if name not in known:
            raise CommandError(f"no peer is called {name!r}; known: {', '.join(known)}")
    return [peer for peer in PEERS if peer.name not in names]


def _print_batch(found: Benchmark, result: BatchResult) -> None:
    table = Table()
    table.add_column("engine")
    for heading in ("median", "p20", "p80", "x best dense", "x published", "share of the ceiling"):
        table.add_column(heading, justify="right")
    rows = [*((name, timing, "") for name, timing in result.peers.items()),
            *((one.name, one.timing, f"{one.share_of_ceiling(result.best_dense):.0%}") for one in result.ours)]
    for name, timing, share in rows:
        table.add_row(name, *(f"{value:.2f}" for value in timing.to_dict().values()),
                      f"{timing.speedup_over(result.best_dense):.2f}",
                      f"{timing.speedup_over(result.published):.2f}" if result.published else "", share)
    _print_table(f"{found.arch}, batch of {result.batch}: milliseconds ({found.where}, {str(found.dtype)[6:]}, "
                 f"{result.rounds} alternating rounds)", table,
                 f"Best dense engine: {result.best}.")
    if not result.steady:
        _out.print(_UNSTEADY)


def _written(folder: Path, name: str, document: Mapping[str, Any], found: Benchmark) -> list[Path]:
    from skipnet_rt.measure import plots as analysis

    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [path, analysis.save(analysis.time_against_computation(found), folder / f"{name}.png")]


# train ---------------------------------------------------------------------------------------------------------------

def train_config(options: Mapping[str, Any]) -> TrainConfig:
    """The configuration that options ask for: the data set's recipe, changed by those that were given."""
    given = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()
             if value is not None}
    return TrainConfig.for_data(given.pop("data", TrainConfig.data), **given)


def _train_command(as_json: bool, **options: Any) -> None:
    """Train a SkipNet or a dense base network.

    Defaults are those of the digits; other data sets have the published recipes. Stop with Ctrl-C, go on with --resume.
    """
    config = train_config(options)
    usable_device(config.device)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torchvision prints while it downloads
            result = train(config, console=_err)
    except KeyboardInterrupt as stop:
        _say("interrupted", str(stop) or "nothing was trained yet")
        raise typer.Exit(130) from None
    training = result.card.training
    if as_json:
        _print_json({"model": str(result.path), "architecture": str(result.model.arch),
                     **{name: training[name] for name in ("data", "accuracy", "computation", "epochs", "seconds")}})
        return
    _out.print(f"Trained {result.model.arch} on {config.data}: accuracy {training['accuracy']:.2f} %, "
               f"computation {training['computation']:.1f} %. Wrote {result.path}", markup=False, soft_wrap=True)


_train_command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
    *field_options(TrainConfig, {"data": f"name of the data set: {', '.join(RECIPES)}."}),
    inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)])
_train_command.__annotations__ = {
    name: parameter.annotation for name, parameter in inspect.signature(_train_command).parameters.items()}
app.command("train")(_train_command)


# inspect -------------------------------------------------------------------------------------------------------------

@app.command("inspect")
def inspect_command(
        source: Annotated[str, typer.Argument(metavar="CKPT|NAME", help="A checkpoint, or a published name.")],
        as_json: Json = False) -> None:
    """Show what a network is made of and what it costs."""
    path = Path(source)
    if path.exists():
        model, file_format = load(path), _file_format(path)
    elif source in PUBLISHED or not (path.suffix or path.parent.parts):
        with torch.device("meta"):  # shapes are enough
            model, file_format = SkipNet(arch(source)), None
    else:
        raise CommandError(f"{source}: there is no such file")
    document = _described(model, source, file_format)
    if as_json:
        _print_json(document)
        return
    _print_table(str(model.arch), _network_table(document))
    _print_table("Residual blocks, and their multiply-adds", _groups_table(model.arch, count_operations(model.arch)))


def _file_format(path: Path) -> str:
    """Of a file that could be loaded."""
    if zipfile.is_zipfile(path):
        return "torch.save (zip)"
    with path.open("rb") as file:
        return "safetensors" if file.read(9)[8:] == b"{" else "torch.save (before zip)"


def _described(model: SkipNet, source: str, file_format: str | None) -> dict[str, Any]:
    architecture, counts = model.arch, count_operations(model.arch)
    gates = [model.gate(plan) for plan in architecture.blocks] if architecture.gated else []
    modules = [*gates, *([model.control] if architecture.gate == "rnn" else [])]
    gate_work = [work.multiply_adds for work in counts.gates]
    return {
        "source": source, "format": file_format, "name": architecture.name, "architecture": architecture.to_dict(),
        "parameters": {"total": sum(parameter.numel() for parameter in model.parameters()),
                       "gates": sum(parameter.numel() for module in modules for parameter in module.parameters())},
        "multiply_adds": {"dense": counts.dense.multiply_adds, "stem": counts.stem.multiply_adds,
                          "gates": sum(gate_work), "gates_share": 100 * sum(gate_work) / counts.dense.multiply_adds},
        "blocks": [{"index": plan.index, "group": plan.group, "kind": plan.kind,
                    "input": [plan.in_channels, *plan.in_size], "output": [plan.out_channels, *plan.out_size],
                    "projection": plan.projects, "multiply_adds": block.executed.multiply_adds,
                    "multiply_adds_skipped": block.skipped.multiply_adds}
                   for plan, block in zip(architecture.blocks, counts.blocks, strict=True)],
        "gates": gate_work, "card": model.card.to_dict(),
    }


def _network_table(document: Mapping[str, Any]) -> Table:
    architecture, parameters, work = document["architecture"], document["parameters"], document["multiply_adds"]
    gates = {"none": "none: a dense network", "rnn": "RNNGate", "feedforward1": "FFGate-I", "feedforward2": "FFGate-II"}
    card, training = document["card"], document["card"]["training"]
    table = Table.grid(padding=(0, 2))

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    if document["format"]:
        row("File", f"{document['source']} ({document['format']})")
    row("Gates", gates[architecture["gate"]])
    row("Images", f"{architecture['in_channels']}x{_by(architecture['image_size'])}")
    row("Classes", _listed(card["labels"]) if card["labels"] else str(architecture["num_classes"]))
    row("Parameters", f"{parameters['total']:,}, of which gates {parameters['gates']:,}")
    row("Multiply-adds", f"{_amount(work['dense'])} dense; gates add {_amount(work['gates'])} "
                         f"({work['gates_share']:.2g}%)")
    if (preprocessing := card["preprocessing"]) is not None:
        row("Preprocessing", ", ".join(f"{name} {value}" for name, value in preprocessing.items() if value is not None))
    for name, value in training.items():
        if not isinstance(value, dict):
            row(f"Training: {name}", str(value))
    return table


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:10])
    return f"{len(labels)}: {shown}" + (", ..." if len(labels) > 10 else "")


def _groups_table(architecture: SkipNetArch, counts: NetworkCount) -> Table:
    table = Table()
    for heading in ("group", "blocks", "output", "each block", "the first one", "each gate"):
        table.add_column(heading, justify="right")
    for members in _groups(architecture):
        first, last = members[0], members[-1]
        gate = counts.gates[first.index].multiply_adds if first.index < len(counts.gates) else None
        table.add_row(str(first.group), f"{len(members)} {first.kind}", f"{first.out_channels}x{_by(first.out_size)}",
                      f"{counts.blocks[last.index].executed.multiply_adds:,}",
                      f"{counts.blocks[first.index].executed.multiply_adds:,}", "-" if gate is None else f"{gate:,}")
    return table


# convert -------------------------------------------------------------------------------------------------------------

@app.command("convert")
def convert_command(
        source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint, published or .safetensors.")],
        target: Annotated[Path, typer.Argument(
            metavar="TARGET", help=".safetensors for our format; .pth, .pt or .pth.tar for the published one.")],
) -> None:
    """Write a checkpoint in the other format, bitwise equal in every weight."""
    model = convert(source, target)
    _out.print(f"Wrote {model.arch} to {target}", markup=False, soft_wrap=True)


# doctor --------------------------------------------------------------------------------------------------------------

@app.command()
def doctor(
        names: Annotated[list[str] | None, typer.Option(
            "--warm", metavar="NAME", help="First tune and compile the Triton kernels of this published network for "
                                           "this GPU, and find its fastest engine; several times for several.")] = None,
        dtype: Annotated[DTypeName, typer.Option(help="What --warm compiles for.")] = DTypeName.float16,
        as_json: Json = False) -> None:
    """Say what this installation can do, and check that it does it right. Exit status 1 if it does not."""
    for name in names or ():
        _warm(name, getattr(torch, dtype.value))
    found = diagnose()
    if as_json:
        _print_json(found.to_dict())
    else:
        _out.print(_diagnosis_table(found))
    if not found.ok:
        raise typer.Exit(1)


def _warm(name: str, dtype: torch.dtype) -> None:
    with _progress() as progress:
        task = progress.add_task(name, total=1.0)
        layers = warm(build(name), dtype, lambda what, share: progress.update(
            task, description=f"{name}: {what}", completed=share))
    _err.print(f"{name}: {layers} kinds of convolution tuned and compiled in {dtype}", markup=False)


def _diagnosis_table(found: Diagnosis) -> Table:
    cpu, cuda, problem = found.cpu, found.cuda, found.bundled_problem
    table = Table.grid(padding=(0, 2))

    def row(name: str, value: str, style: str = "") -> None:
        table.add_row(name, Text(value, style))

    for name, installed in found.versions.items():
        row(name, installed or "not installed")
    row("CPU", f"{cpu['processor']}, {cpu['cores']} cores, {cpu['threads']} threads, PyTorch uses "
               f"{cpu['torch_capability']}; has {', '.join(cpu['instructions']) or 'unknown instructions'}")
    row("CUDA sources", cuda["sources"])
    row("GPUs", ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in cuda["gpus"])
        or cuda["problem"] or "none looked for")
    row("PyTorch's CUDA", f"{cuda['torch_cuda'] or 'none'}, {cuda['torch_sees']} devices")
    for name, availability in found.engines.items():
        row(f"Engine {name}", str(availability), "green" if availability else "yellow")
    for number, needed in enumerate(found.missing_for_gpus):
        row("" if number else "Missing for GPUs", needed, "yellow")
    row("Bundled network", problem or "there", "red" if problem else "")
    for check in found.self_checks:
        row(f"Check {check.engine} on {check.device}", f"{'passed' if check.passed else 'FAILED'}; {check.detail}",
            "green" if check.passed else "red")
    return table


if __name__ == "__main__":
    main()
