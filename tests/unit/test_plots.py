"""The figures show what was evaluated: read back from matplotlib's artists, not from pixels."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from networks import small_images, small_model
from PIL import Image
from torch.utils.data import TensorDataset

import skipnet_rt as srt
from skipnet_rt.measure.baselines import BASELINES, MASKED
from skipnet_rt.measure.benchmark import BatchResult, Benchmark, EngineResult
from skipnet_rt.measure.clock import Timing
from skipnet_rt.measure.evaluate import Evaluation, evaluate
from skipnet_rt.model.preprocessing import CIFAR

analysis = pytest.importorskip("skipnet_rt.measure.plots", exc_type=ImportError)
Text = pytest.importorskip("matplotlib.text").Text

COUNT = 60
LABELS = [f"class {number}" for number in range(64)]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    images = small_images("rnn", COUNT)
    return evaluate(srt.compile(small_model("rnn")), TensorDataset(images, torch.arange(COUNT) % 7))


@pytest.fixture(scope="module")
def dense() -> Evaluation:
    images = small_images("dense", 4)
    return evaluate(srt.compile(small_model("dense")), TensorDataset(images, torch.arange(4)))


def benchmarked(batches: tuple[int, ...] = (1, 8, 64), engines: tuple[str, ...] = ("cpu",)) -> Benchmark:
    """Made up: dense engines take a second per batch, ours half of their share, the masked baseline three seconds."""
    def timing(seconds: float) -> Timing:
        return Timing((seconds,) * 3)

    results = tuple(BatchResult(
        batch, tuple(EngineResult(engine, share, share, timing(share / 2)) for engine in engines for share in (1, 0.5)),
        {baseline.name: timing(3 if baseline is MASKED else 1) for baseline in BASELINES}) for batch in batches)
    return Benchmark(srt.arch("cifar10_rnn_gate_110"), torch.device("cpu"), torch.float32, {}, {"threads": 2}, None, {},
                     results)


def shown_texts(figure) -> set[Text]:
    """Every text in a figure that is drawn: matplotlib keeps labels for ticks outside of the axes, too."""
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
              for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
              if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())}
    return {text for text in figure.findobj(Text) if text.get_text() and text.get_visible()} - hidden


def texts(figure) -> str:
    """Everything that is written in a figure."""
    return "\n".join(text.get_text() for text in shown_texts(figure))


def test_bars_are_execution_rates(evaluation):
    figure = analysis.execution_rates(evaluation)
    bars = sorted(figure.axes[0].patches, key=lambda bar: bar.get_x())
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(range(1, 8))
    assert [bar.get_height() for bar in bars] == pytest.approx(
        [100, *(100 * evaluation.executed.double().mean(0)).tolist()])
    assert len({bar.get_facecolor() for bar in bars}) == 3  # groups
    assert f"computation: {100 * evaluation.stats.computation:.1f} %" in texts(figure)


def test_bars_of_a_dense_network_are_full(dense):
    assert [bar.get_height() for bar in analysis.execution_rates(dense).axes[0].patches] == [100] * 6


def test_rows_are_distributions_of_skipped_blocks(evaluation):
    axes = analysis.skipped_by_class(evaluation, LABELS).axes[0]
    shares = axes.collections[0].get_array()
    skipped = 7 - evaluation.blocks_run
    numbers = np.arange(int(skipped.min()), int(skipped.max()) + 1)
    assert shares.shape == (7, len(numbers))
    assert shares.sum(axis=1).tolist() == pytest.approx([100] * 7)
    assert [label.get_text() for label in axes.get_yticklabels()] == LABELS[:7]
    means = [skipped[evaluation.targets == number].double().mean().item() for number in range(7)]
    assert (shares @ numbers / 100).tolist() == pytest.approx(means)
    assert list(axes.lines[0].get_xdata()) == pytest.approx(means)


def test_of_many_classes_the_extremes_are_shown(evaluation):
    many = replace(evaluation, targets=torch.arange(COUNT) // 2 + 10)  # 30 classes; 0 to 9 have no images
    axes = analysis.skipped_by_class(many, LABELS).axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    means = (7 - many.blocks_run).double().view(-1, 2).mean(1)
    assert len(shown) == len(set(shown)) == 20
    ranked = means.sort(descending=True).values.tolist()
    assert list(axes.lines[0].get_xdata()) == pytest.approx(ranked[:10] + ranked[-10:])
    assert [means[LABELS.index(label) - 10].item() for label in shown] == pytest.approx(ranked[:10] + ranked[-10:])


def test_captions_tell_class_blocks_and_mistake(evaluation):
    asked = []

    def picture(number):
        asked.append(number)
        return np.zeros((4, 4, 3), np.uint8)

    figure = analysis.easiest_and_hardest(evaluation, picture, LABELS, columns=5)
    order = evaluation.easiest_first
    assert asked == [*order[:5], *order[::-1][:5]]
    for axes, number in zip(figure.axes, asked, strict=True):
        target, predicted = int(evaluation.targets[number]), int(evaluation.predictions[number])
        assert axes.get_title() == LABELS[target]
        lines = [f"{int(evaluation.blocks_run[number])} of 7 blocks"]
        assert axes.get_xlabel().split("\n") == lines + [f"as {LABELS[predicted]}"] * (target != predicted)


def test_routes_are_the_blocks_that_ran(evaluation):
    """The shade of each cell; every number of blocks run is there before one is there twice."""
    asked = []

    def picture(number):
        asked.append(number)
        return np.zeros((4, 4, 3), np.uint8)

    figure = analysis.routes(evaluation, picture, LABELS, columns=6)
    ran = evaluation.blocks_run
    assert ran[asked].tolist() == sorted(ran[asked].tolist())
    assert set(ran[asked].tolist()) == set(sorted(set(ran.tolist()))[:6])
    for axes, number in zip(figure.axes[6:], asked, strict=True):
        shades = axes.collections[0].get_array().flatten()[:7]
        assert (shades == 1).tolist() == [True, *evaluation.executed[number].tolist()]
        assert axes.get_xlabel() == f"{int(ran[number])} of 7"


def test_a_dense_network_runs_everything(dense):
    figure = analysis.routes(dense, lambda number: np.zeros((4, 4, 3), np.uint8), LABELS)
    assert [axes.get_xlabel() for axes in figure.axes[4:]] == ["6 of 6"] * 4


def test_fewer_images_than_columns_and_long_labels(dense):
    labels = ["a very long label " * 3] * 10
    figure = analysis.easiest_and_hardest(dense, lambda number: np.zeros((4, 4, 3), np.uint8), labels)
    assert len(figure.axes) == 8
    assert all(len(axes.get_title()) == 16 for axes in figure.axes)


def test_points_stand_at_accuracy_and_multiply_adds(evaluation, dense):
    networks = [analysis.TradeOff.of("sparse", evaluation), analysis.TradeOff.of("full", dense)]
    figure = analysis.accuracy_against_computation(networks, "some data")
    points = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [
        (pytest.approx(each.stats.multiply_adds / 1e6), pytest.approx(100 * each.accuracy))
        for each in (evaluation, dense)]
    assert points[1].get_marker() == "s"
    assert f"sparse\n{evaluation.stats.computation:.1%} computation" in texts(figure)
    reference = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in reference] == [pytest.approx(100 * dense.accuracy)]


def test_lines_are_what_was_measured():
    left, right = analysis.time_against_computation(benchmarked((1, 8), ("cpu", "eager"))).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in left.lines}
    assert lines.pop("ceiling: time in proportion") == ([0, 100], [0, 100])
    best = benchmarked().results[0].best
    assert lines == {f"{engine}, batch {batch} (dense: {best})": ([50, 100], [25, 50])
                     for engine in ("cpu", "eager") for batch in (1, 8)}
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in right.lines}
    assert lines["masked baseline"] == ([1, 8], [3000, 375])
    assert lines["cpu, 50% executed"] == ([1, 8], [250, 31.25])
    assert len(lines) == len(BASELINES) + 4


@pytest.mark.parametrize("draw", [
    analysis.execution_rates,
    lambda evaluation: analysis.skipped_by_class(evaluation, LABELS),
    lambda evaluation: analysis.skipped_by_class(evaluation, ["a class with a really rather long name"] * 7),
    lambda evaluation: analysis.easiest_and_hardest(evaluation, lambda number: np.zeros((4, 4, 3), np.uint8), LABELS),
    lambda evaluation: analysis.routes(evaluation, lambda number: np.zeros((4, 4, 3), np.uint8), LABELS),
    lambda evaluation: analysis.accuracy_against_computation([analysis.TradeOff.of("x", evaluation)], "some data"),
    lambda evaluation: analysis.time_against_computation(benchmarked()),
    lambda evaluation: analysis.time_against_computation(benchmarked((1,), ("cpu", "eager"))),
], ids=["execution_rates", "skipped_by_class", "skipped_by_class, long names",
        "easiest_and_hardest", "routes", "accuracy_against_computation", "time_against_computation",
        "time_against_computation, one batch size"])
@pytest.mark.filterwarnings("error")  # matplotlib warns where a layout leaves no room
def test_nothing_is_cut_off_or_written_over(evaluation, draw, tmp_path):
    """No two texts of a figure overlap, and the file is a picture of a decent size."""
    figure = draw(evaluation)
    path = analysis.save(figure, tmp_path / "figure.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent().shrunk(0.9, 0.9) for text in shown_texts(figure)}
    assert [(one.get_text(), other.get_text()) for one, other in combinations(boxes, 2)
            if boxes[one].overlaps(boxes[other])] == []


def test_pixels_undo_the_normalisation():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert np.array_equal(analysis.pixels(CIFAR(picture), CIFAR), np.asarray(picture))
