"""The command line. Results go to standard output, progress and complaints to standard error.

Exit status: 0 done; 1 the operation failed or its input was no good (one line on standard error says why); 2 the
command line itself was wrong; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from skipnet_rt import __version__
from skipnet_rt.checkpoint import CheckpointError
from skipnet_rt.cli.benchmark import benchmark_command
from skipnet_rt.cli.console import fail, show_warning
from skipnet_rt.cli.convert import convert_command
from skipnet_rt.cli.demo import demo_command
from skipnet_rt.cli.doctor import doctor_command
from skipnet_rt.cli.evaluate import evaluate_command
from skipnet_rt.cli.inspect import inspect_command
from skipnet_rt.cli.options import CommandError
from skipnet_rt.cli.predict import predict_command
from skipnet_rt.cli.serve import serve_command
from skipnet_rt.cli.train import train_command
from skipnet_rt.data import DataError
from skipnet_rt.engines.registry import EngineError
from skipnet_rt.measure.benchmark import BenchmarkError
from skipnet_rt.model.arch import ArchError
from skipnet_rt.serving import PredictorError
from skipnet_rt.training import TrainError

_MISTAKES = (CommandError, ArchError, BenchmarkError, CheckpointError, DataError, EngineError, PredictorError,
             TrainError)
"""What a user can get wrong, beside files. Anything else is a bug of ours and keeps its stack trace."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})
app.command("demo")(demo_command)
app.command("predict")(predict_command)
app.command("serve")(serve_command)
app.command("evaluate")(evaluate_command)
app.command("benchmark")(benchmark_command)
app.command("train")(train_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("doctor")(doctor_command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"skipnet-rt {__version__}")
        raise typer.Exit


@app.callback()
def _skipnet_rt(_version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    """Run SkipNets: networks that decide, image by image, which residual blocks to run."""


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
        warnings.showwarning = show_warning
        try:
            app(args=None if argv is None else list(argv), prog_name="skipnet-rt")
        except torch.OutOfMemoryError as error:
            fail(f"out of memory: {str(error).splitlines()[0]}; a smaller batch needs less")
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except _MISTAKES as error:
            fail(str(error))
