"""Our engines and their peers on one network, in one process, taking turns.

    pip install onnx onnxruntime openvino matplotlib
    python benchmarks/compare.py --arch cifar10_rnn_gate_110 --output benchmarks/results

Prints a table with the share of the FLOP ceiling, writes JSON and two plots.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import skipnet_rt as srt
from skipnet_rt.benchmark import BatchResult, benchmark, environment
from skipnet_rt.peers import PEERS


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="cifar10_rnn_gate_110", help="a published name")
    parser.add_argument("--engine", action="append", help="ours; may be repeated (default: cpu)")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated (default: 1, 8, 64)")
    parser.add_argument("--fraction", type=float, action="append",
                        help="of the gated blocks to execute; may be repeated (default: 0.5, 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10, help="for each batch size")
    parser.add_argument("--without", action="append", default=[], metavar="PEER", help="leave a peer out")
    parser.add_argument("--output", type=Path, help="a folder for JSON and plots")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    dtype = getattr(torch, options.dtype)
    peers = [peer for peer in PEERS if peer.name not in options.without]
    for peer in peers:
        if objection := peer.objection(dtype):
            console.print(f"without {peer.name}: {objection}")
    results = benchmark(
        srt.build(options.arch).eval(), engines=options.engine or ["cpu"], batches=options.batch or [1, 8, 64],
        fractions=options.fraction or [0.5, 1.0], dtype=dtype, peers=peers, seconds=options.seconds,
        on_progress=lambda text: console.print(text, style="dim"))
    show(results, console)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"cpu-{options.arch}-{options.dtype}"
        report = {"command": " ".join(["python", *sys.argv]), "arch": options.arch, "dtype": options.dtype,
                  "environment": environment(), "results": [result.to_dict() for result in results]}
        (options.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(results, options.output / f"{name}.png", f"{options.arch}, {options.dtype}")


def show(results: list[BatchResult], console: Console) -> None:
    """A table for each batch size."""
    for result in results:
        table = Table(title=f"batch {result.batch}: {len(result.peers[result.best].seconds)} rounds, in turns")
        for heading in ("", "ms", "p20", "p80", f"times faster than {result.best}", "share of the ceiling"):
            table.add_column(heading, justify="right" if heading else "left")
        best = result.peers[result.best]
        rows: list[tuple[str, Any, str]] = [(name, timing, "") for name, timing in result.peers.items()]
        rows += [(f"{one.engine}, {one.fraction:.0%} executed", one.timing, f"{one.share_of_ceiling(best):.0%}")
                 for one in result.ours]
        for name, timing, share in rows:
            milliseconds = timing.to_dict()
            table.add_row(name, *(f"{milliseconds[key]:.2f}" for key in ("median", "p20", "p80")),
                          f"{timing.speedup_over(best):.2f}", share)
        console.print(table)


def plot(results: list[BatchResult], path: Path, title: str) -> None:
    """Time against executed fraction with the proportional line; latency against batch."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for color, result in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], results, strict=False):
        points = sorted((one.multiply_adds_share, one.timing.median / result.batch * 1e3) for one in result.ours)
        dense = result.peers[result.best].median / result.batch * 1e3
        left.plot(*zip(*points, strict=True), "o-", color=color, label=f"batch {result.batch}")
        left.plot([0, 1], [0, dense], ":", color=color, label=f"ceiling: {result.best}, batch {result.batch}")
    left.set(xlabel="executed share of the multiply-adds", ylabel="ms an image", xlim=(0, None), ylim=(0, None),
             title="time against executed share")
    batches = [result.batch for result in results]
    for name in results[0].peers:
        right.plot(batches, [result.peers[name].median / result.batch * 1e3 for result in results], "s--", label=name)
    for place, one in enumerate(results[0].ours):
        right.plot(batches, [result.ours[place].timing.median / result.batch * 1e3 for result in results], "o-",
                   label=f"{one.engine}, {one.fraction:.0%} executed")
    right.set(xlabel="batch", ylabel="ms an image", title="time an image against batch", xscale="log", yscale="log")
    right.set_xticks(batches, [str(batch) for batch in batches])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
