"""A runtime as one node for ``torch.compile`` and ``torch.export``: the operator ``skipnet_rt::run``.

A call that is being traced goes through the operator; any other goes straight to the engine, which saves the dispatch.
Operators take tensors and numbers, so a runtime is named by a number, good for as long as it lives in this process: an
exported program cannot be loaded in another.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from skipnet_rt.engines.base import Decisions, EnginePass

if TYPE_CHECKING:
    from skipnet_rt.runtime import SkipNetRuntime

_runtimes: WeakValueDictionary[int, SkipNetRuntime] = WeakValueDictionary()
_numbers = itertools.count(1)

_SCHEMA = ("(Tensor images, Tensor? routing, int runtime, int num_gates)"
           " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Logits ``[N, classes]``; gate logits, probabilities and decisions ``[num_gates, N]``; the LSTM's state, twice
``[N, state_dim]``."""


def register(runtime: SkipNetRuntime) -> int:
    """The runtime's number."""
    number = next(_numbers)
    _runtimes[number] = runtime
    return number


def _runtime(number: int) -> SkipNetRuntime:
    found = _runtimes.get(number)
    if found is None:
        raise ValueError(f"runtime {number} does not exist (any more) in this process; compile the model again")
    return found


@torch.library.custom_op("skipnet_rt::run", mutates_args=(), schema=_SCHEMA)
def run(images: Tensor, routing: Tensor | None, runtime: int, num_gates: int) -> Results:
    """From images to logits; see :meth:`skipnet_rt.engines.base.Engine.run`.

    Args:
        images: ``[N, in_channels, H, W]`` in the runtime's dtype, on its device, contiguous.
        routing: bool ``[N, G]`` or None.
        runtime: the runtime's number.
        num_gates: gates to evaluate.
    """
    done = _runtime(runtime).execute(images, routing, num_gates)
    decisions = done.decisions
    return (done.logits, decisions.gate_logits, decisions.probabilities, decisions.executed, decisions.hidden,
            decisions.cell)


@run.register_fake
def _(images: Tensor, routing: Tensor | None, runtime: int, num_gates: int) -> Results:
    found = _runtime(runtime)
    batch, units = images.shape[0], found.arch.hidden_dim if found.arch.gate == "rnn" else 0
    gates = found.engine.network.gate_dtype
    return (images.new_empty(batch, found.arch.num_classes, dtype=found.dtype),
            images.new_empty(num_gates, batch, dtype=gates), images.new_empty(num_gates, batch, dtype=gates),
            images.new_empty(num_gates, batch, dtype=torch.bool), images.new_empty(batch, units, dtype=gates),
            images.new_empty(batch, units, dtype=gates))


def as_pass(results: Results) -> EnginePass:
    """What the operator returned as an engine returns it."""
    logits, gate_logits, probabilities, executed, hidden, cell = results
    return EnginePass(logits, Decisions(gate_logits, probabilities, executed, hidden, cell, None))
