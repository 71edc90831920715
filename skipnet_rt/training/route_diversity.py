"""A bonus for routes that differ from image to image.

A gate that does the same for all images decides nothing, and a network of such gates is a smaller static one. What a
decision tells of the image, the mutual information ``I(a; x) = H(E[p]) - E[H(p)]``, is 0 for such a gate and ln 2 for
one that surely runs its block for half of the images and surely skips it for the others. It is differentiable in the
gates' probabilities. As a bonus it decides between routes that are worth the same; its weight says how much accuracy
it may outbid.

Source: Bridle, Heading and MacKay, "Unsupervised classifiers, mutual information and 'phantom targets'", 1991.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def decision_information(gate_logits: Tensor) -> Tensor:
    """What the decisions tell of the images of a batch: mutual information in nats, mean over the gates.

    Args:
        gate_logits: ``[N, G]``, the execute logits, differentiable.

    Returns:
        A scalar from 0 to ln 2; 0 without gates.
    """
    if not gate_logits.shape[1]:
        return gate_logits.new_zeros(())
    probability = torch.sigmoid(gate_logits)
    # H(sigmoid(z)) = softplus(z) - z sigmoid(z), finite for any z
    each = F.softplus(gate_logits) - gate_logits * probability
    mean = probability.mean(0).clamp(1e-6, 1 - 1e-6)  # xlogy has no gradient at 0
    together = -torch.xlogy(mean, mean) - torch.xlogy(1 - mean, 1 - mean)
    return (together - each.mean(0)).mean()
