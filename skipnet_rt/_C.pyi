"""The native extension, built from csrc/; csrc/bindings.cpp documents each function."""

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Bools = NDArray[np.bool_]

Layer = tuple[_Floats, _Floats, int]
LSTM = tuple[_Floats, _Floats, _Floats, _Floats, float]

cuda_archs: str
cuda_build: str

class Network:
    def __init__(self, strategy: str, image_size: tuple[int, int], stem: Layer, max_pool: bool,
                 blocks: list[tuple[list[Layer], Layer | None]], embeddings: list[tuple[_Floats, _Floats]],
                 lstm: LSTM | None, gates: list[tuple[bool, list[Layer], _Floats, float]], head_weight: _Floats,
                 head_bias: _Floats, bfloat16: bool, instruction_set: str) -> None: ...
    def run(self, images: _Floats, logits: _Floats, gate_logits: _Floats, probabilities: _Floats, executed: _Bools,
            forced: _Bools | None, hidden: _Floats, cell: _Floats, threads: int) -> None: ...

class Convolution:
    def __init__(self, strategy: str, layer: Layer, bfloat16: bool, batch: int, image_size: tuple[int, int],
                 instruction_set: str) -> None: ...
    def load(self, x: _Floats) -> None: ...
    def run(self) -> None: ...
    def read(self) -> _Floats: ...

class RNNGate:
    def __init__(self, weight: _Floats, bias: _Floats, input_weight: _Floats, hidden_weight: _Floats,
                 lstm_bias: _Floats, projection_weight: _Floats, projection_bias: float,
                 instruction_set: str) -> None: ...
    def step(self, pooled: _Floats, hidden: _Floats, cell: _Floats, logit: _Floats) -> None: ...

def multiply_add(rounds: int, instruction_set: str) -> float: ...
def instruction_sets() -> list[str]: ...
def cuda_devices() -> list[tuple[str, str]]: ...
