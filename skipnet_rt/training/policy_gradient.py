"""The objective of each stage: the supervised loss, and REINFORCE for the gates.

Source: SkipNet paper, section 3.3 and Algorithm 1. The hybrid objective, for image x with label y, gates
``i = 1..G`` and sampled actions ``a_i`` (1 executes), is ``E[L(x, y, a) - sum_i alpha/G (1 - a_i)]``. Its gradient is
the supervised loss's gradient along the sampled route, plus REINFORCE for every gate:
``-E[sum_i grad log p(a_i) R_i]`` with the cumulative future reward ``R_i = r_i + gamma R_(i+1)``,
``r_i = alpha/G (1 - a_i)`` and ``R_(G+1) = -L``.

**Variance reduction: the leave-one-out baseline** (Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!",
2019, over a batch instead of repeated samples). See :func:`leave_one_out`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt.model.network import Trace
from skipnet_rt.training.config import Objective
from skipnet_rt.training.distributed import ALONE, Ranks


def cumulative_rewards(actions: Tensor, loss: Tensor, alpha: float, gamma: float) -> Tensor:
    """What follows each gate's action: ``R_i = r_i + gamma R_(i+1)``, ``r_i = alpha/G (1 - a_i)``, ``R_(G+1) = -loss``.

    Args:
        actions: ``[N, G]``, 1 where the block was executed, 0 where it was skipped.
        loss: ``[N]``, each image's prediction loss.
        alpha: reward for skipping all gated blocks.
        gamma: discount.

    Returns:
        ``[N, G]``, without gradient.
    """
    skipped = (1 - actions.detach()) * (alpha / max(1, actions.shape[1]))
    future, rewards = -loss.detach(), []
    for reward in reversed(skipped.unbind(1)):
        future = reward + gamma * future
        rewards.append(future)
    return torch.stack(rewards[::-1], dim=1) if rewards else torch.zeros_like(skipped)


def leave_one_out(rewards: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Advantages: each image's reward less the mean reward of the *other* images of the batch, gate by gate.

    The baseline leaves the gradient unbiased: the other images' rewards don't depend on this image's action, so
    ``E[grad log p(a) b] = b sum_a grad p(a) = b grad 1 = 0``. (The mean over all images, this one included, would
    shrink the gradient by (N - 1)/N.) It takes out what the images' rewards have in common, the larger part of
    REINFORCE's variance. In training mode batch normalisation does couple the images of a batch a little; plain
    REINFORCE per image leaves that influence out of account just the same.

    Args:
        rewards: ``[N, G]``.
        ranks: who shares the batch; the others are those of all ranks.

    Returns:
        ``[N, G]``; of a batch of one, the rewards themselves.
    """
    images, mean = len(rewards), rewards.mean(0)
    if ranks.count > 1:
        sums = ranks.sum(torch.cat((rewards.sum(0), rewards.new_tensor([images]))))
        images, mean = int(sums[-1]), sums[:-1] / sums[-1]
    return rewards if images == 1 else (rewards - mean) * (images / (images - 1))


def policy_loss(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """A scalar whose gradient is REINFORCE's, averaged over the batch and summed over the actions.

    Args:
        log_probabilities: ``[N, A]``, of the actions taken, differentiable.
        advantages: ``[N, A]``, what each is worth.
    """
    return -(advantages.detach() * log_probabilities).sum(1).mean()


def _unrounded(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def objective_loss(objective: Objective, trace: Trace, labels: Tensor, *, alpha: float, gamma: float,
                   rl_weight: float, losses: Tensor | None = None, ranks: Ranks = ALONE) -> Tensor:
    """The scalar to minimise for one batch, or one rank's share of it: a mean over these images.

    Args:
        objective: the stage.
        trace: a pass in training mode, ``trace.masks`` sampled in the reinforced stages.
        labels: ``[N]``, class numbers.
        alpha, gamma, rl_weight: as in :class:`TrainConfig`.
        losses: ``[N]``, each image's prediction loss, differentiable; the cross-entropy where not given.
        ranks: who shares the batch, for the baseline.
    """
    logits, gates = _unrounded(trace.logits), trace.masks.shape[1]
    losses = F.cross_entropy(logits, labels, reduction="none") if losses is None else losses
    if objective == "supervised":
        return losses.mean()
    actions, gate_logits = _unrounded(trace.masks), _unrounded(trace.gate_logits[:, :gates])
    log_probabilities = -F.binary_cross_entropy_with_logits(gate_logits, actions, reduction="none")
    if objective in ("gates", "hybrid"):
        rewards = cumulative_rewards(actions, losses, alpha, gamma)
        return losses.mean() + rl_weight * policy_loss(log_probabilities, leave_one_out(rewards, ranks))
    predicted = torch.multinomial(logits.detach().softmax(1), 1)
    wrong = (predicted.squeeze(1) != labels).float()
    rewards = torch.cat((cumulative_rewards(actions, wrong, alpha, gamma), -wrong[:, None]), dim=1)
    log_probabilities = torch.cat((log_probabilities, logits.log_softmax(1).gather(1, predicted)), dim=1)
    return rl_weight * policy_loss(log_probabilities, leave_one_out(rewards, ranks))
