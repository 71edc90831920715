"""The paper's Algorithm 1: supervised training, then hybrid reinforcement learning."""
