"""The native extension, built from csrc/; csrc/bindings.cpp documents each function."""

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Bools = NDArray[np.bool_]
_Rows = NDArray[np.int64]

Layer = tuple[_Floats, _Floats, int]
LSTM = tuple[_Floats, _Floats, _Floats, _Floats, float]

cuda_archs: str
cuda_build: str

class RNNGate:
    def __init__(self, weight: _Floats, bias: _Floats, input_weight: _Floats, hidden_weight: _Floats,
                 lstm_bias: _Floats, projection_weight: _Floats, projection_bias: float) -> None: ...
    def step(self, pooled: _Floats, hidden: _Floats, cell: _Floats, logit: _Floats, probability: _Floats,
             executed: _Bools, forced: _Bools | None, rows: _Rows) -> int: ...

class FeedforwardGate:
    def __init__(self, weight: _Floats, bias: float) -> None: ...
    def step(self, pooled: _Floats, logit: _Floats, probability: _Floats, executed: _Bools,
             forced: _Bools | None, rows: _Rows) -> int: ...

class Resident:
    def __init__(self, image_size: tuple[int, int], stem: Layer, blocks: list[tuple[Layer, Layer, Layer | None]],
                 embeddings: list[tuple[_Floats, _Floats]], lstm: LSTM | None,
                 gates: list[tuple[bool, list[Layer], _Floats, float]], head_weight: _Floats, head_bias: _Floats,
                 instruction_set: str) -> None: ...
    def run(self, images: _Floats, logits: _Floats, gate_logits: _Floats, probabilities: _Floats, executed: _Bools,
            forced: _Bools | None, hidden: _Floats, cell: _Floats, threads: int) -> None: ...

def instruction_sets() -> list[str]: ...
def pool(activation: NDArray[np.float32] | NDArray[np.uint16], rows: _Rows, pooled: _Floats,
         threads: int = 1) -> None: ...
def classify(pooled: _Floats, weight: _Floats, bias: _Floats, logits: _Floats) -> None: ...
def cuda_devices() -> list[tuple[str, str]]: ...
