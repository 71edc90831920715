"""``skipnet-rt demo``."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from rich.table import Table

from skipnet_rt.cli.console import UNSTEADY, out, print_json, print_table, progress
from skipnet_rt.cli.evaluate import results_table
from skipnet_rt.cli.options import Json
from skipnet_rt.measure.benchmark import Benchmark
from skipnet_rt.measure.demo import VARIANTS, Demonstration, demonstrate


def demo_command(as_json: Json = False) -> None:
    """Classify 360 held-out digits with the bundled SkipNet and time every engine beside dense execution."""
    with progress("loading") as report:
        demonstration = demonstrate(report)
    if as_json:
        print_json(demonstration.to_dict())
        return
    evaluation = demonstration.evaluation
    print_table(f"{evaluation.arch} on {len(evaluation)} held-out handwritten digits", results_table(evaluation))
    out.print()
    out.print(_extremes(demonstration))
    for measured in demonstration.benchmarks:
        _print_times(measured)
    out.print("\nThe eager engine is the reference: exact before fast, it takes one image at a time.")
    for name, availability in demonstration.engines.items():
        if not availability:
            out.print(f"Engine {name}: {availability}", markup=False)
    out.print(_invitation(), markup=False, soft_wrap=True)


def _extremes(demonstration: Demonstration) -> Table:
    """The easiest and the hardest digit side by side."""
    evaluation, table = demonstration.evaluation, Table.grid(padding=(0, 6))
    captions, drawings = [], []
    for kind, number in (("Easiest", demonstration.easiest), ("Hardest", demonstration.hardest)):
        target, prediction = int(evaluation.targets[number]), int(evaluation.predictions[number])
        verdict = "recognised" if target == prediction else f"taken for {prediction}"
        captions.append(f"{kind}: digit {target}, {verdict},\nran {int(evaluation.blocks_run[number])} of "
                        f"{evaluation.arch.num_blocks} blocks")
        drawings.append(draw(demonstration.pictures[number]))
    table.add_row(*captions)
    table.add_row(*drawings)
    return table


def _invitation() -> str:
    """How to open the page, for typing: the command's path where its name alone would not find it."""
    script = Path(sys.argv[0])
    found = script.name != "skipnet-rt" or shutil.which("skipnet-rt")
    needs = "" if find_spec("fastapi") else " (needs: pip install 'skipnet-rt[serve]')"
    return (f"\nDraw digits yourself: {'skipnet-rt' if found else os.path.relpath(script)} serve, then open "
            f"http://127.0.0.1:8000 in a browser{needs}")


def draw(picture: Image.Image) -> str:
    """A small grey picture in half-block characters: 16x16 dots in 8 lines of 16."""
    dots = picture.resize((16, 16), Image.Resampling.BICUBIC).point(lambda value: value > 96)
    lit = [[bool(dots.getpixel((x, y))) for x in range(16)] for y in range(16)]
    characters = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    return "\n".join("".join(characters[pair] for pair in zip(upper, lower, strict=True))
                     for upper, lower in zip(lit[::2], lit[1::2], strict=True))


def _print_times(measured: Benchmark) -> None:
    (result,) = measured.results
    threads = "" if measured.gpu else f", {measured.where}"
    table = Table()
    table.add_column("engine")
    for heading in ("skipping", "all blocks", "gain by skipping", "over PyTorch dense"):
        table.add_column(heading, justify="right")
    for name in result.engine_names:
        skipping, dense = result.of(name, None), result.of(name, 1.0)
        table.add_row(name, f"{1e3 * skipping.timing.median:.2f}", f"{1e3 * dense.timing.median:.2f}",
                      f"{skipping.timing.speedup_over(dense.timing):.2f}x",
                      f"{skipping.timing.speedup_over(result.best_dense):.2f}x")
    table.add_row("PyTorch dense", "", f"{1e3 * result.best_dense.median:.2f}", "", "")
    print_table(f"Milliseconds per batch of {result.batch} ({measured.device.type}{threads}, "
                f"{str(measured.dtype)[6:]}, medians of {result.rounds} interleaved rounds)", table,
                f"Skipping leaves {result.engines[0].multiply_adds_share:.0%} of the multiply-adds. "
                f"PyTorch dense: eager PyTorch without gates, {VARIANTS[result.best]}.")
    if not result.steady:
        out.print(UNSTEADY)
