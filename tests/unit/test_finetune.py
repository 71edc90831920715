"""Training that begins with a ResNet: its parts by hand, and whole runs of tiny networks."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from test_training import QUICK, TINY, few_digits  # noqa: F401  # a fixture
from torch.nn import functional as F

import skipnet_rt as srt
from skipnet_rt.model.gate_init import fix_route, open_to, run_everything, standardise_gates
from skipnet_rt.model.network import build
from skipnet_rt.model.routing import RoutingStats
from skipnet_rt.training import TrainConfig, TrainError, train
from skipnet_rt.training.computation_target import TOLERANCE, ComputationTarget
from skipnet_rt.training.config import FINETUNE
from skipnet_rt.training.distillation import distilled_losses
from skipnet_rt.training.gates_alone import freeze_backbone, train_gates_alone
from skipnet_rt.training.route_diversity import decision_information

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("few_digits")]

FINE = dict(gates_epochs=1, reinforce_epochs=2, policy_warmup_epochs=1)
"""The recipe in a minimum of epochs."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense network's checkpoint, with statistics of its own."""
    torch.manual_seed(3)
    model = build(TINY.replace(gate="none"))
    model.train()(torch.randn(32, 3, 32, 32))
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    srt.save(model.eval(), path)
    return path


# Distillation --------------------------------------------------------------------------------------------------------

def test_distilled_losses_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    got = distilled_losses(logits, labels, teacher, weight=0.25, temperature=2.0)
    p, q = torch.softmax(teacher[0] / 2, 0), torch.softmax(logits[0] / 2, 0)
    first = 0.75 * math.log(1 + math.exp(-2)) + 0.25 * 4 * float((p * (p / q).log()).sum())
    torch.testing.assert_close(got, torch.tensor([first, 0.75 * math.log(1 + math.e)], dtype=torch.float64))
    plain = distilled_losses(logits, labels, teacher, weight=0.0, temperature=2.0)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, reduction="none"))


# Routes that differ --------------------------------------------------------------------------------------------------

def test_decision_information_by_hand():
    sure, torn = torch.tensor([[50.0], [-50.0]]), torch.zeros(2, 1)
    assert decision_information(sure).item() == pytest.approx(math.log(2))  # tells two images apart
    assert decision_information(torn).item() == pytest.approx(0.0, abs=1e-6)  # a coin: entropy, but no information
    assert decision_information(torch.full((5, 1), 3.0)).item() == pytest.approx(0.0, abs=1e-6)
    assert decision_information(torch.cat((sure, torn), 1)).item() == pytest.approx(math.log(2) / 2)
    assert decision_information(torch.zeros(4, 0)).item() == 0.0
    p = torch.tensor([0.9, 0.4, 0.2], dtype=torch.float64)
    entropy = torch.distributions.Bernoulli(p).entropy().mean()
    expected = torch.distributions.Bernoulli(p.mean()).entropy() - entropy
    torch.testing.assert_close(decision_information(torch.logit(p)[:, None]), expected)


def test_its_gradient_is_finite_and_parts_two_images():
    logits = torch.tensor([[0.2, 200.0, 200.0, -200.0], [-0.2, -200.0, 200.0, -200.0]], requires_grad=True)
    decision_information(logits).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] > 0 > logits.grad[1, 0]


def test_the_bonus_makes_routes_differ():
    """Two linear gates that begin open for all images."""
    torch.manual_seed(0)
    features, weights = torch.randn(64, 4), torch.full((4, 2), 0.3).requires_grad_()
    bias = torch.full((2,), 2.0, requires_grad=True)

    def entropy() -> float:
        stats = RoutingStats(TINY.replace(depths=(1, 1, 1)))
        stats.update(features @ weights + bias > 0)
        return stats.decision_entropy

    assert entropy() < 0.1
    optimizer = torch.optim.SGD([weights, bias], 1.0)
    for _ in range(100):
        optimizer.zero_grad()
        (-decision_information(features @ weights + bias)).backward()
        optimizer.step()
    assert entropy() > 0.9


def test_route_diversity_is_part_of_the_reinforced_loss(tmp_path):
    config = TrainConfig(**QUICK, stages="hybrid", output=tmp_path / "a")
    plain, with_bonus = (train(dataclasses.replace(config, route_diversity=weight, output=tmp_path / str(weight)))
                         for weight in (0.0, 10.0))
    assert with_bonus.history[0]["loss"] < plain.history[0]["loss"]


def test_decision_entropy():
    stats = RoutingStats(TINY)
    assert stats.decision_entropy == 0.0
    stats.update(torch.tensor([[True, True, False], [True, False, False], [True, True, False], [True, False, False]]))
    assert stats.decision_entropy == pytest.approx(1 / 3)
    assert RoutingStats(TINY.replace(gate="none")).decision_entropy == 0.0


# The wanted computation ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", [30.0, 60.0, 90.0])
def test_the_controller_finds_the_alpha_that_leads_to_its_target(target):
    """Gates that follow alpha late, and by a law that it does not know."""
    controller, computation, alpha = ComputationTarget(target, 0.0), 95.0, 0.0
    for _ in range(500):
        wanted = 100 * (0.1 + 0.9 / (1 + math.exp(2 * (alpha - 1.2))))
        computation += 0.05 * (wanted - computation)
        alpha = controller.alpha(computation, 1 / 500)
    assert abs(computation - target) < TOLERANCE
    assert controller.verdict(computation) is None


def test_the_controller_says_that_it_failed():
    words = ComputationTarget(45.0, 0.0).verdict(61.23)
    assert "wanted were 45 %, it is 61.2 %" in words
    assert ComputationTarget(45.0, 0.0).verdict(45 - TOLERANCE - 0.1) is not None


# Gates ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gate", ["rnn", "feedforward1", "feedforward2"])
def test_a_fixed_route_is_every_images_route(gate):
    torch.manual_seed(0)
    model, images = build(TINY.replace(gate=gate)), torch.randn(5, 3, 32, 32) * 3
    for route in ([True, False, True], [False, False, False], [False, True, True]):
        fix_route(model, route)
        assert torch.equal(model.eval().trace(images).masks, torch.tensor(route).float().expand(5, 3))
    model.train().set_gate_mode("hard").trace(images).logits.sum().backward()
    moved = [name for name, parameter in model.named_parameters() if ("gate" in name or "control" in name)
             and parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-9)]
    assert not moved  # saturated: training does not feel them
    with pytest.raises(ValueError, match="has 3 decisions, got 1"):
        fix_route(model, [True])


def test_open_to_a_share_keeps_the_order_of_the_gates():
    torch.manual_seed(0)
    model, images = build(TINY), torch.randn(32, 3, 32, 32)
    standardise_gates(model, images)
    before = model.trace(images).gate_logits[:, :3]
    open_to(model, images, 0.8)
    after = model.trace(images).gate_logits[:, :3]
    assert torch.sigmoid(after[:, 0]).mean().item() > torch.sigmoid(before[:, 0]).mean().item()
    assert torch.equal(after[:, 0].argsort(), before[:, 0].argsort())  # the first sees what no decision has changed
    assert torch.sigmoid(after).mean().item() == pytest.approx(0.8, abs=0.02)


def test_gates_alone_leave_the_backbone_bitwise():
    torch.manual_seed(0)
    model = build(TINY.replace(gate="feedforward1")).set_gate_mode("sample")
    run_everything(model, 1.0)
    freeze_backbone(model, True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1, weight_decay=0.1)
    train_gates_alone(model)
    for _ in range(2):
        optimizer.zero_grad()
        model.trace(torch.randn(8, 3, 32, 32)).gate_logits.square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if not re.match(r"group\d_gate\d", name)} == set()
    assert {"group1_gate0.linear_layer.weight", "group1_gate0.bn1.running_mean"} <= changed
    freeze_backbone(model, False)
    assert all(parameter.requires_grad for parameter in model.parameters())


# Whole runs ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(dense, few_digits, tmp_path_factory):  # noqa: F811
    """A finetuning that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.warns(UserWarning, match=r"did not reach its target: wanted were 1 %, it is [0-9.]+ %"):
        return train(TrainConfig.for_data("digits", recipe="finetune", init=dense, output=output,
                                          target_computation=1.0, **FINE))


@pytest.mark.filterwarnings("ignore:the computation did not reach")
@pytest.mark.parametrize("finished", [1, 2], ids=["gates alone", "hybrid"])
def test_finetuning_resumes_bitwise(dense, whole, tmp_path, finished):
    stopped = TrainConfig.for_data("digits", recipe="finetune", init=dense, output=tmp_path, resume=True,
                                   target_computation=1.0, **FINE)
    told = []

    def stop(words):
        told.append(words)
        if len(told) == finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=f"{finished} of 3 epochs are kept"):
        train(stopped, on_epoch=stop)
    resumed = train(stopped)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    assert [line["alpha"] for line in resumed.history] == [line["alpha"] for line in whole.history]


def test_a_finetuned_network_keeps_the_resnet_until_its_gates_are_trained(dense, whole):
    assert [line["stage"] for line in whole.history] == ["gates", "hybrid", "hybrid"]
    base, alone = srt.load(dense), srt.load(whole.path.with_name("gates.safetensors"))
    assert alone.arch.replace() == base.arch.replace(gate="rnn")
    for name, value in base.state_dict().items():
        kept = re.sub(r"^layer(\d)\.(\d)\.", r"group\1_layer\2.", name)
        assert torch.equal(alone.state_dict()[kept], value), name
        assert name.endswith("num_batches_tracked") or not torch.equal(whole.model.state_dict()[kept], value), name
    assert whole.card.training["command"].startswith("skipnet-rt train --recipe finetune --data digits")


def test_what_finetuning_needs(dense, tmp_path):
    with pytest.raises(TrainError, match=r"arch is init: name the network to begin with in init \(--init\)"):
        TrainConfig.for_data("digits", recipe="finetune")
    with pytest.raises(TrainError, match="distill_weight is above 0: name the network"):
        TrainConfig(distill_weight=0.5)
    with pytest.raises(TrainError, match="recipe must be one of scratch, finetune, got 'both'"):
        TrainConfig.for_data("digits", recipe="both")
    gated = tmp_path / "gated.safetensors"
    srt.save(build(TINY), gated)
    with pytest.raises(TrainError, match="distillation is from a dense network"):
        train(TrainConfig.for_data("digits", recipe="finetune", init=gated, output=tmp_path / "a"))
    with pytest.raises(TrainError, match="the gates' own stage trains gates"):
        train(TrainConfig(**{**QUICK, "arch": TINY.replace(gate="none")}, stages="gates+hybrid", output=tmp_path / "b"))
    with pytest.raises(TrainError, match="which does not fit"):
        train(TrainConfig(arch=TINY.replace(widths=(4, 8, 12)), init=gated, output=tmp_path / "c"))
    with pytest.raises(srt.CheckpointError, match="not the dense base of"):
        train(TrainConfig(arch=TINY.replace(widths=(4, 8, 12)), init=dense, output=tmp_path / "d"))
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(srt.CheckpointError, match=r"picture\.png: not a checkpoint"):
        train(TrainConfig.for_data("digits", recipe="finetune", init=picture, output=tmp_path / "e"))


@pytest.mark.parametrize("data", FINETUNE)
def test_the_recipes_are_valid_and_their_commands_short(data):
    config = TrainConfig.for_data(data, recipe="finetune", init="x.pth")
    assert config.command() == f"skipnet-rt train --recipe finetune --data {data} --init x.pth"


def test_a_state_of_a_version_without_these_options_is_resumed(tmp_path):
    config = TrainConfig(**QUICK, stages="supervised", output=tmp_path)
    train(config)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for key in ("alpha", "alpha_integral"):
        del state[key]
    old = {key: value for key, value in json.loads(state["config"]).items()
           if not key.startswith(("gates_", "distill_", "route_", "target_"))}
    torch.save({**state, "config": json.dumps(old)}, tmp_path / "state.pt")
    assert len(train(dataclasses.replace(config, resume=True)).history) == 1
