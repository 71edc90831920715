"""From a ResNet to a SkipNet: what is taken over, what is refused and with which words."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torchvision_schemas
from networks import SMALL, small_images, small_model
from torch import nn

import skipnet_rt as srt
from skipnet_rt import ArchError, CheckpointError, ModelCard, Preprocessing, SkipNetArch
from skipnet_rt.model.preprocessing import IMAGENET

pytestmark = pytest.mark.usefixtures("one_thread")

BOTTLENECKS = SkipNetArch("imagenet", "bottleneck", (1, 1), (8, 12), "none", num_classes=5, image_size=(32, 32))


class Theirs(nn.Module):
    """Somebody else's ResNet: our dense network's layers in another class."""

    def __init__(self, dense: srt.SkipNet) -> None:
        super().__init__()
        for name, child in dense.named_children():
            self.add_module(name, child)
        self.act = nn.ReLU()
        self.hidden = [dense]
        self.scale = 1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * self.hidden[0].trace(images).logits


def theirs(architecture: SkipNetArch = BOTTLENECKS) -> Theirs:
    torch.manual_seed(0)
    dense = srt.build(architecture)
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return Theirs(dense)


def refusal(source, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        srt.from_resnet(source, **options)
    return str(caught.value)


# What is taken over --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gate", ["rnn", "feedforward1", "feedforward2"])
def test_a_dense_base_network_gets_gates_that_are_open(gate):
    dense = copy.deepcopy(small_model("dense"))
    dense.card = ModelCard(tuple("abcdefghij"), Preprocessing((16, 16), (0.5,) * 3, (0.2,) * 3))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model = srt.from_resnet(dense, gate)
    assert model.arch.replace() == dense.arch.replace(gate=gate)
    assert model.card == dense.card
    images = small_images("dense", 6)
    trace = model.trace(images)
    assert bool((trace.masks == 1).all())
    assert torch.equal(trace.logits, dense.trace(images).logits)
    assert float(torch.sigmoid(trace.gate_logits).min()) == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())
    assert torch.equal(model.state_dict()["group2_ds0.0.weight"], before["layer2.0.downsample.0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    trace.gate_logits.sum().backward()  # and they can be trained from there
    assert all(layer.grad is not None and bool(layer.grad.abs().sum() > 0)
               for name, layer in model.named_parameters() if name.endswith(("proj.weight", "linear_layer.weight"))
               and "group3_gate1" not in name)


@pytest.mark.parametrize("kind", ["file", "torch file", "torchvision's training file", "state dict", "parallel"])
def test_every_kind_of_source_gives_the_same_network(kind, tmp_path):
    module = theirs()
    state = module.state_dict()
    if kind == "file":
        srt.save(srt.load(module), tmp_path / "x.safetensors")
    elif kind != "state dict":
        torch.save({"model": state} if "training" in kind else state, tmp_path / "x.pth")
    source = {"file": tmp_path / "x.safetensors", "state dict": state, "parallel": nn.DataParallel(module)}.get(
        kind, tmp_path / "x.pth")
    model = srt.from_resnet(source, image_size=(32, 32), embed_dim=4)
    assert model.arch == BOTTLENECKS.replace(gate="rnn", embed_dim=4)
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(model.trace(images).logits, module.eval()(images))


def test_a_module_stays_as_it_is():
    module = theirs().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    srt.from_resnet(module, image_size=(32, 32))
    assert module.training
    assert module.bn1.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_gates_standardised_over_images_tell_them_apart():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    model = srt.from_resnet(small_model("dense"), images=images)
    trace = model.trace(images)
    assert 0.3 < trace.masks.mean().item() < 0.7
    assert torch.equal(trace.masks.unique(), torch.tensor([0.0, 1.0]))


def test_published_names_are_found():
    model = srt.from_resnet(srt.build("cifar100_resnet_38"))
    assert (model.arch.name, model.arch.stage) == ("cifar100_rnn_gate_38", "supervised")
    assert srt.from_resnet(srt.build("cifar100_resnet_38"), stage="reinforced").arch.name == "cifar100_rnn_gate_rl_38"


def test_what_it_made_can_be_saved_and_run(tmp_path):
    module = theirs()
    module.pretrained_cfg = dict(architecture="resnet8", tag=None, input_size=(3, 32, 32), crop_pct=0.875,
                                 interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    srt.save(srt.from_resnet(module), tmp_path / "x.safetensors")
    model = srt.load(tmp_path / "x.safetensors")
    assert model.card.preprocessing == Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), 36, "bicubic")
    assert model.card.training == {"source": "timm resnet8"}
    result = srt.compile(model).infer(torch.randn(2, 3, 32, 32))
    assert bool(result.executed.all())


# torchvision's and timm's own ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "weights"), [("resnet18", None), ("resnet50", "IMAGENET1K_V2")])
def test_torchvision(name, weights):
    models = torchvision_schemas.torchvision().models
    torch.manual_seed(0)
    module = getattr(models, name)()
    weights = weights and models.ResNet50_Weights[weights]
    model = srt.from_resnet(module, weights=weights, image_size=(64, 64))  # small, to be quick
    assert model.arch.replace(image_size=(224, 224)) == srt.arch(f"imagenet_rnn_gate_{name[6:]}").replace()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.trace(images).logits, module.eval()(images))
    if weights:
        assert model.card.labels[:2] == ("tench", "goldfish")
        assert model.card.preprocessing == replace(IMAGENET, image_size=(64, 64), resize_shorter=66)
        assert model.card.training["source"] == "torchvision ResNet50_Weights.IMAGENET1K_V2"


def test_timm():
    timm = torchvision_schemas.timm()
    torch.manual_seed(0)
    module = timm.create_model("resnet34", num_classes=12)
    module.pretrained_cfg["input_size"] = (3, 64, 64)
    model = srt.from_resnet(module, "feedforward2")
    assert (model.arch.num_classes, model.arch.image_size) == (12, (64, 64))
    assert model.card.preprocessing.resize_shorter == int(64 / module.pretrained_cfg["crop_pct"])
    assert model.card.training["source"].startswith("timm resnet34.")


@pytest.mark.parametrize(("name", "reason"), [
    ("resnet26d", "its stem is three 3x3 convolutions"), ("seresnet18", "its blocks weigh their channels"),
    ("resnetblur18", "is a BlurPool2d; a plain ResNet has ReLU"), ("resnet26t", "its shortcuts average")])
def test_variants_of_timm_are_refused(name, reason):
    if name not in torchvision_schemas.timm().list_models(name):
        pytest.skip(f"this timm has no {name}")
    assert reason in refusal(torchvision_schemas.timm().create_model(name))


# What is refused -----------------------------------------------------------------------------------------------------

def state(**changes: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """A ResNet's state dict with weights added, or taken away."""
    weights = theirs().state_dict()
    for name, shape in changes.items():
        if shape is None:
            del weights[name]
        else:
            weights[name] = torch.zeros(shape)
    return weights


@pytest.mark.parametrize(("changes", "reason"), [
    ({"conv1.0.weight": (4, 3, 3, 3)}, "variant: its stem is three 3x3 convolutions (timm's -c, -d, -s and -t)"),
    ({"layer2.0.downsample.2.weight": (48,)}, "its shortcuts average before they convolve (ResNet-D"),
    ({"layer1.0.se.fc1.weight": (2, 8, 1, 1)}, "its blocks weigh their channels (squeeze-and-excitation"),
    ({"layer1.0.conv2.weight": (8, 2, 3, 3)}, "grouped: layer1.0.conv2.weight is [8, 2, 3, 3] (ResNeXt)"),
    ({"layer1.0.conv3.weight": (32, 16, 1, 1)}, "not a quarter as wide inside"),
    ({"layer1.0.bn1.running_mean": None}, "it is not batch normalisation"),
    ({"layer1.0.convs.0.weight": (4, 4, 3, 3)}, "(Res2Net)"),
    ({"layer1.0.conv2.fc1.weight": (4, 4, 1, 1)}, "(ResNeSt)"),
    ({"stages.0.blocks.0.norm1.weight": (4,)}, "names of another design")])
def test_variants_that_show_in_weights_are_refused_by_name(changes, reason, tmp_path):
    assert reason in refusal(state(**changes))
    torch.save(state(**changes), tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        srt.load(tmp_path / "x.pth")
    assert reason in str(caught.value)
    assert "x.pth" in str(caught.value)


def _stride_first(module: Theirs) -> None:
    module.layer2[0].conv1.stride, module.layer2[0].conv2.stride = (2, 2), (1, 1)


def _other_activation(module: Theirs) -> None:
    module.layer1[0].act1 = nn.SiLU()


def _dilated(module: Theirs) -> None:
    module.layer1[0].conv2.dilation = module.layer1[0].conv2.padding = (2, 2)


def _other_eps(module: Theirs) -> None:
    module.bn1.eps = 1e-3


def _scaled(module: Theirs) -> None:
    module.scale = 2.0


@pytest.mark.parametrize(("change", "reason"), [
    (_stride_first, "stride: layer2.0.conv1 has (2, 2), ours has (1, 1) (stride in the first 1x1 convolution"),
    (_other_activation, "layer: layer1.0.act1 is a SiLU"), (_dilated, "dilation: layer1.0.conv2 has (2, 2)"),
    (_other_eps, "eps: bn1 has 0.001, ours has 1e-05"),
    (_scaled, "computes something else than a plain ResNet of its weights: with all gates open")])
def test_variants_that_only_a_module_shows_are_refused(change, reason):
    module = theirs()
    change(module)
    assert reason in refusal(module, image_size=(32, 32))


def test_a_module_that_returns_no_logits_is_refused(monkeypatch):
    monkeypatch.setattr(Theirs, "forward", lambda self, images: {"out": images})
    assert refusal(theirs(), image_size=(32, 32)) == "Theirs: returns a dict, not logits"
    monkeypatch.setattr(Theirs, "forward", lambda self, images: images.flatten(1))
    assert "returns [2, 3072] for [2, 3, 32, 32], expected [2, 5]" in refusal(theirs(), image_size=(32, 32))


def test_what_is_no_resnet_is_refused(tmp_path):
    assert "no residual blocks" in refusal(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert "has gates already" in refusal(srt.build(SMALL["rnn"]))
    (tmp_path / "x.pth").write_bytes(b"a picture")
    assert "not a checkpoint" in refusal(tmp_path / "x.pth")
    with pytest.raises(TypeError, match=r"a path, a state dict or a torch\.nn\.Module, got int"):
        srt.from_resnet(7)  # type: ignore[arg-type]


def test_options_that_cannot_be():
    dense = small_model("dense")
    with pytest.raises(ArchError, match="num_classes, widths: not to be chosen"):
        srt.from_resnet(dense, widths=(8, 8, 8), num_classes=3)
    with pytest.raises(ArchError, match="a SkipNet has gates"):
        srt.from_resnet(dense, "none")
    with pytest.raises(ArchError, match="gate must be one of"):
        srt.from_resnet(dense, "lstm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate_bias must be above 0"):
        srt.from_resnet(dense, gate_bias=0.0)
    with pytest.raises(ValueError, match="images standardise RNNGates, not feedforward1"):
        srt.from_resnet(dense, "feedforward1", images=torch.randn(4, 3, 16, 16))
