"""The model of time on a GPU chooses tiles, slices and gates' places as the CUDA sources do."""

import shutil
from math import isqrt, prod

import gpu_model
import numpy as np
import pytest
from simt import library

import skipnet_rt as srt

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

H200, *_ = gpu_model.DEVICES
SHARED = {"128, 128, 2, 4": 77_824, "64, 64, 2, 2": gpu_model.SMALL_BYTES, "128, 32, 4, 1": 40_960}


@pytest.mark.parametrize("name", ["imagenet_rnn_gate_101", "imagenet_rnn_gate_34"])
@pytest.mark.parametrize("batch", [1, 2, 8, 64, 256])
def test_tiles_slices_and_gates_are_those_of_the_launches(name, batch):
    conv, plan = library("compacted"), np.zeros(5, np.int32)
    conv.configure(seed=0)
    for block in srt.arch(name).blocks:
        convolutions, projection = gpu_model._convolutions(block)
        for layer in (*convolutions, *projection):
            gates = layer is convolutions[-1]
            conv("plan_gathered_conv", layer.inputs, layer.outputs, layer.kernel, batch, isqrt(layer.pixels),
                 layer.pools, gates, H200.multiprocessors, plan)
            tile, *sides = layer.tile(batch, H200)
            in_tail = gates and layer.gates(batch, H200)
            slices = layer.slices if tile.endswith("true") else 1
            shared = SHARED[tile.rpartition(",")[0]] + (gpu_model._gate_bytes(layer.outputs) if in_tail else 0)
            blocks = min(prod((layer.tiles(batch, *sides), slices)), 2 * H200.multiprocessors)  # the harness' occupancy
            assert plan.tolist() == [blocks, 128 if sides[0] * sides[1] <= 4096 else 256, shared,
                                     1 + (gates and not in_tail), layer.slices], layer


@pytest.mark.parametrize(("batch", "images", "blocks"),
                         [(1, 1, 1), (128, 1, 128), (1024, 3, 132), (4096, 3, 132), (7, 2, 2)])
def test_turns_are_those_of_the_resident_launch(batch, images, blocks):
    sizes = np.zeros(batch + 1, np.int32)
    library("resident")("turns_of_plan", batch, images, blocks, sizes)
    assert gpu_model.turns(batch, images, blocks) == [size for size in sizes.tolist() if size]
