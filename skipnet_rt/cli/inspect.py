"""``skipnet-rt inspect``."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from skipnet_rt.checkpoint import load
from skipnet_rt.cli.console import amount, by, groups, print_json, print_table
from skipnet_rt.cli.options import CommandError, Json
from skipnet_rt.model.arch import PUBLISHED, SkipNetArch, arch
from skipnet_rt.model.flops import NetworkCount, count_operations
from skipnet_rt.model.network import SkipNet


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
        print_json(document)
        return
    print_table(str(model.arch), _network_table(document))
    print_table("Residual blocks, and their multiply-adds", _groups_table(model.arch, count_operations(model.arch)))


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
    row("Images", f"{architecture['in_channels']}x{by(architecture['image_size'])}")
    row("Classes", _listed(card["labels"]) if card["labels"] else str(architecture["num_classes"]))
    row("Parameters", f"{parameters['total']:,}, of which gates {parameters['gates']:,}")
    row("Multiply-adds", f"{amount(work['dense'])} dense; gates add {amount(work['gates'])} "
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
    for members in groups(architecture):
        first, last = members[0], members[-1]
        gate = counts.gates[first.index].multiply_adds if first.index < len(counts.gates) else None
        table.add_row(str(first.group), f"{len(members)} {first.kind}", f"{first.out_channels}x{by(first.out_size)}",
                      f"{counts.blocks[last.index].executed.multiply_adds:,}",
                      f"{counts.blocks[first.index].executed.multiply_adds:,}", "-" if gate is None else f"{gate:,}")
    return table
