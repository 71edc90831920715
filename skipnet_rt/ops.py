"""A runtime as one node for ``torch.compile`` and ``torch.export``: the operator ``skipnet_rt::run``.

A call that is being traced goes through the operator; any other goes straight to the engine, which saves the dispatch.
Operators take tensors and numbers, so a runtime's executor is named by a number, good for as long as the runtime lives
in this process: an exported program cannot be loaded in another.
"""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from skipnet_rt.engines.base import Decisions, EnginePass
from skipnet_rt.engines.executor import Executor

_executors: WeakValueDictionary[int, Executor] = WeakValueDictionary()
_numbers = itertools.count(1)

_SCHEMA = ("(Tensor images, Tensor? forced, int runtime, int num_gates)"
           " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Logits ``[N, classes]``; gate logits, probabilities and decisions ``[num_gates, N]``; the LSTM's state, twice
``[N, state_dim]``."""


def register(executor: Executor) -> int:
    """The number by which the operator finds a runtime's executor, for as long as that lives."""
    number = next(_numbers)
    _executors[number] = executor
    return number


def _executor(number: int) -> Executor:
    executor = _executors.get(number)
    if executor is None:
        raise ValueError(f"runtime {number} does not exist (any more) in this process; compile the model again")
    return executor


@torch.library.custom_op("skipnet_rt::run", mutates_args=(), schema=_SCHEMA)
def run(images: Tensor, forced: Tensor | None, runtime: int, num_gates: int) -> Results:
    """From images to logits; see :meth:`skipnet_rt.engines.base.Engine.run`.

    Args:
        images: ``[N, in_channels, H, W]`` in the runtime's dtype, on its device, contiguous.
        forced: bool ``[G, N]`` or None.
        runtime: the runtime's number.
        num_gates: gates to evaluate.
    """
    done = _executor(runtime).run(images, forced, num_gates)
    decisions = done.decisions
    return (done.logits, decisions.gate_logits, decisions.probabilities, decisions.executed, decisions.hidden,
            decisions.cell)


@run.register_fake
def _(images: Tensor, forced: Tensor | None, runtime: int, num_gates: int) -> Results:
    network = _executor(runtime).engine.network
    arch, gates, batch = network.arch, network.gate_dtype, images.shape[0]
    return (images.new_empty(batch, arch.num_classes, dtype=network.dtype),
            images.new_empty(num_gates, batch, dtype=gates), images.new_empty(num_gates, batch, dtype=gates),
            images.new_empty(num_gates, batch, dtype=torch.bool),
            images.new_empty(batch, arch.state_dim, dtype=gates), images.new_empty(batch, arch.state_dim, dtype=gates))


def as_pass(results: Results) -> EnginePass:
    """What the operator returned as an engine returns it."""
    logits, gate_logits, probabilities, executed, hidden, cell = results
    return EnginePass(logits, Decisions(gate_logits, probabilities, executed, hidden, cell, None))
