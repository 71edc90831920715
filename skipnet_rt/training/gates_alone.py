"""The stage in which the gates learn alone, from a backbone that stays what it is.

New gates know nothing; what they would do to the weights of a trained network in their first epochs would have to be
repaired afterwards. So weights and batch statistics are frozen until the gates know what can be skipped. It is cheap,
too: nothing has to be propagated back through the blocks.
"""

from __future__ import annotations

import re

from skipnet_rt.model.network import SkipNet


def freeze_backbone(model: SkipNet, frozen: bool) -> None:
    """Whether training leaves everything but the gates as it is."""
    for name, parameter in model.named_parameters():
        if not _of_a_gate(name):
            parameter.requires_grad_(not frozen)


def train_gates_alone(model: SkipNet) -> None:
    """Training mode for the gates; the backbone's batch normalisations use, and keep, the statistics they have."""
    model.train()
    for name, module in model.named_children():
        if not _of_a_gate(name):
            module.eval()


def _of_a_gate(name: str) -> bool:
    return re.match(r"group[0-9]+_gate[0-9]+|control", name) is not None
