"""The paper's experiments as a script: a tiny run of all of them, interrupted once."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_training import few_digits  # noqa: F401  # a fixture

import skipnet_rt as srt

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("few_digits")]


@pytest.fixture(scope="module")
def paper():
    """The script as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "paper.py"
    specification = importlib.util.spec_from_file_location("paper", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["paper"] = module  # where dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_a_tiny_run_of_everything(paper, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    output, runs = tmp_path / "results", tmp_path / "runs"
    command = ["--output", str(output), "--runs", str(runs), "--depth", "8", "--width", "8", "--pretraining", "1",
               "--refining", "1", "--seeds", "1", "--few", "1", "--alphas", "0.5", "2"]
    train, trained = paper.train, []

    def interrupted(config, on_progress):
        if len(trained) == 3:
            raise KeyboardInterrupt("stopped")
        trained.append(config)
        return train(config, on_progress=on_progress)

    monkeypatch.setattr(paper, "train", interrupted)
    with pytest.raises(SystemExit):
        paper.main(command)
    assert "the same command goes on" in capsys.readouterr().err
    assert not output.exists()
    paper.main([*command, "--report"])
    assert "3 of 14 trainings are done" in (output / "results.md").read_text()
    monkeypatch.setattr(paper, "train", train)
    run, shares = paper.run, []
    monkeypatch.setattr(paper, "run", lambda *args: run(*args[:-1], lambda what, share: shares.append(share)))
    paper.main(command)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    results = json.loads((output / "results.json").read_text())
    runs_of = {each["experiment"]: each for each in results["runs"]}
    assert list(runs_of) == [
        "dense", "sp", "hrl", "static", "diverse", "scratch", "rl", "sp-undecided", "sp-soft", "hrl-2",
        "sp-feedforward1", "hrl-feedforward1", "sp-feedforward2", "hrl-feedforward2"]
    static, routed = runs_of["static"], runs_of["hrl"]
    assert static["decision_entropy"] == 0.0
    assert static["computation"] == pytest.approx(routed["computation"], abs=100 / 3 / 2 + 1e-6)  # to half a block
    rates: dict[bool, list[float]] = {True: [100.0], False: [0.0]}
    for rate, always in zip(routed["execution_rates"], static["execution_rates"], strict=True):
        rates[always == 100].append(rate)
    assert min(rates[True]) >= max(rates[False])
    assert results["command"].startswith("python benchmarks/paper.py --output")
    text = (output / "results.md").read_text()
    assert "14 of 14 trainings are done" in text
    assert text.count("\n| ") == 15
    assert all((output / name).stat().st_size > 5000 for name in ("trade_off.png", "strategies.png", "blocks.png"))
    model = srt.load(runs / "static" / "0" / "model.safetensors")
    assert model.card.training["command"].startswith("skipnet-rt train --data digits")


def test_a_depth_that_no_network_has(paper, tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper.main(["--output", str(tmp_path), "--depth", "9"])
    assert "--depth must be 6 n + 2, at least 8, got 9" in capsys.readouterr().err
