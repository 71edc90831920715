"""Training by several processes: what two gloo ranks agree on, and how a run of theirs ends.

Processes start but four times for all of this: see two_ranks.py, which they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from two_ranks import FOUR_EPOCHS, TINY, few_digits

from skipnet_rt import checkpoint
from skipnet_rt.data import DATASETS
from skipnet_rt.model.gate_init import freeze_idle_gates
from skipnet_rt.model.network import build
from skipnet_rt.model.packing import pack
from skipnet_rt.training import TrainConfig, TrainError, train
from skipnet_rt.training.batches import batch_sizes, loader
from skipnet_rt.training.distributed import ALONE, Ranks, own_device, place
from skipnet_rt.training.loop import _Run

SCRIPT = Path(__file__).with_name("two_ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What the ranks have done: how those ended of which one was killed, and what came of everything else."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pair = [subprocess.Popen([sys.executable, SCRIPT, "dies", folder, folder / "killed", str(rank)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) for rank in range(2)]
    killed = [SimpleNamespace(out=process.communicate(timeout=200), status=process.returncode) for process in pair]
    left = sorted(path.name for path in (folder / "killed").iterdir())
    done = subprocess.run([*TORCHRUN, SCRIPT, "everything", folder, folder / "killed"], capture_output=True, text=True,
                          check=False, timeout=200, env=environment)
    outcomes = [folder / f"rank{rank}.pt" for rank in range(2)]
    assert all(path.exists() for path in outcomes), done.stderr
    return SimpleNamespace(folder=folder, killed=killed, left=left, done=done,
                           ranks=[torch.load(path, weights_only=False) for path in outcomes])


# Batches and their shares -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("images", "batch_size", "ranks", "expected"), [
    (67, 16, 1, [16, 16, 16, 16, 3]), (67, 16, 3, [16, 16, 16, 16, 3]), (67, 16, 4, [16, 16, 16, 19]),
    (64, 16, 4, [16] * 4), (3, 16, 2, [3]), (1, 16, 2, [1])])
def test_no_rank_goes_without_where_batches_can_be_had(images, batch_size, ranks, expected):
    assert batch_sizes(images, batch_size, ranks) == expected


class Numbers(torch.utils.data.Dataset):
    """Data whose images are their own numbers."""

    def __len__(self):
        return 67

    def __getitem__(self, index):
        return torch.tensor([index]), 0


def test_shares_differ_by_one_image_at_most_and_make_up_the_batches():
    alone = [images.flatten().tolist() for images, _ in loader(
        Numbers(), 16, shuffle=True, order=torch.Generator().manual_seed(1))]
    assert sorted(chain(*alone)) == list(range(67))
    shares = []
    for rank in range(3):
        torch.manual_seed(rank)  # their own random numbers have no say
        shares.append([images.flatten().tolist() for images, _ in loader(
            Numbers(), 16, shuffle=True, order=torch.Generator().manual_seed(1), ranks=Ranks(rank, 3))])
    for batch, *parts in zip(alone, *shares, strict=True):
        assert sorted(chain(*parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_draw_the_same_order_and_different_actions():
    drawn = []
    for rank in range(2):
        run = _Run(TrainConfig(arch=TINY), few_digits(16), Ranks(rank, 2))
        order = run._part_ways(epoch=3)
        drawn.append((torch.randperm(50, generator=order), torch.rand(50)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][1], drawn[1][1])
    assert _Run(TrainConfig(arch=TINY), few_digits(16), ALONE)._part_ways(epoch=3) is None


# Two ranks ----------------------------------------------------------------------------------------------------------

def test_two_ranks_have_the_gradients_of_one_process(two_ranks):
    """Float64, forced actions, batch normalisation in evaluation mode; unequal shares; a batch in pieces."""
    for outcome in two_ranks.ranks:
        assert len(outcome["gradients"]) == 15
        for case, errors in outcome["gradients"].items():
            assert len(errors) > 15, case
            assert max(errors.values()) < 1e-10, (case, errors)


def test_both_ranks_end_with_the_same_weights_and_the_same_history(two_ranks):
    first, second = (outcome["whole"] for outcome in two_ranks.ranks)
    for key, value in first["weights"].items():
        assert torch.equal(second["weights"][key], value), key
        assert value.isfinite().all(), key
    assert first["history"] == second["history"]
    assert [line["stage"] for line in first["history"]] == ["supervised"] * 2 + ["hybrid"] * 2


def test_one_rank_writes_and_the_held_out_images_are_counted_once(two_ranks):
    folder, outcome = two_ranks.folder / "whole", two_ranks.ranks[0]["whole"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "log.jsonl", "model.safetensors", "state.pt", "supervised.safetensors"]
    model = checkpoint.load(folder / "model.safetensors").eval()
    assert model.card.training["ranks"] == 2
    test = few_digits(67).test
    trace = model.trace(torch.stack([image for image, _ in test]))
    accuracy = 100 * (trace.logits.argmax(1) == torch.tensor(test.labels)).float().mean().item()
    assert outcome["card"]["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    for key, value in model.state_dict().items():
        assert torch.equal(outcome["weights"][key], value), key


def test_a_killed_rank_ends_the_run_and_the_last_epoch_is_kept(two_ranks):
    first, second = two_ranks.killed
    assert second.status == -9
    assert first.status == 0, first.out  # the script says how training failed
    assert "RankError: another rank died or fell silent; 2 of 4 epochs are kept in" in first.out[0]
    assert "resume goes on from there" in first.out[0]
    assert two_ranks.left == ["log.jsonl", "state.pt", "supervised.safetensors"]


def test_resumed_by_as_many_ranks_it_is_bitwise_the_uninterrupted_run(two_ranks):
    for outcome in two_ranks.ranks:
        for key, value in outcome["whole"]["weights"].items():
            assert torch.equal(outcome["resumed"]["weights"][key], value), key
        assert outcome["resumed"]["history"] == outcome["whole"]["history"]


def test_another_number_of_ranks_goes_on_and_says_what_changes(two_ranks, tmp_path, monkeypatch):
    state = torch.load(two_ranks.folder / "whole" / "state.pt", weights_only=True)
    assert state["ranks"] == 2
    torch.save(state, tmp_path / "state.pt")
    data = few_digits(67)
    monkeypatch.setitem(DATASETS, "digits", lambda root: data)
    with pytest.warns(UserWarning, match=r"begun with 2 ranks, resumed with 1: every step still takes the same images"):
        result = train(TrainConfig(**FOUR_EPOCHS, output=tmp_path, resume=True))
    assert len(result.history) == 4
    with pytest.raises(TrainError, match=r"another training: accumulate \(was 1, is 2\)"):
        train(TrainConfig(**FOUR_EPOCHS, accumulate=2, output=tmp_path, resume=True))


def test_a_nan_on_one_rank_stops_both(two_ranks):
    for outcome in two_ranks.ranks:
        assert outcome["nan"] == "TrainError: the loss became nan in epoch 1; try a lower learning rate"


def test_more_ranks_than_images_are_refused_by_all(two_ranks):
    for outcome in two_ranks.ranks:
        assert outcome["one image"] == "TrainError: more ranks than images: 2 ranks share 1 training images of digits"
        assert outcome["small batch"].startswith("TrainError: batch_size must be at least 4, an image for each of 2 ")


def test_what_fails_on_one_rank_fails_on_all_with_its_message(two_ranks):
    first, second = two_ranks.ranks
    assert first["a second time"].startswith(f"TrainError: {two_ranks.folder / 'whole'} holds a training already")
    assert second["a second time"] == first["a second time"].replace("TrainError: ", "RankError: rank 0 failed: ")
    assert first["absent"] == "RankError: rank 1 failed: the disk is empty"
    assert second["absent"] == "DataError: the disk is empty"


def test_torchrun_trains_by_the_command_line_and_ends_with_the_message_of_the_rank_that_failed(two_ranks):
    first, second = two_ranks.ranks
    assert json.loads(first["printed"])["epochs"] == 1
    assert second["printed"] == ""
    assert two_ranks.done.returncode == 1
    assert "error (rank 1 of 2): the disk is empty" in two_ranks.done.stderr
    assert "DataError: the disk is empty" in two_ranks.done.stderr.partition("Root Cause")[2]


# What a GPU would have ------------------------------------------------------------------------------------------------

def test_every_rank_has_a_gpu_of_its_own(monkeypatch):
    assert own_device("cuda:1") == "cuda:1"
    for name, value in (("RANK", 11), ("WORLD_SIZE", 16), ("LOCAL_RANK", 3), ("MASTER_ADDR", "host"),
                        ("MASTER_PORT", 29500)):
        assert place() == ALONE
        monkeypatch.setenv(name, str(value))
    assert place() == Ranks(11, 16, 3)
    assert own_device("cuda") == "cuda:3"
    assert own_device("cpu") == "cpu"
    with pytest.raises(TrainError, match="device must be 'cuda' for 16 ranks, which take a GPU each, got 'cuda:1'"):
        own_device("cuda:1")


@pytest.mark.parametrize("gate", ["rnn", "feedforward1"])
def test_synchronised_batch_normalisation_is_the_same_network(gate):
    torch.manual_seed(0)
    model = build(TINY.replace(gate=gate)).eval()
    images = torch.randn(2, 3, 32, 32)
    before, names = model.trace(images).logits, list(model.state_dict())
    assert Ranks(0, 2).synchronised(model) is model
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()), "not on the CPU"
    synchronised = Ranks(0, 2, 0, torch.device("cuda")).synchronised(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in synchronised.modules())
    assert list(synchronised.state_dict()) == names
    assert synchronised.group2_ds0 is synchronised.group2_layer0.downsample
    assert torch.equal(synchronised.eval().trace(images).logits, before)
    pack(synchronised, torch.device("cpu"), torch.float32)


def test_the_gate_that_decides_nothing_is_frozen():
    frozen = {gate: [] for gate in ("rnn", "feedforward1")}
    for gate, names in frozen.items():
        model = build(TINY.replace(gate=gate))
        freeze_idle_gates(model)
        names += {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"rnn": ["group3_gate0"], "feedforward1": ["group3_gate0"]}
