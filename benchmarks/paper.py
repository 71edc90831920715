"""The SkipNet paper's experiments in small, each over several seeds, and two questions that the paper leaves open.

    pip install 'skipnet-rt[plots]'
    python benchmarks/paper.py --output benchmarks/results/epyc-zen5/paper

Supervised against hybrid training, accuracy against computation over alpha, hybrid training without pre-training and
pure reinforcement, hard against soft gates, the three kinds of gates. Beyond the paper: what routing by image is worth
against a static network that always runs the blocks which the SkipNet runs most, and whether routes can be made to
differ more. docs/experiments.md sets the results beside the paper's statements.

Every training is resumable: after Ctrl-C the same command goes on. Results are written when all is done, or, with
``--report``, of whatever is. ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import skipnet_rt as srt
from skipnet_rt import SkipNetArch
from skipnet_rt.cli.console import progress
from skipnet_rt.data import DATASETS, Data, load_dataset
from skipnet_rt.measure.evaluate import evaluate
from skipnet_rt.model.gate_init import fix_route
from skipnet_rt.training import TrainConfig, train
from skipnet_rt.util.atomic import replacing
from skipnet_rt.util.machine import cpu


@dataclass(frozen=True)
class Experiment:
    """One way to train, repeated over seeds.

    Attributes:
        name: of its folder.
        title: in the table.
        seeds: how many.
        changes: to the data set's recipe.
        begins: the experiment with whose network, of the same seed, it begins.
        routed: the experiment whose most-run blocks, of the same seed, are all that is ever run.
    """

    name: str
    title: str
    seeds: int
    changes: dict[str, Any] = field(default_factory=dict)
    begins: str | None = None
    routed: str | None = None


@dataclass(frozen=True)
class Plan:
    """How large the experiments are.

    Attributes:
        depth: layers of the network, 6 n + 2.
        width: channels of its first group.
        pretraining, refining: epochs of the supervised stage and of the hybrid one.
        alphas: rewards for skipping; the first is that of all experiments.
        seeds, few: repetitions of what matters most, and of the others.
        diversity: ``route_diversity`` of the experiment with it.
    """

    depth: int = 20
    width: int = 16
    pretraining: int = 12
    refining: int = 16
    alphas: tuple[float, ...] = (0.45, 0.1, 0.2, 1.0, 2.0)
    seeds: int = 5
    few: int = 3
    diversity: float = 0.1

    def arch(self, data: Data, gate: str) -> SkipNetArch:
        """The network for a data set."""
        blocks = (self.depth - 2) // 6
        return SkipNetArch("cifar", "basic", (blocks,) * 3, (self.width, 2 * self.width, 4 * self.width),
                           gate, num_classes=len(data.labels),  # type: ignore[arg-type]  # one of GateKind
                           image_size=data.preprocessing.image_size)

    def experiments(self) -> list[Experiment]:
        """Every experiment, each after those that it needs."""
        whole = self.pretraining + self.refining
        hybrid, alpha = dict(stages="hybrid"), f"alpha {self.alphas[0]:g}"
        static = dict(stages="supervised", supervised_epochs=self.refining, warmup_steps=0)
        found = [
            Experiment("dense", "dense base network", self.seeds, dict(gate="none")),
            Experiment("sp", "SP: supervised, gates begin open", self.seeds, dict(stages="supervised")),
            Experiment("hrl", f"HRL+SP: hybrid after SP, {alpha}", self.seeds, hybrid, begins="sp"),
            Experiment("static", "static: the blocks that HRL+SP runs most", self.seeds, static, "sp", "hrl"),
            Experiment("diverse", f"HRL+SP, route_diversity {self.diversity:g}", self.seeds,
                       dict(hybrid, route_diversity=self.diversity), begins="sp"),
            Experiment("scratch", f"HRL: hybrid from scratch, {alpha}", self.few,
                       dict(hybrid, reinforce_epochs=whole)),
            Experiment("rl", f"RL: no supervised loss, {alpha}", self.few, dict(stages="pure", reinforce_epochs=whole)),
            Experiment("sp-undecided", "SP, gates begin undecided", self.few, dict(stages="supervised", gate_bias=0.0)),
            Experiment("sp-soft", "SP, soft gates in training", self.few, dict(stages="supervised", gate_mode="soft")),
        ]
        found += [Experiment(f"hrl-{value:g}", f"HRL+SP, alpha {value:g}", self.few, dict(hybrid, alpha=value), "sp")
                  for value in self.alphas[1:]]
        for gate, title in (("feedforward1", "FFGate-I"), ("feedforward2", "FFGate-II")):
            found += [Experiment(f"sp-{gate}", f"SP, {title}", self.few, dict(stages="supervised", gate=gate)),
                      Experiment(f"hrl-{gate}", f"HRL+SP, {title}, {alpha}", self.few, dict(hybrid, gate=gate),
                                 begins=f"sp-{gate}")]
        return found


def config(plan: Plan, experiment: Experiment, seed: int, name: str, root: Path, data: Data, folder: Path
           ) -> TrainConfig:
    """What to train for an experiment and a seed."""
    changes = dict(experiment.changes)
    values = dict(arch=plan.arch(data, changes.pop("gate", "rnn")), supervised_epochs=plan.pretraining,
                  reinforce_epochs=plan.refining, alpha=plan.alphas[0], seed=seed, root=root, resume=True,
                  output=folder / experiment.name / str(seed))
    if experiment.begins:
        values["init"] = folder / experiment.begins / str(seed) / "model.safetensors"
    recipe = TrainConfig.for_data(name, **{**values, **changes})
    if not experiment.routed:
        return recipe
    return TrainConfig.for_data(name, **{**values, **changes, "supervised_lr": recipe.reinforce_lr,
                                         "supervised_schedule": recipe.reinforce_schedule,
                                         "init": recipe.output / "start.safetensors"})


def write_static(begin: Path, routed: Path, target: Path) -> None:
    """The network to begin with, its gates fixed to run as many blocks as another runs on average: those it runs most.

    Args:
        begin: the checkpoint to change.
        routed: the other one's ``result.json``.
        target: where to.
    """
    rates = json.loads(routed.read_text(encoding="utf-8"))["execution_rates"]
    most = sorted(range(len(rates)), key=lambda gate: -rates[gate])[:round(sum(rates) / 100)]
    model = srt.load(begin)
    fix_route(model, [gate in most for gate in range(len(rates))])
    target.parent.mkdir(parents=True, exist_ok=True)
    srt.save(model, target)


def measured(path: Path, data: Data) -> dict[str, Any]:
    """What a trained network does on the held-out images, with hard gates."""
    values = evaluate(srt.compile(srt.load(path), "eager"), data.test).to_dict()
    return {key: values[key] for key in ("accuracy", "computation", "multiply_adds_share", "distinct_routes",
                                         "decision_entropy", "execution_rates", "images")}


def run(plan: Plan, name: str, root: Path, folder: Path, on_progress: Callable[[str, float], None]) -> None:
    """Train and measure whatever is not yet there, seed by seed.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the same call goes on from the last finished epoch.
    """
    data, experiments = load_dataset(name, root), plan.experiments()
    wanted = [(experiment, seed) for seed in range(plan.seeds) for experiment in experiments if seed < experiment.seeds]
    # The first seed of everything, then all seeds of what matters most: whatever is done by then can be reported.
    wanted.sort(key=lambda each: (each[1] > 0, each[0].seeds < plan.seeds, each[1]))
    for number, (experiment, seed) in enumerate(wanted):
        place = folder / experiment.name / str(seed)
        if (place / "result.json").exists():
            continue
        settings = config(plan, experiment, seed, name, root, data, folder)
        if experiment.routed and not (place / "start.safetensors").exists():
            write_static(folder / str(experiment.begins) / str(seed) / "model.safetensors",
                         folder / experiment.routed / str(seed) / "result.json", place / "start.safetensors")

        def told(what: str, share: float, done: int = number, label: str = f"{experiment.name}, seed {seed}") -> None:
            on_progress(f"{label}: {what}", (done + share) / len(wanted))

        trained = train(settings, on_progress=told)
        with replacing(place / "result.json") as path:
            path.write_text(json.dumps({"experiment": experiment.name, "seed": seed, **measured(trained.path, data)}),
                            encoding="utf-8")


def collected(plan: Plan, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results that there are, by experiment."""
    return {experiment.name: [json.loads(path.read_text(encoding="utf-8")) for seed in range(experiment.seeds)
                              if (path := folder / experiment.name / str(seed) / "result.json").exists()]
            for experiment in plan.experiments()}


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {stdev(values):.{digits}f}"


def table(plan: Plan, results: dict[str, list[dict[str, Any]]]) -> str:
    """A row per experiment, in Markdown."""
    lines = ["| | seeds | accuracy, % | computation, % | multiply-adds, % | decision entropy, bits | routes |",
             "|---|---|---|---|---|---|---|"]
    for experiment in plan.experiments():
        if runs := results[experiment.name]:
            cells = [spread([each[key] for each in runs], digits) for key, digits in (
                ("accuracy", 2), ("computation", 1), ("multiply_adds_share", 1), ("decision_entropy", 3),
                ("distinct_routes", 0))]
            lines.append(" | ".join([f"| {experiment.title}", str(len(runs)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def figures(plan: Plan, results: dict[str, list[dict[str, Any]]], images: str) -> dict[str, Any]:
    """The figures, by file name."""
    from matplotlib.figure import Figure

    def finished(figure: Any, axes: Any, title: str) -> Any:
        axes.set_title(f"{title}\n{images}", loc="left", fontsize=10)
        axes.grid(color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return figure

    def points(axes: Any, names: Sequence[str], label: str, marker: str, color: str, *, line: bool = False) -> None:
        """Every run small, every experiment's mean large."""
        runs = [results[name] for name in names if results[name]]
        for each in runs:
            axes.plot([one["computation"] for one in each], [one["accuracy"] for one in each], marker, color=color,
                      markersize=4, alpha=0.35, linestyle="none")
        means = sorted((mean(one["computation"] for one in each), mean(one["accuracy"] for one in each))
                       for each in runs)
        if means:
            axes.plot(*zip(*means, strict=True), marker=marker, color=color, markersize=8, markeredgecolor="black",
                      linestyle="-" if line else "none", label=label)

    made = {}
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    points(axes, ["hrl", *(f"hrl-{alpha:g}" for alpha in plan.alphas[1:])], "HRL+SP, over alpha", "o", "#0072B2",
           line=True)
    points(axes, ["static"], "static, the blocks run most", "s", "#D55E00")
    points(axes, ["diverse"], "HRL+SP, routes to differ", "D", "#009E73")
    points(axes, ["hrl-feedforward1"], "HRL+SP, FFGate-I", "^", "#E69F00")
    points(axes, ["hrl-feedforward2"], "HRL+SP, FFGate-II", "v", "#CC79A7")
    points(axes, ["dense"], "dense", "*", "#555555")
    axes.set(xlabel="computation (% of the blocks)", ylabel="accuracy (%)")
    made["trade_off.png"] = finished(figure, axes, "Accuracy against computation; small marks: single seeds")

    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, label, marker, color in (
            ("dense", "dense", "*", "#555555"), ("sp", "SP", "s", "#E69F00"), ("hrl", "HRL+SP", "o", "#0072B2"),
            ("scratch", "HRL from scratch", "D", "#009E73"), ("rl", "RL alone", "X", "#D55E00"),
            ("sp-soft", "SP, soft gates", "v", "#CC79A7"), ("sp-undecided", "SP, gates undecided", "^", "#56B4E9")):
        points(axes, [name], label, marker, color)
    axes.set(xlabel="computation (% of the blocks)", ylabel="accuracy (%)", xlim=(0, 105), ylim=(0, 105))
    made["strategies.png"] = finished(figure, axes, "Ways to train")

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for offset, (name, label, color) in enumerate((("hrl", "HRL+SP", "#0072B2"), ("diverse", "routes to differ",
                                                                                  "#009E73"))):
        if runs := results[name]:
            rates = [mean(values) for values in zip(*(each["execution_rates"] for each in runs), strict=True)]
            axes.bar([gate + 2 + 0.4 * offset - 0.2 for gate in range(len(rates))], rates, width=0.38, color=color,
                     label=f"{label}: {mean(each['decision_entropy'] for each in runs):.2f} bits per gate")
    axes.set(xlabel="residual block (the first always runs)", ylabel="executed (% of images)", ylim=(0, 102))
    made["blocks.png"] = finished(figure, axes, "Execution rate of each block, mean over the seeds")
    return made


def report(plan: Plan, name: str, folder: Path, output: Path, command: str) -> None:
    """Write table, figures and every single result of what is done."""
    from skipnet_rt.measure import plots

    results = collected(plan, folder)
    done, due = sum(map(len, results.values())), sum(experiment.seeds for experiment in plan.experiments())
    machine = cpu()
    where = (f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
             f"torch {torch.__version__}, float32")
    images = next((runs[0]["images"] for runs in results.values() if runs), 0)
    what = (f"SkipNet-{plan.depth}, {plan.width} channels in the first group, {plan.pretraining} + {plan.refining} "
            f"epochs; {name}, {images} held-out images")
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "results.md") as path:
        path.write_text(f"{what}.\n\nMean ± sample standard deviation over the seeds; {done} of {due} trainings are "
                        f"done. {where}.\n\n```sh\n{command}\n```\n\n{table(plan, results)}", encoding="utf-8")
    with replacing(output / "results.json") as path:
        path.write_text(json.dumps({"command": command, "machine": where, "plan": vars(plan), "data": name,
                                    "runs": [each for runs in results.values() for each in runs]}, indent=1) + "\n",
                        encoding="utf-8")
    for file, figure in figures(plan, results, what).items():
        plots.save(figure, output / file)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    usual = Plan()
    parser = argparse.ArgumentParser(description="The SkipNet paper's experiments in small.")
    parser.add_argument("--data", default="digits", choices=list(DATASETS))
    parser.add_argument("--root", type=Path, default=Path("data"), help="the data set's folder; digits needs none")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="folder of the trainings")
    parser.add_argument("--output", type=Path, required=True, help="folder of the table and the figures")
    parser.add_argument("--report", action="store_true", help="train nothing, write what is done so far")
    parser.add_argument("--alphas", type=float, nargs="+", default=usual.alphas, help="the first is that of all others")
    for option in ("depth", "width", "pretraining", "refining", "seeds", "few", "diversity"):
        default = getattr(usual, option)
        parser.add_argument(f"--{option}", type=type(default), default=default)
    options = parser.parse_args(argv)
    plan = Plan(**{name: getattr(options, name) for name in vars(usual) if name != "alphas"},
                alphas=tuple(options.alphas))
    if plan.depth < 8 or (plan.depth - 2) % 6:
        parser.error(f"--depth must be 6 n + 2, at least 8, got {plan.depth}")
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/paper.py", *(word for word in words if word != "--report")])
    if not options.report:
        try:
            with progress("loading") as on_progress:
                run(plan, options.data, options.root, options.runs, on_progress)
        except KeyboardInterrupt as stop:
            print(f"{stop}; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
    report(plan, options.data, options.runs, options.output, command)


if __name__ == "__main__":
    main()
