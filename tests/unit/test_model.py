"""The trainable network beside the published code: decisions, gradients, gate modes, return values."""

import pytest
import torch
from networks import CASES, SMALL, GoldenCase, relative_error, small_images, small_model
from torch import nn

import skipnet_rt as srt
from skipnet_rt.model.gates import decide, published_probabilities


@pytest.mark.parametrize("name", CASES)
def test_golden_cases(name):
    case = GoldenCase(name)
    gates = case.model.arch.num_gates
    with torch.no_grad():
        trace = case.model.trace(case.images)
        single = case.model.trace(case.images[:1])
    assert relative_error(trace.logits, case.logits) < 1e-6
    assert torch.equal(trace.masks.bool(), case.executed)
    assert set(trace.masks.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(trace.gate_logits[:, :gates].sigmoid().double(), case.probabilities, atol=1e-5, rtol=0)
    assert torch.equal(single.masks.bool(), case.executed[:1])


def expected_structure(name):
    """What the published forward returns for the small network of this name, batch of 3: shapes of the parts."""
    architecture = SMALL[name]
    gates = architecture.num_gates
    return {
        "rnn": ([(3,)] * gates, [(3, 1)] * (gates + 1), None),
        "rnn-reinforced": ([(3,)] * gates, [(3, 2)] * gates, None),
        "feedforward1": ([(3,)] * gates, [(3, 2)] * (gates + 1), None),
        "feedforward2": ([(3,)] * gates, [(3, 2)] * (gates + 1), None),
        "bottleneck-feedforward": ([(3,)] * gates, [(3, 2)] * (gates + 1), None),
        "bottleneck": ([(3,)] * gates, [(3,)] * gates, (1, 3, 9)),
        "imagenet-reinforced": ([(3,)] * gates, [(3,)] * gates, (1, 3, 10)),
    }[name]


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"dense"}))
def test_forward_returns_the_published_structure(name):
    model = small_model(name)
    with torch.no_grad():
        output = model(small_images(name, 3))
        logits, masks, probabilities, *hidden = output
    mask_shapes, probability_shapes, hidden_shape = expected_structure(name)
    assert isinstance(output, tuple)
    assert logits.shape == (3, model.arch.num_classes)
    assert [tuple(mask.shape) for mask in masks] == mask_shapes
    assert [tuple(p.shape) for p in probabilities] == probability_shapes
    assert [[tuple(part.shape) for part in state] for state in hidden] == (
        [] if hidden_shape is None else [[hidden_shape] * 2])


def test_a_dense_network_returns_logits():
    assert small_model("dense")(small_images("dense", 2)).shape == (2, 10)


def test_published_probabilities_say_the_same_in_every_form():
    z = torch.tensor([[-3.0, 0.5, 30.0]]).t()
    p = torch.sigmoid(z[:, 0])
    for name, as_probability in [("cifar10_rnn_gate_38", lambda x: x[:, 0]),
                                 ("cifar10_rnn_gate_rl_38", lambda x: x[:, 1]),
                                 ("imagenet_rnn_gate_50", lambda x: x),
                                 ("cifar10_feedforward_38", lambda x: x[:, 1].exp()),
                                 ("cifar10_feedforward_rl_38", lambda x: x[:, 1])]:
        torch.testing.assert_close(as_probability(published_probabilities(srt.arch(name), z)[0]), p)


def test_hard_decisions_are_exact_and_straight_through():
    z = torch.tensor([-2.0, 0.0, 1e-3, 2.0], requires_grad=True)
    mask = decide(z, "hard")
    assert mask.tolist() == [0.0, 0.0, 1.0, 1.0], "exactly 0.5 skips"
    mask.sum().backward()
    p = torch.sigmoid(z.detach())
    torch.testing.assert_close(z.grad, p * (1 - p))


def test_soft_decisions_are_probabilities_in_training_only():
    model = srt.build(SMALL["rnn"]).set_gate_mode("soft")
    images = small_images("rnn", 6)
    soft = model.train().trace(images).masks
    assert ((soft > 0) & (soft < 1)).all()
    assert set(model.eval().trace(images).masks.unique().tolist()) <= {0.0, 1.0}


def test_sampled_decisions_follow_the_probabilities_without_gradient():
    torch.manual_seed(0)
    z = torch.full((20_000,), 0.8, requires_grad=True)
    mask = decide(z, "sample")
    assert not mask.requires_grad
    assert mask.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=0.015)


def test_gate_mode_follows_the_stage_and_is_checked():
    assert srt.build(SMALL["rnn"]).gate_mode == "hard"
    assert srt.build(SMALL["rnn-reinforced"]).gate_mode == "sample"
    with pytest.raises(ValueError, match="hard, soft, sample"):
        srt.build(SMALL["rnn"]).set_gate_mode("random")


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_parameter_gets_a_gradient_in_supervised_training(name):
    torch.manual_seed(1)
    model = srt.build(SMALL[name]).set_gate_mode("hard").train()
    nn.functional.cross_entropy(model.trace(small_images(name, 8)).logits, torch.arange(8) % 7).backward()
    without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    last = model.arch.blocks[-1].gate_name
    assert {key for key in without if not key.startswith(last)} == set(), "only the last gate decides nothing"


def test_other_sizes_are_possible_through_the_architecture():
    architecture = srt.arch("cifar10_rnn_gate_38").replace(
        depths=(1, 2), widths=(4, 6), embed_dim=3, hidden_dim=5, image_size=(20, 28), num_classes=3, in_channels=1)
    model = srt.build(architecture).eval()
    logits, masks, _ = model(torch.randn(2, 1, 20, 28))
    assert logits.shape == (2, 3)
    assert len(masks) == 2
    assert model.control.rnn.weight_ih_l0.shape == (20, 3)
