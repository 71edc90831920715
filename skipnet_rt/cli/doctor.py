"""``skipnet-rt doctor``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

from skipnet_rt.cli.console import err, out, print_json, progress
from skipnet_rt.cli.options import DTypeName, Json
from skipnet_rt.measure.benchmark import random_network
from skipnet_rt.measure.doctor import Diagnosis, diagnose, warm


def doctor_command(
        names: Annotated[list[str] | None, typer.Option(
            "--warm", metavar="NAME", help="First tune and compile the Triton kernels of this published network for "
                                           "this GPU, and find its fastest engine; several times for several.")] = None,
        dtype: Annotated[DTypeName, typer.Option(help="What --warm compiles for.")] = DTypeName.float16,
        as_json: Json = False) -> None:
    """Say what this installation can do, and check that it does it right. Exit status 1 if it does not."""
    for name in names or ():
        _warm(name, getattr(torch, dtype.value))
    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        out.print(_diagnosis_table(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)


def _warm(name: str, dtype: torch.dtype) -> None:
    with progress(name) as report:
        layers = warm(random_network(name), dtype, lambda what, share: report(f"{name}: {what}", share))
    err.print(f"{name}: {layers} kinds of convolution tuned and compiled in {dtype}", markup=False)


def _diagnosis_table(diagnosis: Diagnosis) -> Table:
    cpu, cuda, problem = diagnosis.cpu, diagnosis.cuda, diagnosis.bundled_problem
    table = Table.grid(padding=(0, 2))

    def row(name: str, value: str, style: str = "") -> None:
        table.add_row(name, Text(value, style))

    for name, installed in diagnosis.versions.items():
        row(name, installed or "not installed")
    row("CPU", f"{cpu['processor']}, {cpu['cores']} cores, {cpu['threads']} threads, PyTorch uses "
               f"{cpu['torch_capability']}; has {', '.join(cpu['instructions']) or 'unknown instructions'}")
    row("CUDA sources", cuda["sources"])
    row("GPUs", ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in cuda["gpus"])
        or cuda["problem"] or "none looked for")
    row("PyTorch's CUDA", f"{cuda['torch_cuda'] or 'none'}, {cuda['torch_sees']} devices")
    for name, availability in diagnosis.engines.items():
        row(f"Engine {name}", str(availability), "green" if availability else "yellow")
    for number, needed in enumerate(diagnosis.missing_for_gpus):
        row("" if number else "Missing for GPUs", needed, "yellow")
    row("Bundled network", problem or "there", "red" if problem else "")
    for check in diagnosis.self_checks:
        row(f"Check {check.engine} on {check.device}", f"{'passed' if check.passed else 'FAILED'}; {check.detail}",
            "green" if check.passed else "red")
    return table
