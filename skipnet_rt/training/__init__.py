"""The paper's Algorithm 1: supervised training, then hybrid reinforcement learning.

What a training is (config), what it begins with (start), what it minimises (policy_gradient, distillation,
route_diversity), what moves alpha (computation_target), the gates' own stage (gates_alone), how it runs (loop), by one
process or several (distributed, batches). Data sets, and evaluation of what was trained, are elsewhere.
"""

from skipnet_rt.training.config import RECIPES, TrainConfig, TrainError
from skipnet_rt.training.loop import TrainResult, train

__all__ = ["RECIPES", "TrainConfig", "TrainError", "TrainResult", "train"]
