"""The stage in which the gates learn alone, from a backbone that stays what it is.

New gates know nothing; what they would do to the weights of a trained network in their first epochs would have to be
repaired afterwards. So weights and batch statistics are frozen until the gates know what can be skipped. It is cheap,
too: nothing has to be propagated back through the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from skipnet_rt.model.network import SkipNet


def freeze_backbone(model: SkipNet, frozen: bool) -> None:
    """Whether training leaves everything but the gates as it is."""
    for module in _backbone(model):
        module.requires_grad_(not frozen)


def train_gates_alone(model: SkipNet) -> None:
    """Training mode for the gates; the backbone's batch normalisations use, and keep, the statistics they have."""
    model.train()
    for module in _backbone(model):
        module.eval()


def _backbone(model: SkipNet) -> Iterator[nn.Module]:
    """What a network consists of beside its gates."""
    gates = {model.gate(plan) for plan in model.arch.blocks} if model.arch.gated else set()
    if model.arch.gate == "rnn":
        gates.add(model.control)
    return (module for module in model.children() if module not in gates)
