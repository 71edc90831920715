"""The registry of published names, and what follows from an architecture."""

import pytest
import torch
from networks import SMALL, published_shapes

import skipnet_rt as srt
from skipnet_rt.model.arch import PUBLISHED, PUBLISHED_SPELLINGS, published_name


def test_every_published_name_is_there():
    expected = {f"{dataset}_{kind}_{depth}" for dataset in ("cifar10", "cifar100", "svhn")
                for kind in ("resnet", "rnn_gate", "rnn_gate_rl", "feedforward", "feedforward_rl")
                for depth in (38, 74, 110, 152)}
    expected |= {f"imagenet_{kind}_{depth}" for kind in ("resnet", "rnn_gate", "rnn_gate_rl")
                 for depth in (18, 34, 50, 101, 152)}
    assert set(PUBLISHED) == expected


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_networks_build(name):
    with torch.device("meta"):
        model = srt.build(name)
    assert model.arch.depth == int(name.rsplit("_", 1)[1])
    assert model.fc.out_features == {"cifar100": 100, "imagenet": 1000}.get(name.split("_")[0], 10)
    assert model.arch.num_gates == (0 if "resnet" in name else model.arch.num_blocks - 1)


@pytest.mark.parametrize("name", sorted(published_shapes()))
def test_state_dict_names_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        state = srt.build(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == published_shapes()[name]


def test_reinforced_networks_share_the_supervised_names_and_shapes():
    with torch.device("meta"):
        for name in published_shapes():
            family, depth = name.rsplit("_", 1)
            state = srt.build(f"{family}_rl_{depth}").state_dict()
            assert {key: list(value.shape) for key, value in state.items()} == published_shapes()[name]


@pytest.mark.parametrize(("spelling", "name"), sorted(PUBLISHED_SPELLINGS.items()))
def test_the_published_misspellings_are_understood(spelling, name):
    assert srt.arch(spelling) is PUBLISHED[name]


def test_feedforward_gates_by_depth():
    assert {depth: srt.arch(f"cifar10_feedforward_{depth}").gate for depth in (38, 74, 110, 152)} == {
        38: "feedforward1", 74: "feedforward1", 110: "feedforward2", 152: "feedforward2"}


def test_block_plans_of_a_bottleneck_network():
    blocks = srt.arch("imagenet_rnn_gate_50").blocks
    assert [plan.projects for plan in blocks].count(True) == 4
    assert (blocks[0].in_channels, blocks[0].out_channels, blocks[0].in_size) == (64, 256, (56, 56))
    assert (blocks[3].stride, blocks[3].in_size, blocks[3].out_size) == (2, (56, 56), (28, 28))
    assert (blocks[-1].out_channels, blocks[-1].out_size) == (2048, (7, 7))
    assert blocks[3].layer_name == "group2_layer0"


@pytest.mark.parametrize("name", sorted(SMALL))
def test_an_architecture_survives_its_dictionary(name):
    import json

    from skipnet_rt import SkipNetArch
    assert SkipNetArch.from_dict(json.loads(json.dumps(SMALL[name].to_dict()))) == SMALL[name]


def test_published_name_is_found_again():
    for name, architecture in PUBLISHED.items():
        found_name = published_name(architecture.replace())
        assert found_name == name.replace("svhn", "cifar10")


@pytest.mark.parametrize(("change", "message"), [
    ({"gate": "fisher"}, "gate must be one of"),
    ({"depths": (2, 2)}, "one entry per group"),
    ({"depths": (2, 0, 2)}, "depths must be positive"),
    ({"num_classes": 0}, "num_classes must be a positive integer"),
    ({"image_size": (32,)}, "image_size must be"),
    ({"gate": "feedforward1", "image_size": (4, 4)}, "2x2 are needed"),
])
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(srt.ArchError, match=message):
        srt.arch("cifar10_rnn_gate_38").replace(**change)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(srt.ArchError, match="cifar10_rnn_gate_110"):
        srt.build("cifar10_rnn_gate_111")
