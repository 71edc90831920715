"""From a network to a file, in either format."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from skipnet_rt.checkpoint.error import CheckpointError
from skipnet_rt.checkpoint.loading import load
from skipnet_rt.checkpoint.metadata import VERSION_KEY, published_entries, to_metadata
from skipnet_rt.checkpoint.validation import (
    card_problems,
    checked_weights,
    differences,
    empty_network,
    name_problems,
    own_name,
)
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.network import SkipNet
from skipnet_rt.util.atomic import replacing

_TORCH_EXTENSIONS = (".pth", ".pt", ".tar")


def save(model: SkipNet, path: str | os.PathLike[str], *, card: ModelCard | None = None) -> None:
    """Write a network to a file, atomically: the file is there in full, or what was there before is untouched.

    ``.safetensors`` is our own format. ``.pth``, ``.pt`` and ``.tar`` (``.pth.tar``) are the published one, which
    the published code reads into its ``nn.DataParallel``: names prefixed with ``module.``, each projection under
    both of its names, in the pre-zip form that its PyTorch understands. Its ``iter`` or ``epoch``, ``arch`` and
    ``best_prec1`` come from the card's training summary. One more entry, ``skipnet_rt``, which the published code
    never looks at, keeps what the others can't hold, so that both formats can be turned into each other without loss.

    Args:
        model: the network, on any device; weights are written as float32.
        path: where to; the extension chooses the format.
        card: what to write instead of ``model.card``.

    Raises:
        CheckpointError: the extension is unknown, the file cannot be written, or :func:`load` would refuse it
            (weights that are not finite, weights or a card that don't fit the architecture).
    """
    target, where = Path(path), os.fspath(path)
    if target.suffix.lower() not in (".safetensors", *_TORCH_EXTENSIONS):
        raise CheckpointError(where, [f"extension: {target.suffix!r} is unknown; use .safetensors (our own format), "
                                      "or .pth, .pt or .pth.tar (the published one)"])
    card = model.card if card is None else card
    state, problems = checked_weights(model.state_dict())
    network = empty_network(model.arch)
    problems += differences(state, network) + name_problems(model.arch) + card_problems(card.to_dict(), model.arch)
    if problems:
        raise CheckpointError(where, problems)
    metadata = to_metadata(where, model.arch, card)
    try:
        with replacing(target) as temporary:
            if target.suffix.lower() == ".safetensors":
                import safetensors.torch

                temporary.write_bytes(safetensors.torch.save(state, metadata))
            else:
                published = {f"module.{name}": state[own_name(name)] for name in network.state_dict()}
                torch.save({**published_entries(model.arch, card), "state_dict": published, VERSION_KEY: metadata},
                           temporary, _use_new_zipfile_serialization=False)
    except (OSError, RuntimeError) as error:  # PyTorch raises the latter for the former
        raise CheckpointError(str(target), [f"unwritable: {error}"]) from error


def convert(source: str | os.PathLike[str] | nn.Module, target: str | os.PathLike[str]) -> SkipNet:
    """Read a checkpoint and write it in the format of the target's extension, bitwise equal in every float32 weight.

    Returns:
        The network that was read.

    Raises:
        CheckpointError: as :func:`load` and :func:`save` do.
    """
    model = load(source)
    save(model, target)
    return model
