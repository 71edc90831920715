"""Pictures of where a SkipNet computes, what for, and how long it takes. Needs matplotlib: the extra ``plots``.

Every function returns a :class:`matplotlib.figure.Figure` of its own; nothing touches pyplot's global state, so that no
display is needed and the caller's figures stay as they are.
Source of all but the last: SkipNet paper, section 4, figures 8, 10 and 11.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from skipnet_rt.measure.benchmark import Benchmark
from skipnet_rt.measure.evaluate import Evaluation
from skipnet_rt.model.preprocessing import Preprocessing

DPI = 150
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe & Ito: for all kinds of sight
_QUIET = "#555555"
_MARKERS = "oD^vPsX<>"
_LETTERS = 9  # of a small text per inch of the figure's width, so that it stays well within the axes
_WRONG = "#c1121f"
_ALL_CLASSES = 20  # as many classes as one picture shows; of more, those that skip the most and the fewest


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as the format of the path's extension; returns the path."""
    figure.savefig(path, dpi=DPI, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return path


def _titled(figure: Figure, axes: Axes, title: str, detail: str) -> None:
    """A title, and smaller under it what it is about, both flush with the axes' left edge."""
    lines = textwrap.wrap(detail, int(_LETTERS * figure.get_figwidth()))
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=8 + 12 * len(lines))
    # Not in the layout, which makes axes narrower for a long text: the title's padding is all the room it needs.
    axes.annotate("\n".join(lines), (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=9,
                  color=_QUIET).set_in_layout(False)


def execution_rates(evaluation: Evaluation) -> Figure:
    """The share of the images that ran each block; the first block always runs. A bar per block, coloured by group."""
    blocks = evaluation.arch.blocks
    rates = np.ones(len(blocks))
    if evaluation.arch.gated:
        rates[1:] = evaluation.stats.execution_rates.numpy()
    figure = Figure(figsize=(min(14.0, 5.5 + 0.11 * len(blocks)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for group, plans in groupby(blocks, key=lambda plan: plan.group):
        members = list(plans)
        height, width = members[0].out_size
        axes.bar([plan.index + 1 for plan in members], [100 * rates[plan.index] for plan in members], width=0.8,
                 color=_COLORS[(group - 1) % len(_COLORS)],
                 label=f"group {group}: {members[0].out_channels} channels, {height}x{width}")
    mean = 100 * evaluation.stats.computation
    axes.axhline(mean, color="#333333", linewidth=1, linestyle="--", label=f"computation: {mean:.1f} %")
    axes.set(xlabel="residual block (the first always runs)", ylabel="executed (% of images)", ylim=(0, 102),
             xlim=(0.2, len(blocks) + 0.8))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _titled(figure, axes, "Execution rate of each block", f"{evaluation.arch}, {len(evaluation)} images")
    return figure


def skipped_by_class(evaluation: Evaluation, labels: Sequence[str]) -> Figure:
    """How many blocks were skipped, as a distribution for each class (figure 11).

    A row per class, a cell per number of skipped blocks, its colour the share of the class's images; a dot is the mean.
    Of more than 20 classes, the ten that skip the most and the ten that skip the fewest blocks on average are shown.

    Args:
        evaluation: of a data set.
        labels: the classes' names.
    """
    skipped = evaluation.arch.num_blocks - evaluation.blocks_run
    present = torch.unique(evaluation.targets).tolist()
    means = {number: skipped[evaluation.targets == number].double().mean().item() for number in present}
    shown, detail = present, f"{evaluation.arch}, {len(evaluation)} images"
    if len(present) > _ALL_CLASSES:
        ranked = sorted(present, key=lambda number: -means[number])
        shown = ranked[:_ALL_CLASSES // 2] + ranked[-_ALL_CLASSES // 2:]
        detail += f"; the {_ALL_CLASSES // 2} classes that skip the most and the fewest blocks, of {len(present)}"
    low, high = int(skipped.min()), int(skipped.max())
    shares = np.stack([np.bincount(skipped[evaluation.targets == number].numpy() - low, minlength=high - low + 1)
                       for number in shown]).astype(float)
    shares *= 100 / shares.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(min(14.0, 5.0 + 0.22 * (high - low + 1)), 1.8 + 0.26 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    cells = axes.pcolormesh(np.arange(low, high + 2) - 0.5, np.arange(len(shown) + 1) - 0.5, shares, cmap="Blues",
                            vmin=0, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.plot([means[number] for number in shown], range(len(shown)), "o", color=_COLORS[1], markersize=6,
              markeredgecolor="black", label="mean of the class")
    axes.set_yticks(range(len(shown)), [labels[number] for number in shown])
    axes.set(xlabel=f"blocks skipped (of {evaluation.arch.num_gates} with a gate)", ylabel="class")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(cells, ax=axes, label="images of the class (%)")
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    _titled(figure, axes, "Number of skipped blocks by class", detail)
    return figure


def easiest_and_hardest(evaluation: Evaluation, picture: Callable[[int], np.ndarray], labels: Sequence[str], *,
                        columns: int = 8) -> Figure:
    """The images that ran the fewest and the most blocks (figure 10), each with its class and blocks run.

    Args:
        evaluation: of a data set.
        picture: image number to pixels, uint8 ``[H, W, 3]``; see :func:`pixels`.
        labels: the classes' names.
        columns: images per row.
    """
    order = evaluation.easiest_first
    columns = min(columns, len(order))
    figure = Figure(figsize=(max(6.0, 1.35 * columns), 4.6), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    ran, blocks = evaluation.blocks_run.tolist(), evaluation.arch.num_blocks
    for row, (name, numbers) in zip(grid, (("Easiest", order[:columns]), ("Hardest", order[::-1][:columns])),
                                    strict=True):
        for axes, number in zip(row, numbers, strict=True):
            axes.imshow(picture(number), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            target, predicted = int(evaluation.targets[number]), int(evaluation.predictions[number])
            axes.set_title(_shortened(labels[target]), fontsize=10)
            verdict = f"{ran[number]} of {blocks} blocks"
            axes.set_xlabel(verdict if target == predicted else f"{verdict}\nas {_shortened(labels[predicted])}",
                            fontsize=8, color="black" if target == predicted else _WRONG)
        row[0].set_ylabel(name, fontsize=12, fontweight="bold")
    figure.suptitle("The easiest and the hardest images", fontsize=13, fontweight="bold")
    figure.supxlabel(f"{evaluation.arch}, {len(evaluation)} images; red: taken for another class", fontsize=9,
                     color=_QUIET, wrap=True)
    return figure


def routes(evaluation: Evaluation, picture: Callable[[int], np.ndarray], labels: Sequence[str], *,
           columns: int = 10) -> Figure:
    """Images from the easiest to the hardest, each over its route: a cell per residual block, dark where it ran.

    Of each number of blocks run there is one image before there is a second, so that routes of every length are seen.

    Args:
        evaluation: of a data set.
        picture: image number to pixels, uint8 ``[H, W, 3]``; see :func:`pixels`.
        labels: the classes' names.
        columns: images.
    """
    ran, blocks = evaluation.blocks_run.tolist(), evaluation.arch.num_blocks
    seen: dict[int, int] = {}
    rank = {}  # how many images with as many blocks come before
    for number in evaluation.easiest_first:
        rank[number] = seen[ran[number]] = seen.get(ran[number], -1) + 1
    chosen = sorted(evaluation.easiest_first, key=lambda number: rank[number])[:columns]
    chosen.sort(key=lambda number: ran[number])
    without_gate = torch.ones(len(evaluation), blocks - evaluation.arch.num_gates, dtype=torch.bool)  # these always run
    executed = torch.cat([without_gate, evaluation.executed.cpu()], dim=1).numpy()
    figure = Figure(figsize=(1.15 * len(chosen), 2.8), layout="constrained")
    grid = figure.subplots(2, len(chosen), squeeze=False, height_ratios=(7, 2))
    for number, (above, below) in zip(chosen, grid.T, strict=True):
        above.imshow(picture(number), interpolation="nearest")
        above.set_title(_shortened(labels[int(evaluation.predictions[number])]), fontsize=10)
        rows = np.array_split(executed[number], 2)  # in two lines, in reading order
        cells = np.zeros((2, len(rows[0])))
        for line, row in zip(cells, rows, strict=True):
            line[:len(row)] = np.where(row, 1.0, 0.25)
        below.pcolormesh(cells, cmap="Blues", vmin=0, vmax=1.2, edgecolors="white", linewidth=1.5)
        below.invert_yaxis()
        below.set_xlabel(f"{ran[number]} of {blocks}", fontsize=9)
        for axes in (above, below):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    return figure


def _shortened(label: str) -> str:
    return label if len(label) <= 16 else f"{label[:15]}…"


def pixels(image: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """A normalised image ``[3, H, W]`` back to pixels, uint8 ``[H, W, 3]``."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class TradeOff:
    """One network in :func:`accuracy_against_computation`.

    Attributes:
        name: for the legend.
        accuracy: as a fraction.
        multiply_adds: mean of an image, gates included.
        computation: the published computation percentage as a fraction.
        gated: a SkipNet; otherwise a dense network.
    """

    name: str
    accuracy: float
    multiply_adds: float
    computation: float
    gated: bool

    @classmethod
    def of(cls, name: str, evaluation: Evaluation) -> TradeOff:
        """One evaluated network."""
        return cls(name, evaluation.accuracy, evaluation.stats.multiply_adds, evaluation.stats.computation,
                   evaluation.arch.gated)


def accuracy_against_computation(networks: Sequence[TradeOff], dataset: str) -> Figure:
    """Accuracy against multiply-adds of several networks (figure 8); dense ones as squares with a line for reference.

    Args:
        networks: evaluated on the same images.
        dataset: its name, for the title.
    """
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, network in enumerate(networks):
        color = _COLORS[number % len(_COLORS)]
        if not network.gated:
            axes.axhline(100 * network.accuracy, color=color, linewidth=1, linestyle="--", zorder=1)
        # Colours repeat after a while; marker shapes repeat at another rate.
        axes.plot(network.multiply_adds / 1e6, 100 * network.accuracy, _MARKERS[number % 5] if network.gated else "s",
                  color=color, markersize=9, markeredgecolor="black", linestyle="none", zorder=2,
                  label=f"{network.name}\n{network.computation:.1%} computation" if network.gated
                  else f"{network.name}\ndense")
    axes.set(xlabel="multiply-adds per image (millions, gates included)", ylabel="accuracy (% of images)")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelspacing=1)
    _titled(figure, axes, "Accuracy against computation", dataset)
    return figure


def time_against_computation(measured: Benchmark) -> Figure:
    """What a benchmark measured: time against executed share with the proportional line, and time against batch size.

    On the left times are relative to the best dense engine's at the same batch size, so that one line is the ceiling
    of all. On the right is everything that was measured, in milliseconds per image.
    """
    figure = Figure(figsize=(11.5, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, result in enumerate(measured.results):
        for engine, marker in zip(result.engine_names, cycle(_MARKERS), strict=False):
            points = sorted((100 * each.multiply_adds_share, 100 / each.timing.speedup_over(result.best_dense))
                            for each in result.engines if each.engine == engine)
            left.plot(*zip(*points, strict=True), marker=marker, color=_COLORS[number % len(_COLORS)],
                      label=f"{engine}, batch {result.batch} (dense: {result.best})")
    end = max(100.0, *(100 * each.multiply_adds_share for result in measured.results for each in result.engines))
    left.plot([0, end], [0, end], color=_QUIET, linestyle="--", linewidth=1, label="ceiling: time in proportion")
    left.set(xlabel="executed multiply-adds (% of the dense network's)", ylabel="time (% of the best dense engine's)")
    left.set_xlim(left=0)
    left.set_ylim(bottom=0)

    lines: dict[str, list[tuple[int, float]]] = {}
    for result in measured.results:
        timings = {**result.baselines, **{each.name: each.timing for each in result.engines}}
        for name, timing in timings.items():
            lines.setdefault(name, []).append((result.batch, 1e3 * timing.median / result.batch))
    baselines = measured.results[0].baselines
    for number, (name, line) in enumerate(lines.items()):
        dashed = name in baselines
        right.plot(*zip(*sorted(line), strict=True), marker=_MARKERS[number % len(_MARKERS)], markersize=5,
                   linewidth=1 if dashed else 2, linestyle="--" if dashed else "-",
                   color=_QUIET if dashed else _COLORS[(number - len(baselines)) % len(_COLORS)], label=name)
    right.set(xlabel="batch size", ylabel="time per image (ms)", xscale="log", yscale="log")
    right.xaxis.set_major_locator(FixedLocator([result.batch for result in measured.results]))
    right.xaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_minor_locator(NullLocator())
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in (left, right):
        axes.grid(color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8)
    detail = f"{measured.arch}, {str(measured.dtype).removeprefix('torch.')}, {measured.where}"
    _titled(figure, left, "Time against executed share", detail)
    _titled(figure, right, "Time against batch size", detail)
    return figure
