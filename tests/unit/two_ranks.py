"""What each of two ranks does for test_distributed.py: run by torchrun, or as two processes that meet at a file.

    two_ranks.py everything FOLDER RUN    FOLDER/rankR.pt: what every scenario gave; then the run ends with an error
    two_ranks.py dies FOLDER RUN RANK     a training in RUN, in which rank 1 is killed after two of four epochs
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed, nn

from skipnet_rt.cli.app import main
from skipnet_rt.data import DATASETS, DIGITS, Data, DataError, Pictures, augment_digit, digits_pictures
from skipnet_rt.model import network
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.training import TrainConfig, TrainError, train
from skipnet_rt.training.distributed import ALONE, Ranks, place
from skipnet_rt.training.loop import _Meter, _Run

TINY = SkipNetArch(stem="cifar", block="basic", depths=(2, 1, 1), widths=(4, 8, 8), gate="rnn")
FOUR_EPOCHS = dict(arch=TINY, supervised_epochs=2, reinforce_epochs=2, supervised_lr=0.05, warmup_steps=0,
                   policy_warmup_epochs=1, batch_size=16)


def few_digits(images: int, transform=None) -> Data:
    """Digits with so many for training and 33 held out."""
    train, labels = digits_pictures(held_out=False)
    held_out, held_out_labels = digits_pictures(held_out=True)
    return Data(Pictures(train[:images], labels[:images], transform or (lambda digit: DIGITS(augment_digit(digit)))),
                Pictures(held_out[:33], held_out_labels[:33], DIGITS), tuple("0123456789"), DIGITS)


class Forced:
    """Takes the gates' place: the actions ``[N, G]`` of N images, which pass in any number of batches."""

    def __init__(self, actions: torch.Tensor) -> None:
        self.actions, self.first, self.gate = actions, 0, 0

    def __call__(self, logit: torch.Tensor, mode: str) -> torch.Tensor:
        taken = self.actions[self.first:self.first + len(logit), self.gate]
        self.gate = (self.gate + 1) % self.actions.shape[1]
        self.first += len(logit) * (self.gate == 0)
        return taken


def gradients(ranks: Ranks, objective: str, gate: str, accumulate: int, size: int,
              parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a step for a batch of this size adds up, part by part, by name: of images, labels and forced actions."""
    config = TrainConfig(arch=TINY.replace(gate=gate), batch_size=16, accumulate=accumulate)
    run = _Run(config, few_digits(16), ranks)
    run.begin(next(stage for stage in run.stages if stage.objective == objective))
    run.model.double()
    for module in run.model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    run.traced = ranks.wrapped(run.model)
    decide = network.decide
    for images, labels, actions in parts:
        network.decide = Forced(actions) if objective == "hybrid" else decide
        run._add_gradients(objective, 0.7, images, labels, size, _Meter(TINY.num_gates))
    network.decide = decide
    return {name: parameter.grad for name, parameter in run.model.named_parameters() if parameter.grad is not None}


def gradient_errors(ranks: Ranks, objective: str, gate: str, accumulate: int, size: int) -> dict[str, float]:
    """How far the ranks' gradients are from one process's, relative to the largest of the parameter's."""
    torch.manual_seed(size)
    images, labels = torch.randn(size, 3, 32, 32, dtype=torch.float64), torch.randint(10, (size,))
    actions = torch.randint(2, (size, TINY.num_gates)).double()

    def of(rows: torch.Tensor):
        return images[rows], labels[rows], actions[rows]

    shares = [torch.arange(size)[rank::2] for rank in range(2)]
    got = gradients(ranks, objective, gate, accumulate, size, [of(shares[ranks.rank])])
    joined = [torch.arange(size)]
    if objective == "hybrid" and accumulate > 1:  # the baseline is a piece's own
        pieces = min(accumulate, size // 2)
        split = [share.tensor_split(pieces) for share in shares]
        joined = [torch.cat(together) for together in zip(*split, strict=True)]
    expected = gradients(ALONE, objective, gate, 1, size, [of(rows) for rows in joined])
    assert got.keys() == expected.keys()
    assert "conv1.weight" in got
    assert not any(name.startswith("group3_gate0") for name in got)
    return {name: ((got[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in got
            if expected[name].abs().max() > 1e-12}


def failure(work) -> str:
    """The message with which it fails."""
    try:
        work()
    except (TrainError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def trained(output: Path, data: Data, **changes) -> dict:
    """A training's outcome in plain values."""
    DATASETS["digits"] = lambda root: data
    result = train(TrainConfig(**{**FOUR_EPOCHS, **changes}, output=output))
    return {"weights": result.model.state_dict(), "card": result.card.training,
            "history": [{**line, "seconds": 0} for line in result.history]}


def not_a_number(rank: int):
    """A transform that on one rank gives images of NaN."""
    return lambda picture: DIGITS(picture) * (float("nan") if place().rank == rank else 1.0)


def absent_on(rank: int) -> Data:
    if place().rank == rank:
        raise DataError("the disk is empty")
    return few_digits(8)


def everything(folder: Path, run: Path) -> None:
    ranks = place()
    outcome = {"gradients": {
        (objective, gate, accumulate, size): gradient_errors(ranks, objective, gate, accumulate, size)
        for objective, gate in (("supervised", "rnn"), ("hybrid", "rnn"), ("hybrid", "feedforward1"))
        for accumulate, size in ((1, 8), (1, 5), (2, 9), (3, 5), (2, 2))}}
    outcome["whole"] = trained(folder / "whole", few_digits(67))
    outcome["resumed"] = trained(run, few_digits(67), resume=True)
    outcome["nan"] = failure(lambda: trained(folder / "nan", few_digits(67, not_a_number(rank=1))))
    outcome["one image"] = failure(lambda: trained(folder / "few", few_digits(1)))
    outcome["small batch"] = failure(lambda: trained(folder / "small", few_digits(67), batch_size=3, accumulate=2))
    outcome["a second time"] = failure(lambda: trained(folder / "whole", few_digits(67)))
    DATASETS["digits"] = lambda root: absent_on(1)
    outcome["absent"] = failure(lambda: train(TrainConfig(**FOUR_EPOCHS, output=folder / "absent")))
    data = few_digits(8)
    DATASETS["digits"] = lambda root: data
    command = ["train", "--json", "--stages", "supervised", "--supervised-epochs", "1"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*command, "--output", str(folder / "command")])
    outcome["printed"] = printed.getvalue()
    torch.save(outcome, folder / f"rank{ranks.rank}.pt")
    distributed.barrier()
    DATASETS["digits"] = lambda root: absent_on(1)
    main([*command, "--output", str(folder / "failing")])


def dies(folder: Path, run: Path, rank: int) -> None:
    distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    save, saved = _Run.save, []

    def save_and_die(self) -> None:
        save(self)
        saved.append(1)
        if rank == 1 and len(saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    _Run.save = save_and_die
    print(failure(lambda: trained(run, few_digits(67))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, folder, run, *rank = sys.argv[1:]
    if scenario == "dies":
        dies(Path(folder), Path(run), int(rank[0]))
    else:
        distributed.init_process_group("gloo")
        everything(Path(folder), Path(run))
