"""The paper's Algorithm 1: supervised training, then hybrid reinforcement learning.

What a training is (config), what it minimises (policy_gradient), how gates begin (gate_init), how it runs (loop), by
one process or several (distributed, batches). Data sets, and evaluation of what was trained, are elsewhere.
"""

from skipnet_rt.training.config import RECIPES, TrainConfig, TrainError
from skipnet_rt.training.loop import TrainResult, train

__all__ = ["RECIPES", "TrainConfig", "TrainError", "TrainResult", "train"]
