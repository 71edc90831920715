"""``skipnet-rt convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipnet_rt.checkpoint import convert
from skipnet_rt.cli.console import out


def convert_command(
        source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint, published or .safetensors.")],
        target: Annotated[Path, typer.Argument(
            metavar="TARGET", help=".safetensors for our format; .pth, .pt or .pth.tar for the published one.")],
) -> None:
    """Write a checkpoint in the other format, bitwise equal in every weight."""
    model = convert(source, target)
    out.print(f"Wrote {model.arch} to {target}", markup=False, soft_wrap=True)
