"""Training: the policy gradient against exact enumeration, and whole runs of tiny networks."""

from __future__ import annotations

import _thread
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.nn import functional as F

from skipnet_rt import checkpoint
from skipnet_rt.data import DATASETS, DIGITS, Data, Pictures, digits_pictures, load_dataset
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.gate_init import open_gates, sharpen_gates, standardise_gates
from skipnet_rt.model.gates import FeedforwardGate, RNNGate
from skipnet_rt.model.network import Trace, build
from skipnet_rt.training import RECIPES, TrainConfig, TrainError, train
from skipnet_rt.training.config import SCHEDULES
from skipnet_rt.training.loop import memory_format
from skipnet_rt.training.policy_gradient import cumulative_rewards, leave_one_out, objective_loss, policy_loss

TINY = SkipNetArch(stem="cifar", block="basic", depths=(2, 1, 1), widths=(4, 8, 8), gate="rnn")
QUICK = dict(arch=TINY, supervised_epochs=1, reinforce_epochs=1, supervised_lr=0.05, warmup_steps=0,
             policy_warmup_epochs=0)


@pytest.fixture(scope="module")
def few_digits():
    """Digits with 128 pictures for training and 64 held out."""
    whole = load_dataset("digits")
    held_out, labels = digits_pictures(held_out=True)
    few = Data(Pictures(whole.train.pictures[:128], whole.train.labels[:128], whole.train.transform),
               Pictures(held_out[:64], labels[:64], DIGITS), whole.labels, DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", lambda root: few)
        yield few


# The policy gradient ------------------------------------------------------------------------------------------------

def test_cumulative_rewards_by_hand():
    actions, loss = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([2.0, 0.5])
    got = cumulative_rewards(actions, loss, alpha=0.3, gamma=0.5)
    # r = 0.1 for a skip; from the last gate back: r3 - L/2, r2 + R3/2, r1 + R2/2
    torch.testing.assert_close(got, torch.tensor([[-0.175, -0.35, -0.9], [0.0375, -0.125, -0.25]]))


def test_without_discount_the_first_gate_is_paid_the_whole_objective():
    torch.manual_seed(0)
    actions, loss = torch.bernoulli(torch.full((5, 7), 0.5)), torch.rand(5)
    got = cumulative_rewards(actions, loss, alpha=0.7, gamma=1.0)
    torch.testing.assert_close(got[:, 0], 0.1 * (1 - actions).sum(1) - loss)
    torch.testing.assert_close(got[:, -1], 0.1 * (1 - actions[:, -1]) - loss)


def test_leave_one_out_takes_the_mean_of_the_others():
    torch.manual_seed(0)
    rewards = torch.randn(4, 3)
    for image in range(4):
        others = torch.cat((rewards[:image], rewards[image + 1:])).mean(0)
        torch.testing.assert_close(leave_one_out(rewards)[image], rewards[image] - others)
    assert torch.equal(leave_one_out(rewards[:1]), rewards[:1])


class Toy:
    """Two or three images, two gates, the second seeing the first one's action; few enough routes to try them all."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.theta = torch.randn(images, 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.weights = torch.randn(images, 4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.labels = torch.arange(images) % 3
        self.terms = dict(alpha=0.8, gamma=1.0, rl_weight=1.0)
        self.parameters = (self.theta, self.weights)

    def trace(self, actions: torch.Tensor) -> Trace:
        """The pass in which actions ``[N, 2]`` were sampled."""
        gate_logits = torch.stack((self.theta[:, 0], self.theta[:, 1] + self.theta[:, 2] * actions[:, 0]), dim=1)
        route = (2 * actions[:, 0] + actions[:, 1]).long()
        return Trace(self.weights[torch.arange(len(route)), route], actions, gate_logits, None)

    def outcomes(self):
        """Every possible actions ``[N, 2]`` of the batch."""
        images = len(self.labels)
        for flat in itertools.product((0.0, 1.0), repeat=2 * images):
            yield torch.tensor(flat, dtype=torch.float64).view(images, 2)

    def probability(self, trace: Trace) -> torch.Tensor:
        return torch.exp(-F.binary_cross_entropy_with_logits(trace.gate_logits, trace.masks, reduction="sum"))

    def exact_gradient(self) -> torch.Tensor:
        """Of the paper's objective E[L - alpha/G sum (1 - a)], averaged over the images, by enumeration."""
        expected = torch.zeros((), dtype=torch.float64)
        for actions in self.outcomes():
            trace = self.trace(actions)
            losses = F.cross_entropy(trace.logits, self.labels, reduction="none")
            objective = losses - self.terms["alpha"] * (1 - actions).mean(1)
            expected = expected + self.probability(trace) * objective.mean()
        return flat_gradient(expected, self.parameters)

    def estimates(self, loss):
        """Probability and estimated gradient of every outcome."""
        traces = [self.trace(actions) for actions in self.outcomes()]
        return (torch.stack([self.probability(trace).detach() for trace in traces]),
                torch.stack([flat_gradient(loss(trace), self.parameters) for trace in traces]))


def flat_gradient(scalar, parameters):
    gradients = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
                      for gradient, parameter in zip(gradients, parameters, strict=True)])


@pytest.mark.parametrize("images", [1, 2, 3])
def test_the_hybrid_gradient_is_exact_in_expectation(images):
    toy = Toy(images)
    probabilities, gradients = toy.estimates(lambda trace: objective_loss("hybrid", trace, toy.labels, **toy.terms))
    torch.testing.assert_close(probabilities @ gradients, toy.exact_gradient(), atol=1e-6, rtol=1e-5)


def test_the_baseline_lowers_the_variance():
    toy = Toy(3)

    def without_baseline(trace):
        losses = F.cross_entropy(trace.logits, toy.labels, reduction="none")
        log_probabilities = -F.binary_cross_entropy_with_logits(trace.gate_logits, trace.masks, reduction="none")
        rewards = cumulative_rewards(trace.masks, losses, toy.terms["alpha"], toy.terms["gamma"])
        return losses.mean() + policy_loss(log_probabilities, rewards)

    variances = []
    for loss in (without_baseline, lambda trace: objective_loss("hybrid", trace, toy.labels, **toy.terms)):
        probabilities, gradients = toy.estimates(loss)
        mean = probabilities @ gradients
        torch.testing.assert_close(mean, toy.exact_gradient(), atol=1e-6, rtol=1e-5)
        variances.append(probabilities @ (gradients - mean).square().sum(1))
    assert variances[1] < 0.8 * variances[0]


def test_rl_weight_scales_the_gates_gradient_alone():
    toy = Toy(2)
    trace = toy.trace(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    plain, tripled = (torch.autograd.grad(
        objective_loss("hybrid", trace, toy.labels, **{**toy.terms, "rl_weight": weight}), toy.parameters,
        retain_graph=True) for weight in (1.0, 3.0))
    torch.testing.assert_close(tripled[0], 3 * plain[0])
    torch.testing.assert_close(tripled[1], plain[1])


def test_pure_reinforcement_is_exact_in_expectation_without_a_supervised_loss():
    """Per image: the objective is the probability of a wrong class less the skip reward."""
    torch.manual_seed(0)
    logits = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, -0.4]]).requires_grad_()
    gate = torch.tensor([0.2, -0.1]).requires_grad_()
    labels, alpha = torch.tensor([0, 2]), 0.5
    draws = 20_000
    repeated = labels.repeat(draws // 2)
    actions = torch.bernoulli(torch.sigmoid(gate.detach()).repeat(draws // 2))[:, None]
    trace = Trace(logits.repeat(draws // 2, 1), actions, gate.repeat(draws // 2)[:, None], None)
    loss = objective_loss("pure", trace, repeated, alpha=alpha, gamma=1.0, rl_weight=1.0)
    estimated = torch.autograd.grad(loss, (logits, gate))
    wrong = 1 - logits.softmax(1)[torch.arange(2), labels]
    exact = torch.autograd.grad((wrong - alpha * (1 - torch.sigmoid(gate))).mean(), (logits, gate))
    for got, expected in zip(estimated, exact, strict=True):
        torch.testing.assert_close(got, expected, atol=0.006, rtol=0)


# Configuration ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "message"), [
    (dict(data="mnist"), "data must be one of digits"), (dict(stages="both"), r"stages must be one of supervised\+h"),
    (dict(gate_mode="sample"), "gate_mode must be one of hard, soft"), (dict(gamma=1.5), "gamma must be from 0 to 1"),
    (dict(batch_size=0), "batch_size must be"), (dict(temperature=0.0), "temperature must be"),
    (dict(precision="int8"), "precision must be one of")])
def test_a_wrong_value_is_refused(change, message):
    with pytest.raises(TrainError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize("data", RECIPES)
def test_every_recipe_is_valid_and_its_command_short(data):
    assert TrainConfig.for_data(data).command() == f"skipnet-rt train --data {data}"


def test_the_command_names_what_differs_from_the_recipe(tmp_path):
    words = shlex.split(TrainConfig.for_data("cifar10", alpha=0.3, output=tmp_path / "a run", resume=True).command())
    assert words[2:] == ["--data", "cifar10", "--output", str(tmp_path / "a run"), "--alpha", "0.3"]


def test_schedules():
    assert [SCHEDULES["cifar"](done) for done in (0, 0.49, 0.5, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [SCHEDULES["imagenet"](done) for done in (0.24, 0.25, 0.5, 0.99)] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert [SCHEDULES["cosine"](done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("gate", ["rnn", "feedforward2"])
def test_sharpening_and_opening_gates(gate):
    torch.manual_seed(0)
    model = build(TINY.replace(gate=gate)).eval()
    images = torch.randn(4, 3, 32, 32)
    before = model.trace(images)
    sharpen_gates(model, 0.25)
    after = model.trace(images)
    torch.testing.assert_close(after.gate_logits, 4 * before.gate_logits)
    assert torch.equal(after.masks, before.masks)
    open_gates(model, 100.0)
    assert bool((model.trace(images).masks == 1).all())
    assert any(isinstance(module, (RNNGate, FeedforwardGate)) for module in model.modules())


def test_standardised_gates_see_unit_features_and_run_half_on_average():
    torch.manual_seed(0)
    model = build(TINY)
    open_gates(model, 5.0)  # all blocks run, before and while the features are measured
    images = torch.randn(64, 3, 32, 32)
    spread = model.eval().trace(images).gate_logits[:, :3].std(0)
    standardise_gates(model, images)
    embedded = []
    for plan in TINY.blocks:
        model.gate(plan).register_forward_hook(lambda module, _, output: embedded.append(output))
    logits = model.trace(images).gate_logits[:, :3]
    torch.testing.assert_close(embedded[0].mean(0), torch.zeros(10), atol=1e-3, rtol=0)
    torch.testing.assert_close(embedded[0].std(0), torch.ones(10), atol=1e-3, rtol=0)
    assert bool((logits.std(0) > 2 * spread).all())
    assert abs(logits.mean().item()) < 0.2


# Whole runs ---------------------------------------------------------------------------------------------------------

def test_a_run_leaves_a_model_that_scores_what_it_says(few_digits, tmp_path):
    before = torch.get_rng_state()
    shares, epochs = [], []
    result = train(TrainConfig(**QUICK, output=str(tmp_path)), on_epoch=epochs.append,
                   on_progress=lambda what, share: shares.append((what.split(":")[0], share)))
    assert torch.equal(torch.get_rng_state(), before)
    assert shares == [("supervised 1/2", 0.25), ("supervised 1/2", 0.5), ("hybrid 2/2", 0.75), ("hybrid 2/2", 1.0)]
    assert [words.split(":")[0] for words in epochs] == ["epoch 1/2 (supervised)", "epoch 2/2 (hybrid)"]
    assert [line["stage"] for line in result.history] == ["supervised", "hybrid"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == result.history
    model = checkpoint.load(result.path)
    images, labels = torch.stack([image for image, _ in few_digits.test]), torch.tensor(few_digits.test.labels)
    trace = model.eval().trace(images)
    training = model.card.training
    assert training["accuracy"] == pytest.approx(100 * (trace.logits.argmax(1) == labels).sum().item() / 64, abs=1e-3)
    rates = trace.masks.detach().mean(0)
    assert training["computation"] == pytest.approx(float(100 * (rates.sum() + 1) / (len(rates) + 1)), abs=1e-3)
    assert training["command"].startswith("skipnet-rt train --data digits")
    assert model.card.labels == tuple("0123456789")
    assert model.card.preprocessing == DIGITS
    assert checkpoint.load(tmp_path / "supervised.safetensors").card.training["epochs"] == 1


FOUR_EPOCHS = {**QUICK, "supervised_epochs": 2, "reinforce_epochs": 2, "policy_warmup_epochs": 1}


@pytest.fixture(scope="module")
def uninterrupted(few_digits, tmp_path_factory):
    return train(TrainConfig(**FOUR_EPOCHS, output=tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("finished", [1, 2], ids=["within a stage", "between stages"])
def test_ctrl_c_and_resume_give_bitwise_the_uninterrupted_weights(uninterrupted, tmp_path, finished):
    """Interrupted soon after an epoch is finished, in the middle of whatever it is doing."""
    config = TrainConfig(**FOUR_EPOCHS, output=tmp_path)
    state = tmp_path / "state.pt"

    def interrupt():
        seen = set()
        while len(seen) < finished:
            time.sleep(0.002)
            if state.exists():
                seen.add(state.stat().st_mtime_ns)
        _thread.interrupt_main()

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt, match=r"of 4 epochs are kept in .*resume"):
        train(config)
    watcher.join()
    assert not (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob(".*"))  # nothing half written
    with pytest.raises(TrainError, match="holds a training already"):
        train(config)
    resumed = train(dataclasses.replace(config, resume=True))
    for key, value in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    timeless = [[{**line, "seconds": 0} for line in result.history] for result in (uninterrupted, resumed)]
    assert timeless[0] == timeless[1]


def test_a_state_of_another_training_is_refused(few_digits, tmp_path):
    train(TrainConfig(**QUICK, stages="supervised", output=tmp_path))
    with pytest.raises(TrainError, match=r"another training: alpha \(was 0\.45, is 7\.0\)"):
        train(TrainConfig(**QUICK, stages="supervised", alpha=7.0, output=tmp_path, resume=True))


def test_the_same_seed_gives_the_same_weights_and_another_others(few_digits, tmp_path):
    runs = [train(TrainConfig(**QUICK, seed=seed, output=tmp_path / name)).model.state_dict()
            for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not torch.equal(runs[0]["fc.weight"], runs[2]["fc.weight"])


NARROW = """
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.training import TrainConfig, train
arch = SkipNetArch(stem="cifar", block="basic", depths=(1, 1), widths=(4, 8), gate="none")
train(TrainConfig(arch=arch, stages="supervised", supervised_epochs=1, batch_size=512, output="run"))
"""


def test_a_narrow_network_trains_as_an_avx2_processor_would(tmp_path):
    """Channels-last, oneDNN's AVX2 weight gradient of the 1x1 convolution of stride 2 writes out of bounds."""
    done = subprocess.run([sys.executable, "-c", NARROW], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("widths", "expected"), [
    ((4, 8), torch.contiguous_format), ((7, 7), torch.contiguous_format), ((8, 8), torch.channels_last),
    ((16, 32, 64), torch.channels_last), ((4,), torch.channels_last)])
def test_channels_last_unless_a_strided_shortcut_is_narrow(widths, expected):
    architecture = SkipNetArch("cifar", "basic", (1,) * len(widths), widths, "rnn")
    assert memory_format(architecture) == expected


@pytest.mark.parametrize(("alpha", "low", "high"), [(100.0, 25.0, 25.0), (-100.0, 100.0, 100.0)])
def test_reinforcement_skips_what_is_rewarded(few_digits, tmp_path, alpha, low, high):
    """So high a reward outweighs any loss: all four blocks but the first are skipped, or with its negative, run."""
    config = TrainConfig(arch=TINY, stages="hybrid", reinforce_epochs=8, reinforce_lr=0.002, alpha=alpha,
                         policy_warmup_epochs=0, temperature=1.0, final_temperature=1.0, gate_bias=0.0, rl_weight=1.0,
                         gate_start="kept", output=tmp_path)
    assert low <= train(config).card.training["computation"] <= high


@pytest.mark.parametrize("change", [
    dict(arch=TINY.replace(gate="none")), dict(arch=TINY.replace(gate="feedforward1")), dict(stages="pure"),
    dict(stages="supervised", gate_mode="soft"), dict(precision="bfloat16"), dict(stages="hybrid", workers=2)],
    ids=["dense", "feedforward", "pure", "soft", "bfloat16", "workers"])
def test_every_kind_of_training_changes_the_weights(few_digits, tmp_path, change):
    result = train(TrainConfig(**{**QUICK, **change}, output=tmp_path))
    torch.manual_seed(0)
    fresh = build(result.model.arch).state_dict()
    learned = {key for key, value in result.model.state_dict().items()
               if value.is_floating_point() and not torch.equal(value, fresh[key])}
    assert {"conv1.weight", "fc.weight", "bn1.running_mean"} <= learned
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
    if not result.model.arch.gated:
        assert result.card.training["computation"] == 100


def test_init_continues_from_a_checkpoint(few_digits, tmp_path):
    first = train(TrainConfig(**QUICK, stages="supervised", output=tmp_path / "sp"))
    still = train(TrainConfig(**{**QUICK, "reinforce_lr": 0.0}, stages="hybrid", gate_start="kept",
                              temperature=1.0, final_temperature=1.0, init=first.path, output=tmp_path / "rl"))
    for (key, value), before in zip(still.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(value, before), key


def test_networks_and_data_must_fit(few_digits, tmp_path):
    with pytest.raises(TrainError, match="digits has 10 classes and images of 32x32"):
        train(TrainConfig(arch=TINY.replace(num_classes=7), output=tmp_path))
    with pytest.raises(TrainError, match="has none"):
        train(TrainConfig(arch=TINY.replace(gate="none"), stages="pure", output=tmp_path))
    with pytest.raises(TrainError, match="no epochs"):
        train(TrainConfig(arch=TINY, supervised_epochs=0, reinforce_epochs=0, output=tmp_path))
    assert train(TrainConfig(**{**QUICK, "arch": "cifar100_rnn_gate_38"}, stages="supervised", batch_size=128,
                             output=tmp_path)).model.arch.num_classes == 10


def test_a_diverging_loss_is_told(few_digits, tmp_path):
    with pytest.raises(TrainError, match=r"the loss became .* in epoch"):
        train(TrainConfig(**{**QUICK, "supervised_lr": 1e18, "supervised_epochs": 5}, output=tmp_path))
