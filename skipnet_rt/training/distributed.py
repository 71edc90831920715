"""The processes that train one network together: who they are, what they add up, what one of them does for all.

``torchrun`` starts them (docs/training.md) and PyTorch's DistributedDataParallel averages their gradients. Everything
else that they must agree on goes through :class:`Ranks`; alone, a process agrees with itself and nothing is sent.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from skipnet_rt.model.network import SkipNet, Trace
from skipnet_rt.training.config import TrainError

Result = TypeVar("Result")

# PyTorch 2.13 renamed it.
_BUFFERS = ("forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            else "broadcast_buffers")

_PATIENCE = 3.0  # seconds in which a rank that has failed ends


class RankError(TrainError):
    """Another rank failed, or is gone; what happened there is for that one to say."""


class _Traced(nn.Module):
    """A network whose call is its trace: DistributedDataParallel's hooks fire for calls alone."""

    def __init__(self, model: SkipNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Trace:
        return self.model.trace(images)


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, each with its rank. A method is called by all of them, in the same order.

    Attributes:
        rank: this process's number, from 0; rank 0 is the one that writes and reports.
        count: of processes, on all machines.
        local: this process's number on its machine.
        device: what it computes on.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor of this shape and dtype; it takes the tensor's place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What work gives on rank 0, for every rank; the others don't do it. If it fails there, it fails everywhere."""
        if self.count == 1:
            return work()
        outcome: list = [None, None]  # what it gave, how it failed
        failure = None
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                failure, outcome[1] = error, str(error)
        distributed.broadcast_object_list(outcome)
        _raise_together(failure, [outcome[1]])
        return outcome[0]

    def on_each(self, work: Callable[[], Result]) -> Result:
        """What work gives on each rank; if it fails on one, it fails everywhere.

        A machine's first rank does it before that machine's others do: what has to be fetched is fetched once.
        """
        if self.count == 1:
            return work()
        results = []
        for turn in (self.local == 0, self.local != 0):
            failure = None
            if turn:
                try:
                    results.append(work())
                except Exception as error:
                    failure = error
            failures: list[str | None] = [None] * self.count
            distributed.all_gather_object(failures, None if failure is None else str(failure))
            _raise_together(failure, failures)
        return results[0]

    def wrapped(self, model: SkipNet) -> nn.Module:
        """A module that traces the network and, among several ranks, averages its gradients over them.

        Wrapping hands rank 0's parameters and buffers to all. A wrapper lasts an epoch: with its second step PyTorch
        cuts the gradients into other buckets, and more than two ranks may add up what stands elsewhere in a bucket in
        another order; so a resumed epoch begins with the buckets that the uninterrupted one began with.
        """
        traced = _Traced(model)
        if self.count == 1:
            return traced
        options: dict[str, Any] = {_BUFFERS: False}  # not at each step: see average_statistics
        if self.device.type == "cuda":
            options["device_ids"] = [self.device]
        return DistributedDataParallel(traced, **options)

    def holding(self, wrapped: nn.Module, held: bool) -> AbstractContextManager[None]:
        """While it lasts, gradients are only added up on their rank, if held: more of the batch follows."""
        return wrapped.no_sync() if held and isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def synchronised(self, model: SkipNet) -> SkipNet:
        """The network with batch normalisation over the whole batch, where PyTorch has that: not on the CPU."""
        if self.count > 1 and self.device.type == "cuda":
            return cast(SkipNet, nn.SyncBatchNorm.convert_sync_batchnorm(model))  # type: ignore[no-untyped-call]
        return model

    @torch.no_grad()
    def average_statistics(self, model: SkipNet) -> None:
        """Give all ranks the mean of their running means and variances; every rank's have seen its images alone."""
        if self.count > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer.clone()) / self.count)


ALONE = Ranks()
"""A single process, on the CPU."""


def place() -> Ranks:
    """This process among the others, as PyTorch's process group or torchrun's environment says; without either, alone.

    It says nothing of the device yet, and nothing is joined.
    """
    if distributed.is_available() and distributed.is_initialized():
        rank = distributed.get_rank()
        return Ranks(rank, distributed.get_world_size(), distributed.get_node_local_rank(fallback_rank=rank))
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Ranks(rank, count, local)
    return ALONE


def own_device(name: str) -> str:
    """The device of this process, where all are told the same name: of several on a machine each has its own GPU.

    Raises:
        TrainError: one GPU is named for several processes.
    """
    here = place()
    if here.count > 1 and name.startswith("cuda:"):
        raise TrainError(f"device must be 'cuda' for {here.count} ranks, which take a GPU each, got {name!r}")
    return f"cuda:{here.local}" if here.count > 1 and name == "cuda" else name


def _raise_together(own: Exception | None, failures: Sequence[str | None]) -> None:
    """Raise this rank's failure, or say which rank's it was."""
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RankError(f"rank {rank} failed: {failure}")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process among those that train together: torchrun's, those of a process group that is there, or it alone.

    They talk through gloo, and about what is on a GPU through NCCL.

    Args:
        device: as in :class:`TrainConfig`; see :func:`own_device`.
    """
    here, own = place(), torch.device(own_device(device))
    begins = here.count > 1 and not distributed.is_initialized()
    if begins:
        if own.type == "cuda":
            torch.cuda.set_device(own)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    yield replace(here, device=own)
    # After a failure this process ends, and the others may never answer: only what went well is put away.
    if begins:
        distributed.destroy_process_group()


def lost_contact(error: RuntimeError) -> bool:
    """Whether this is what a rank sees of another's death or silence; gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def tell_launcher(error: Exception) -> None:
    """Let torchrun's last words be of the rank whose failure it was: to be called where the error is handled."""
    if place().count == 1:
        return
    if isinstance(error, RankError):
        time.sleep(_PATIENCE)  # it blames the rank that it sees end first, and ends the others itself
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def random_seed(*path: int) -> int:
    """A seed for every path, say (seed, epoch): independent random numbers, and no generator's state to be kept."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0]) >> 1
