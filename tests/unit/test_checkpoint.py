"""Checkpoints, on real bytes: what is read, what is refused and with which words, and what is written."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import struct
import tarfile
import threading
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import safetensors.torch
import torch
from networks import CASES, SMALL, GoldenCase, published_shapes, relative_error
from torch import Tensor, nn

import skipnet_rt as srt
from skipnet_rt import SkipNet, SkipNetArch
from skipnet_rt.checkpoint import CheckpointError, convert, load, save
from skipnet_rt.model.arch import PUBLISHED, arch
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.preprocessing import CIFAR, IMAGENET, SVHN, Preprocessing

LEGACY_AND_ZIP = pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
TINY = SMALL["rnn"]
CARD = ModelCard(tuple("abcdefg"), Preprocessing((16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), resize_shorter=20),
                 {"epochs": 3, "accuracy": 97.5, "nested": {"list": [1, 2.5, None, "x"]}})


pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(name: str) -> SkipNet:
    """A small network of one's own, to change and break."""
    return copy.deepcopy(networks.small_model(name))


def write(path: Path, content: Any, *, zipped: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def state_of(model: nn.Module, prefix: str = "module.") -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.clone() for name, value in model.state_dict().items()}


def published(model: nn.Module, **entries: Any) -> dict[str, Any]:
    return {"iter": 63999, "arch": "unknown", "state_dict": state_of(model), "best_prec1": 92.75} | entries


def assert_bitwise_equal(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.numpy().tobytes() == right[name].numpy().tobytes(), name


def refusal(source: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(source)
    assert type(source).__name__ in str(caught.value) or str(source) in str(caught.value)
    return caught.value


class Foreign(nn.Module):
    """Not our class, but with any names and shapes one likes; it can hold and load them, no more."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            if leaf.startswith(("running", "num_")):
                module.register_buffer(leaf, value)
            else:
                module.register_parameter(leaf, nn.Parameter(value))


class ForeignRL(Foreign):
    """The published reinforced networks have RL in their names."""


def foreign(architecture: SkipNetArch | str, kind: type[Foreign] = Foreign) -> Foreign:
    return kind(state_of(srt.build(architecture), prefix=""))


# Published files.

@pytest.mark.parametrize("name", published_shapes())
def test_architecture_of_every_golden_state_dict(name: str) -> None:
    shapes = published_shapes()[name]
    integers = {key for key in shapes if key.endswith("num_batches_tracked")}
    model = load(Foreign({key: torch.zeros(shape, dtype=torch.int64 if key in integers else torch.float32)
                          for key, shape in shapes.items()}))
    assert model.arch is PUBLISHED[name] or model.arch == PUBLISHED[name]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("case", ["cifar10_rnn_gate_38", "cifar10_feedforward_38"])
def test_golden_logits_from_a_published_file(case: str, tmp_path: Path) -> None:
    golden = GoldenCase(next(name for name in CASES if name.startswith(case)))
    model = load(write(tmp_path / "x.pth.tar", published(golden.model, arch=case)))
    with torch.no_grad():
        trace = model.trace(golden.images)
    assert relative_error(trace.logits, golden.logits) < 1e-4
    assert torch.equal(trace.masks > 0.5, golden.executed)


@LEGACY_AND_ZIP
@pytest.mark.parametrize("prefix", ["module.", "", "module.module."])
@pytest.mark.parametrize("dropped", ["num_batches_tracked", "downsample", "_ds0", "nothing"])
def test_forms_of_the_state_dict(zipped: bool, prefix: str, dropped: str, tmp_path: Path) -> None:
    model = small_model("rnn")
    state = {name: value for name, value in state_of(model, prefix).items() if dropped not in name}
    loaded = load(write(tmp_path / "x.bin", {"state_dict": state}, zipped=zipped))
    assert_bitwise_equal(loaded, model)
    assert not loaded.training
    assert loaded.group2_ds0 is loaded.group2_layer0.downsample
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@LEGACY_AND_ZIP
@pytest.mark.parametrize("small", SMALL)
def test_bare_state_dict_tells_the_architecture(small: str, zipped: bool, tmp_path: Path) -> None:
    model = small_model(small)
    loaded = load(write(tmp_path / "x.pt", model.state_dict(), zipped=zipped))
    size = (32, 32) if model.arch.stem == "cifar" else (224, 224)
    assert loaded.arch == model.arch.replace(image_size=size, stage="supervised")
    assert loaded.card == ModelCard()
    assert_bitwise_equal(loaded, model)


@pytest.mark.parametrize(("best", "counter"), [
    (92.75, {"iter": 63999}), (torch.tensor(92.75), {"epoch": 63999}),
    (torch.tensor([92.75], dtype=torch.float64), {"epoch": torch.tensor(63999)}),
    (np.float64(92.75), {"iter": np.int64(63999)}), (np.float32(92.75), {"epoch": np.int32(63999)})])
@LEGACY_AND_ZIP
def test_summary_entries(best: Any, counter: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    content = {**counter, "arch": "mine", "state_dict": state_of(small_model("dense")), "best_prec1": best}
    training = load(write(tmp_path / "x.pth.tar", content, zipped=zipped)).card.training
    assert training == {**dict.fromkeys(counter, 63999), "arch": "mine", "best_prec1": 92.75}
    assert {type(value) for value in training.values()} == {int, str, float}


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_of_either_numpy(module: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth.tar", published(small_model("dense"), best_prec1=np.float64(92.75)))
    renamed, times = re.subn(rb"cnumpy\.\w+\.multiarray\n", b"c" + module + b"\n", path.read_bytes())
    path.write_bytes(renamed)
    assert times == 1
    assert load(path).card.training["best_prec1"] == 92.75


@pytest.mark.parametrize("value", [[92.75], torch.zeros(2), torch.zeros((), device="meta"), "92.75", None, True])
def test_summary_entries_that_are_no_numbers_are_left_out(value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth.tar", published(small_model("dense"), best_prec1=value, arch=b"bytes"))
    assert load(path).card.training == {"iter": 63999}


class _OldPickler(pickle.Pickler):
    """Tensors as PyTorch 0.3 on a GPU pickled them: ``_rebuild_tensor`` on a storage of ``torch.cuda``."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[Tensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        self.storages.append(value)
        return torch._utils._rebuild_tensor, (_Storage(len(self.storages)), 0, tuple(value.shape), value.stride())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        tensor = self.storages[value.key - 1]
        return "storage", torch.cuda.FloatStorage, str(value.key), "cuda:0", tensor.numel(), None


class _Storage:
    def __init__(self, key: int) -> None:
        self.key = key


def test_file_of_pytorch_0_3_from_a_gpu(tmp_path: Path) -> None:
    model = small_model("rnn")
    state = {name: value for name, value in state_of(model).items() if "num_batches_tracked" not in name}
    content = {"iter": 64000, "arch": "cifar10", "state_dict": state, "best_prec1": torch.tensor([93.5])}
    with open(tmp_path / "old.pth.tar", "wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True,
                                                      "type_sizes": {"short": 2, "int": 4, "long": 4}}):
            pickle.dump(header, file, protocol=2)
        pickler = _OldPickler(file)
        pickler.dump(content)
        pickle.dump([str(key + 1) for key in range(len(pickler.storages))], file, protocol=2)
        for tensor in pickler.storages:
            file.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
    assert b"torch._utils\n_rebuild_tensor\n" in (tmp_path / "old.pth.tar").read_bytes()
    loaded = load(tmp_path / "old.pth.tar")
    assert_bitwise_equal(loaded, model)
    assert loaded.card.training["best_prec1"] == 93.5


@pytest.mark.parametrize("name", ["cifar10_rnn_gate_38", "cifar10_rnn_gate_rl_38", "svhn_rnn_gate_38",
                                  "svhn_rnn_gate_rl_38"])
def test_arch_entry_tells_what_weights_cannot(name: str, tmp_path: Path) -> None:
    model = load(write(tmp_path / "x.pth.tar", published(srt.build(name), arch=name)))
    assert model.arch == PUBLISHED[name]
    svhn = name.startswith("svhn")
    assert model.card.preprocessing == (SVHN if svhn else CIFAR)
    assert model.card.labels is not None
    assert model.card.labels[3] == ("3" if svhn else "cat")


def test_published_misspellings_are_understood(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth.tar", published(srt.build("cifar10_feedforward_rl_38"),
                                                   arch="cifar10_feedfoward_rl_38"))
    assert load(path).arch.name == "cifar10_feedforward_rl_38"


@pytest.mark.parametrize("entries", [{}, {"arch": None}, {"arch": "cifar10_rnn_gat_38"}, {"arch": 38}])
def test_architecture_without_a_known_name(entries: dict[str, Any], tmp_path: Path) -> None:
    state = state_of(srt.build("cifar10_rnn_gate_38"))
    model = load(write(tmp_path / "x.pth.tar", {"state_dict": state, **entries}))
    assert model.arch == PUBLISHED["cifar10_rnn_gate_38"]
    assert model.card.preprocessing == CIFAR
    assert model.card.labels is None  # ten classes of 32x32 pixels could be anything


@pytest.mark.parametrize("claimed", ["cifar10_rnn_gate_rl_110", "cifar100_rnn_gate_38", "imagenet_rnn_gate_50",
                                     "cifar10_resnet_38", "cifar10_feedforward_38"])
def test_contradicting_arch_warns_and_the_weights_win(claimed: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth.tar", published(srt.build("cifar10_rnn_gate_38"), arch=claimed))
    with pytest.warns(UserWarning, match=rf"{claimed}.*cifar10_rnn_gate_38") as caught:
        model = load(path)
    assert caught[0].filename == __file__
    assert model.arch == PUBLISHED["cifar10_rnn_gate_38"]
    assert model.card.training["arch"] == claimed
    assert model.card.labels is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model("rnn").to(dtype)
    assert_bitwise_equal(load(write(tmp_path / "x.pt", model.state_dict())), model.float())


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", small_model("rnn").state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(path)
    assert torch.equal(torch.rand(4), expected)


# Modules.

def test_our_own_model_is_returned_as_it_is() -> None:
    model = small_model("rnn").train()
    assert load(model) is model
    assert load(nn.DataParallel(model)) is model
    assert model.training


@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("small", SMALL)
def test_foreign_module(small: str, wrap: Any) -> None:
    module = foreign(SMALL[small]).train()
    loaded = load(wrap(module))
    assert type(loaded) is SkipNet
    assert not loaded.training
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        value.zero_()  # the loaded network must have its own
    assert loaded.fc.weight.abs().sum() > 0


def test_training_stage_of_foreign_modules() -> None:
    collecting = foreign(TINY)
    collecting.saved_actions = []
    assert load(foreign(TINY)).arch.stage == "supervised"
    assert load(foreign(TINY, ForeignRL)).arch.stage == "reinforced"
    assert load(nn.DataParallel(foreign(TINY, ForeignRL))).arch.stage == "reinforced"
    assert load(collecting).arch.stage == "reinforced"
    assert load(foreign(SMALL["dense"], ForeignRL)).arch.stage == "supervised"
    assert load(foreign("cifar10_rnn_gate_38", ForeignRL)).arch.name == "cifar10_rnn_gate_rl_38"


def test_module_of_another_kind() -> None:
    error = refusal(nn.Linear(3, 2))
    assert "no residual blocks under the published names" in str(error)
    assert "'weight', 'bias'" in str(error)


@pytest.mark.parametrize("source", [None, 5, {"fc.weight": torch.zeros(1)}, b"bytes"])
def test_source_of_another_type(source: Any) -> None:
    with pytest.raises(TypeError, match=r"source must be a path or a torch\.nn\.Module, got \w+"):
        load(source)


# Hostile and broken files.

class Bomb:
    """Creates a file when unpickled by anything that runs what a pickle says."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


class ShellBomb(Bomb):
    """The same through a module that PyTorch blocks by name."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@LEGACY_AND_ZIP
@pytest.mark.parametrize("bomb", [Bomb, ShellBomb])
@pytest.mark.parametrize("place", ["whole", "state_dict", "weight", "best_prec1"])
def test_hostile_pickle_is_not_run(bomb: type[Bomb], place: str, zipped: bool, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    touched = tmp_path / "touched"
    content: Any = published(small_model("dense"))
    if place == "whole":
        content = bomb(touched)
    elif place == "weight":
        content["state_dict"]["module.fc.weight"] = bomb(touched)
    else:
        content[place] = bomb(touched)
    path = write(tmp_path / "x.pth.tar", content, zipped=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that the environment variable does not count
        error = refusal(path)
    assert re.search(r"nothing in it was run: .*(posix\.system|Path\.touch|PosixPath|pathlib|getattr)", str(error))
    assert "weights_only" not in str(error)  # no advice to load it unsafely
    assert not touched.exists()
    torch.load(path, weights_only=False)  # the bomb is a live one
    assert touched.exists()


class HiddenMethods:
    """Pickles as an ordered dictionary with attributes in place of its methods."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        hidden = dict.fromkeys(("items", "keys", "get", "copy", "__iter__", "__len__"), "hidden")
        return OrderedDict, (), hidden, None, iter(self.content.items())


@LEGACY_AND_ZIP
def test_hidden_methods_do_not_matter(zipped: bool, tmp_path: Path) -> None:
    tensor = torch.zeros(8)
    tensor.to = tensor.contiguous = "hidden"
    state = HiddenMethods(small_model("dense").state_dict() | {"bn1.bias": tensor})
    content = HiddenMethods({"state_dict": state, "arch": "mine"})
    assert load(write(tmp_path / "x.pt", content, zipped=zipped)).bn1.bias.abs().sum() == 0


@pytest.mark.parametrize("form", ["legacy", "zip", "safetensors"])
def test_truncated_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / "whole"
    if form == "safetensors":
        save(small_model("rnn"), tmp_path / "x.safetensors")
        path = tmp_path / "x.safetensors"
    else:
        write(path, published(small_model("rnn"), best_prec1=np.float64(1)), zipped=form == "zip")
    whole = path.read_bytes()
    assert load(path).arch.gate == "rnn"
    for length in {*range(40), *range(40, len(whole), len(whole) // 30), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refusal(path)


def _zip() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("hello.txt", "hello")
    return buffer.getvalue()


def _tar(name: str) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", encoding="latin1") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("content", [
    b"", b"{", b"hello, this is text\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\x80", b"\x80\x02.", b"PK\x03\x04", _zip(),
    pickle.dumps({"state_dict": {}}), pickle.dumps({}, protocol=2), _tar("hello"), _tar("\x80hello"),
    b'12345678{"a": 1}', b"\x02\0\0\0\0\0\0\0{}", json.dumps({"state_dict": {}}).encode(), bytes(1000)])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_another_kind(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    path.write_bytes(content)
    assert len(refusal(path).problems) == 1


@LEGACY_AND_ZIP
@pytest.mark.parametrize(("content", "message"), [
    ([1, 2], "content is a list, not a dictionary"),
    (torch.zeros(3), "content is a Tensor, not a dictionary"),
    ({"state_dict": [1]}, "state_dict is a list, not a dictionary"),
    ({}, "no residual blocks under the published names"),
    ({"model": {}, 5: torch.zeros(2)}, r"not a named tensor: 'model' \(dict\)\n.*5 \(Tensor\)\n.*no residual"),
    ({"group1_layer999.conv1.weight": torch.zeros(1)}, "have only 1 weights"),
    ({"group999_layer0.conv1.weight": torch.zeros(1)}, "have only 1 weights"),
    ({"group1_layer" + 9 * "9" + ".conv1.weight": torch.zeros(1)}, "no residual blocks"),
])
def test_other_contents(content: Any, message: str, zipped: bool, tmp_path: Path) -> None:
    assert re.search(message, str(refusal(write(tmp_path / "x.pt", content, zipped=zipped))))


@pytest.mark.parametrize("name", ["", "missing.pth.tar", "nul\0.pt"])
def test_paths_without_a_file(name: str, tmp_path: Path) -> None:
    assert "unreadable" in str(refusal(tmp_path / name))


# Weights that don't fit.

def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    state = state_of(small_model("rnn"))
    for name in ("group2_layer0.bn1.bias", "control.rnn.bias_ih_l0"):
        del state[f"module.{name}"]
    state["module.extra.weight"] = torch.zeros(2)
    state["module.fc.weight"] = torch.zeros(7, 5)
    state["module.group1_layer1.conv1.weight"] = torch.zeros(9, 8, 3, 3)
    state["module.fc.bias"] = torch.zeros(7, dtype=torch.int32)
    state["module.bn1.num_batches_tracked"] = torch.zeros(())
    state["module.bn1.weight"][2:5] = torch.tensor([float("nan"), float("nan"), float("inf")])
    state["module.group2_ds0.1.bias"] += 1
    assert set(refusal(write(tmp_path / "x.pt", {"state_dict": state})).problems) == {
        "type: 'fc.bias' is torch.int32, expected floating point",
        "type: 'bn1.num_batches_tracked' is torch.float32, expected an integer",
        "projection: 'group2_layer0.downsample.1.bias' has other values under its second name, groupG_dsI",
        "missing: group2_layer0.bn1.bias", "missing: control.rnn.bias_ih_l0",
        "unexpected: 'extra.weight'",
        "shape: fc.weight is [7, 5], expected [7, 16]",
        "shape: group1_layer1.conv1.weight is [9, 8, 3, 3], expected [8, 8, 3, 3]",
        "not finite: bn1.weight has 2 NaN and 1 infinite of 8 values",
    }


def test_long_lists_are_cut_in_the_message_only(tmp_path: Path) -> None:
    state = {name: value for name, value in state_of(small_model("rnn")).items() if "bn" not in name}
    state["module." + 10_000 * "x"] = torch.zeros(1)
    error = refusal(write(tmp_path / "x.pt", state))
    assert len(error.problems) > 40
    assert len(str(error).splitlines()) == 1 + 8 + 1 + 1
    assert f"missing: ... and {len(error.problems) - 9} more" in str(error)
    assert len(str(error)) < 2000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("value", [
    torch.zeros(64).expand(7, 64), torch.zeros(()).expand(10**6, 10**6), torch.zeros(7, 16, dtype=torch.int64),
    torch.zeros(7, 16, dtype=torch.bool), torch.zeros(7, 16, dtype=torch.complex64), torch.zeros(7, 16).to_sparse(),
    torch.zeros(7, 16, device="meta"), torch.zeros(7, 16).to(torch.float8_e4m3fn)])
def test_tensors_that_are_no_weights(value: Tensor, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", small_model("rnn").state_dict() | {"fc.weight": value}, zipped=True)
    assert "'fc.weight'" in str(refusal(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    state = state_of(small_model("rnn").double())
    state["module.fc.weight"][0, 0] = value
    nan = value != value
    assert refusal(write(tmp_path / "x.pt", state)).problems == (
        f"not finite: fc.weight has {int(nan)} NaN and {int(not nan)} infinite of 112 values",)


def test_large_finite_values_are_fine(tmp_path: Path) -> None:
    state = state_of(small_model("rnn"))
    state["module.fc.weight"].fill_(3e38)  # their sum is infinite
    assert torch.equal(load(write(tmp_path / "x.pt", state)).fc.weight, state["module.fc.weight"])


# Our own format.

@pytest.mark.parametrize(("small", "extension"), [
    *((small, extension) for small in SMALL for extension in (".safetensors", ".pth.tar")),
    ("rnn", ".pt"), ("rnn", ".pth"), ("rnn", ".SafeTensors")])
def test_round_trip_of_everything(small: str, extension: str, tmp_path: Path) -> None:
    model = small_model(small)
    card = ModelCard(tuple(map(str, range(model.arch.num_classes))),
                     Preprocessing(model.arch.image_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)), CARD.training)
    save(model, tmp_path / f"x{extension}", card=card)
    renamed = (tmp_path / f"x{extension}").rename(tmp_path / "no_extension")
    loaded = load(str(renamed))
    assert loaded.arch == model.arch
    assert loaded.card == card
    assert model.card == ModelCard()  # saving changes nothing
    assert_bitwise_equal(loaded, model)


def test_more_groups_than_usual_images_have_room_for(tmp_path: Path) -> None:
    model = srt.build(SkipNetArch("cifar", "basic", 6 * (1,), 6 * (4,), "feedforward1", image_size=(64, 80)))
    save(model, tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors").arch == model.arch


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    save(small_model("rnn"), tmp_path / "x.safetensors")
    names = set(safetensors.torch.load_file(tmp_path / "x.safetensors"))
    assert "group2_layer0.downsample.0.weight" in names
    assert not any("_ds" in name for name in names)


def test_safetensors_of_someone_else(tmp_path: Path) -> None:
    state = {name: value for name, value in state_of(small_model("rnn")).items() if "_ds" not in name}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    assert_bitwise_equal(load(tmp_path / "x.safetensors"), small_model("rnn"))


def _own(path: Path, *, zipped: bool | None, **changes: Any) -> Path:
    """A file of ours with other metadata; None takes an entry away, text stays as it is, all else becomes JSON."""
    metadata: dict[str, Any] = {"skipnet_rt": "1", "architecture": TINY.to_dict(), "card": CARD.to_dict(), **changes}
    strings = {name: value if isinstance(value, str) else json.dumps(value)
               for name, value in metadata.items() if value is not None}
    state = {name: value for name, value in state_of(small_model("rnn"), "").items() if "_ds" not in name}
    if zipped is None:
        safetensors.torch.save_file(state, path, strings)
        return path
    return write(path, {"state_dict": state, "skipnet_rt": strings}, zipped=zipped)


HOSTILE_METADATA = {
    "version": ({"skipnet_rt": "2"}, "version '2' is unknown"),
    "no architecture": ({"architecture": None}, "architecture must be a JSON object"),
    "no card": ({"card": None}, "card must be a JSON object"),
    "broken JSON": ({"architecture": "{"}, "architecture is no JSON"),
    "deep JSON": ({"card": 100_000 * "["}, "card is no JSON"),
    "huge number": ({"card": '{"training": {"a": ' + 5000 * "9" + "}}"}, "card is no JSON"),
    "no object": ({"architecture": "[1]"}, "architecture must be a JSON object"),
    "huge depth": ({"architecture": TINY.to_dict() | {"depths": [10**9, 2, 2]}}, "says depths"),
    "huge width": ({"architecture": TINY.to_dict() | {"widths": [10**9, 12, 16]}}, "says widths"),
    "other gate": ({"architecture": TINY.to_dict() | {"gate": "feedforward1"}}, "says gate 'feedforward1'"),
    "nonsense": ({"architecture": TINY.to_dict() | {"depths": {"a": [None]}}}, "says depths"),
    "image size": ({"architecture": TINY.to_dict() | {"image_size": [-1, 16]}}, "image_size must be positive"),
    "image size type": ({"architecture": TINY.to_dict() | {"image_size": 16}}, "incomplete architecture"),
    "stage": ({"architecture": TINY.to_dict() | {"stage": ["x"]}}, "stage must be one of"),
    "unknown entry": ({"architecture": TINY.to_dict() | {"__class__": "x"}}, "unknown architecture entries"),
    "false name": ({"architecture": TINY.to_dict() | {"name": "cifar10_rnn_gate_38"}}, "not cifar10_rnn_gate_38"),
    "no name": ({"architecture": TINY.to_dict() | {"name": [[]]}}, "has a name that is none"),
    "labels": ({"card": CARD.to_dict() | {"labels": ["a"]}}, "labels must be 7 strings"),
    "label types": ({"card": CARD.to_dict() | {"labels": [1, 2, 3, 4, 5, 6, 7]}}, "labels must be 7 strings"),
    "label string": ({"card": CARD.to_dict() | {"labels": "abcdefg"}}, "labels must be 7 strings"),
    "preprocessing": ({"card": CARD.to_dict() | {"preprocessing": [1]}}, "preprocessing must be"),
    "preprocessing entries": ({"card": CARD.to_dict() | {"preprocessing": {"x": 1}}}, "preprocessing must be"),
    "training": ({"card": CARD.to_dict() | {"training": [1]}}, "training must be a dictionary"),
    **{f"preprocessing {key}": (
        {"card": CARD.to_dict() | {"preprocessing": CARD.to_dict()["preprocessing"] | {key: value}}},
        "preprocessing must be")
       for key, value in (("image_size", [10**9, 10**9]), ("mean", [0, 0]), ("std", [1, 1, 0]), ("mean", "abc"),
                          ("std", [1, 1, float("nan")]), ("resize_shorter", -1), ("resize_shorter", "x"))},
}


@pytest.mark.parametrize("zipped", [None, False], ids=["safetensors", "torch"])
@pytest.mark.parametrize("changes_and_message", HOSTILE_METADATA.values(), ids=HOSTILE_METADATA)
def test_hostile_metadata(changes_and_message: Any, zipped: bool | None, tmp_path: Path) -> None:
    changes, message = changes_and_message
    path = _own(tmp_path / "x", zipped=zipped, **changes)
    began = time.perf_counter()
    assert message in str(refusal(path))
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("zipped", [None, False, True], ids=["safetensors", "legacy", "zip"])
def test_metadata_unchanged(zipped: bool | None, tmp_path: Path) -> None:
    model = load(_own(tmp_path / "x", zipped=zipped))
    assert (model.arch, model.card) == (TINY, CARD)


@pytest.mark.parametrize("metadata", [None, "1", [1], {5: 6}, {"skipnet_rt": 1}])
def test_metadata_of_wrong_types_in_a_torch_file(metadata: Any, tmp_path: Path) -> None:
    refusal(write(tmp_path / "x.pt", {"state_dict": state_of(small_model("rnn")), "skipnet_rt": metadata}))


# Writing.

@pytest.mark.parametrize(("name", "zipped"), [
    ("cifar10_rnn_gate_rl_38", False), ("svhn_feedforward_38", False), ("cifar10_resnet_38", True)])
def test_published_to_safetensors_to_published(name: str, zipped: bool, tmp_path: Path) -> None:
    content = published(srt.build(name), arch=name, best_prec1=np.float32(92.37), iter=torch.tensor(17))
    convert(write(tmp_path / "a.pth.tar", content, zipped=zipped), tmp_path / "b.safetensors")
    model = convert(tmp_path / "b.safetensors", tmp_path / "c.pth.tar")
    back = torch.load(tmp_path / "c.pth.tar", weights_only=True)
    assert list(back["state_dict"]) == list(content["state_dict"])
    for key, value in content["state_dict"].items():
        assert back["state_dict"][key].numpy().tobytes() == value.numpy().tobytes(), key
    assert {key: back[key] for key in ("iter", "arch", "best_prec1")} == {
        "iter": 17, "arch": name, "best_prec1": float(np.float32(92.37))}
    assert model.arch == PUBLISHED[name]


@pytest.mark.parametrize("small", ["rnn", "bottleneck", "dense"])
def test_published_code_reads_what_we_write(small: str, tmp_path: Path) -> None:
    model = small_model(small)
    save(model, tmp_path / "x.pth.tar")
    content = torch.load(tmp_path / "x.pth.tar", weights_only=True)
    assert not zipfile.is_zipfile(tmp_path / "x.pth.tar")  # its PyTorch is older than that
    counter = "iter" if model.arch.stem == "cifar" else "epoch"
    assert (content[counter], content["best_prec1"], content["arch"]) == (0, 0.0, str(model.arch))
    theirs = nn.DataParallel(foreign(model.arch))
    theirs.load_state_dict(content["state_dict"])
    assert_bitwise_equal(theirs.module, model)


@pytest.mark.parametrize("name", ["x.onnx", "x", "x.tar.gz", ".safetensors"])
def test_unknown_extension(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"use \.safetensors .* or \.pth"):
        save(small_model("rnn"), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth.tar"])
def test_nothing_is_half_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save(small_model("rnn"), path)
    before = path.read_bytes()
    broken = small_model("rnn")
    with torch.no_grad():
        broken.fc.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite: fc\.weight has 1 NaN"):
        save(broken, path)
    with pytest.raises(CheckpointError, match=r"unwritable"):
        save(small_model("rnn"), tmp_path / "missing" / name)
    (tmp_path / f"folder.{name}").mkdir()
    with pytest.raises(CheckpointError, match=r"unwritable"):
        save(small_model("rnn"), tmp_path / f"folder.{name}")
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted((name, f"folder.{name}"))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth.tar"])
def test_written_files_have_ordinary_permissions(name: str, tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    save(small_model("rnn"), tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(("card", "message"), [
    (ModelCard(labels=("a",)), "labels must be 7 strings"),
    (ModelCard(preprocessing=IMAGENET), "preprocessing must be that of images of (16, 16) pixels"),
    (ModelCard(training={"when": Path()}), "training summary must hold plain values only"),
])
def test_card_that_does_not_fit(card: ModelCard, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save(small_model("rnn"), tmp_path / "x.safetensors", card=card)


def test_model_that_left_its_architecture(tmp_path: Path) -> None:
    model = small_model("rnn")
    model.fc = nn.Linear(16, 5)
    with pytest.raises(CheckpointError, match=r"shape: fc.weight is \[5, 16\], expected \[7, 16\]"):
        save(model, tmp_path / "x.safetensors")


def test_half_precision_model_is_written_as_float32(tmp_path: Path) -> None:
    model = small_model("rnn").to(torch.bfloat16)
    save(model, tmp_path / "x.safetensors")
    assert_bitwise_equal(load(tmp_path / "x.safetensors"), model.float())


def test_convert_in_place(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth.tar", published(srt.build("cifar10_rnn_gate_38"), arch="cifar10_rnn_gate_38"))
    before = load(path)
    assert_bitwise_equal(convert(path, path), before)
    assert load(path).card == before.card


def test_labels_of_other_pictures_survive_the_published_format(tmp_path: Path) -> None:
    """Ten digits in a network called cifar10_...: without our entry they would come back as animals."""
    card = ModelCard(tuple("0123456789"), Preprocessing((32, 32), (0, 0, 0), (1, 1, 1)), {"data": "digits"})
    save(srt.build("cifar10_rnn_gate_38"), tmp_path / "x.pth.tar", card=card)
    assert load(tmp_path / "x.pth.tar").card == card
    assert load(tmp_path / "x.pth.tar").arch == arch("cifar10_rnn_gate_38")


def test_many_threads_load_numpy_scalars(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth.tar", published(small_model("dense"), best_prec1=np.float64(92.75)))
    allowed = set(torch.serialization.get_safe_globals())
    accuracies: list[Any] = []

    def load_often() -> None:
        accuracies.extend(load(path).card.training["best_prec1"] for _ in range(5))

    threads = [threading.Thread(target=load_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accuracies == 20 * [92.75]
    assert set(torch.serialization.get_safe_globals()) == allowed
