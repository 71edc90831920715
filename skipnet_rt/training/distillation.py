"""Learning from the dense original: its predictions in place of a part of the labels.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt.model.network import SkipNet


def distilled_losses(logits: Tensor, labels: Tensor, teacher_logits: Tensor, *, weight: float,
                     temperature: float) -> Tensor:
    """Each image's loss: ``(1 - weight)`` of the cross-entropy with the label, ``weight`` of the teacher's divergence.

    The divergence is ``temperature^2 KL(softmax(teacher / temperature) || softmax(logits / temperature))``: the square
    makes its gradient as large as the cross-entropy's at any temperature.

    Args:
        logits, teacher_logits: float32 ``[N, classes]``.
        labels: ``[N]``, class numbers.
        weight: from 0 to 1.
        temperature: above 0; what is above 1 shows more of how the teacher ranks the wrong classes.

    Returns:
        ``[N]``.
    """
    expected = (teacher_logits / temperature).log_softmax(1)
    divergence = F.kl_div((logits / temperature).log_softmax(1), expected, reduction="none", log_target=True).sum(1)
    return (1 - weight) * F.cross_entropy(logits, labels, reduction="none") + weight * temperature ** 2 * divergence


@torch.no_grad()
def teacher_logits(teacher: SkipNet, images: Tensor) -> Tensor:
    """What the teacher, in evaluation mode, says of images ``[N, C, H, W]``: float32 ``[N, classes]``."""
    return teacher.trace(images).logits.float()
