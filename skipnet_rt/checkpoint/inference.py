"""The architecture, from the names and shapes of the weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from skipnet_rt.checkpoint.error import SHOWN_ALIKE
from skipnet_rt.model.arch import ArchError, GateKind, SkipNetArch


def inferred_architecture(shapes: Mapping[str, tuple[int, ...]]) -> SkipNetArch:
    """The architecture that names and shapes belong to; where single ones are wrong, what most of them say.

    Raises:
        ArchError: there are no blocks, or no network has blocks like these.
    """
    block, dense_block = r"group([0-9]{1,3})_layer([0-9]{1,3})\.", r"layer([0-9]{1,3})\.([0-9]{1,3})\."
    gated = any(re.match(block, name) for name in shapes)
    depths: dict[int, int] = {}
    for place in filter(None, (re.match(block if gated else dense_block, name) for name in shapes)):
        group, position = map(int, place.groups())
        depths[group] = max(depths.get(group, 1), position + 1)
    groups = range(1, max(depths, default=0) + 1)
    if not groups:
        raise ArchError("no residual blocks under the published names (group1_layer0. or layer1.0.); "
                        f"found {', '.join(map(repr, list(shapes)[:SHOWN_ALIKE])) or 'nothing'}")
    if len(groups) + sum(depths.values()) > len(shapes):  # every block has ten names: don't build what isn't there
        raise ArchError(f"{len(groups)} groups of up to {max(depths.values())} blocks have only {len(shapes)} weights")
    first = r"group{0}_layer[0-9]+\.(conv1|bn1)\.\w+" if gated else r"layer{0}\.[0-9]+\.(conv1|bn1)\.\w+"
    kernel = _vote(shapes, r"conv1\.weight", 3, otherwise=7 if len(groups) == 4 else 3)
    imagenet = kernel == 7
    side = max(224, 4 << len(groups)) if imagenet else max(32, 1 << len(groups))  # 2x2 in the last group, or more
    return SkipNetArch(
        stem="imagenet" if imagenet else "cifar",
        block="bottleneck" if any(name.endswith(".conv3.weight") for name in shapes) else "basic",
        depths=tuple(depths.get(group, 1) for group in groups),
        widths=tuple(_vote(shapes, first.format(group), 0, otherwise=1) for group in groups),
        gate=_inferred_gate(shapes) if gated else "none",
        num_classes=_vote(shapes, r"fc\.\w+", 0, otherwise=10),
        image_size=(side, side),
        in_channels=_vote(shapes, r"conv1\.weight", 1, otherwise=3),
        embed_dim=_vote(shapes, r"group[0-9]+_gate[0-9]+\.1\.\w+", 0, otherwise=10),
        hidden_dim=_vote(shapes, r"control\.(rnn\.weight_hh_l0|proj\.weight)", 1, otherwise=10),
    )


def _inferred_gate(names: Iterable[str]) -> GateKind:
    parts = {part[1] for part in (re.match(r"group[0-9]+_gate[0-9]+\.(\w+)\.", name) for name in names) if part}
    if not parts & {"conv1", "conv2", "linear_layer"}:
        return "rnn"
    return "feedforward1" if "conv2" in parts else "feedforward2"


def _vote(shapes: Mapping[str, tuple[int, ...]], pattern: str, axis: int, *, otherwise: int) -> int:
    """The size along an axis that most of the weights of such names have."""
    sizes = Counter(shape[axis] for name, shape in shapes.items() if len(shape) > axis and re.fullmatch(pattern, name))
    return sizes.most_common(1)[0][0] if sizes else otherwise
