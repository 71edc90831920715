"""Results of inference, and statistics over them."""

import pytest
import torch
from networks import SMALL, small_images, small_model

import skipnet_rt as srt
from skipnet_rt.model.flops import count_operations
from skipnet_rt.model.routing import computation


def test_computation_is_the_published_percentage():
    executed = torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    assert computation(executed).tolist() == [0.75, 0.25]
    stats = srt.RoutingStats(SMALL["rnn-reinforced"])
    stats.update(executed[:1])
    stats.update(executed[1:])
    rates = stats.execution_rates
    assert rates.tolist() == [0.5, 0.0, 0.5]
    assert stats.computation == pytest.approx((rates.sum().item() + 1) / 4)
    assert (stats.images, stats.distinct_routes) == (2, 2)


def test_statistics_refuse_decisions_of_another_network():
    with pytest.raises(ValueError, match=r"\[N, 3\]"):
        srt.RoutingStats(SMALL["rnn-reinforced"]).update(torch.zeros(2, 5))


def test_results_carry_their_figures():
    result = srt.compile(small_model("rnn"), engine="eager").infer(small_images("rnn", 5))
    assert len(result) == 5
    assert torch.equal(result.blocks_run, result.executed.sum(1) + 1)
    assert torch.equal(result.multiply_adds, count_operations(result.arch).per_image(result.executed)[0])
    dense = srt.compile(small_model("dense")).infer(small_images("dense", 2))
    assert dense.blocks_run.tolist() == [6, 6]
    assert dense.computation.tolist() == [1.0, 1.0]
    assert dense.multiply_adds.tolist() == [count_operations(dense.arch).dense.multiply_adds] * 2
