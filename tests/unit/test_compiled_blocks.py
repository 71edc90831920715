"""torch.compile in training: what is compiled, and that the network stays what it is."""

import pytest
import torch
from two_ranks import TINY, few_digits

from skipnet_rt.data import DATASETS
from skipnet_rt.training import TrainConfig, train


@pytest.mark.slow
def test_compiled_blocks_train_the_same_network(tmp_path, monkeypatch):
    """The graphs that torch.compile makes, run as they are: bitwise the same weights, and a plain model afterwards."""
    data, compiled, graphs = few_digits(40), torch.compile, []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph

    def trained(**changes):
        return train(TrainConfig(arch=TINY, supervised_epochs=1, reinforce_epochs=1, policy_warmup_epochs=0,
                                 batch_size=16, **changes))

    monkeypatch.setitem(DATASETS, "digits", lambda root: data)
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=as_it_is))
    plain = trained(output=tmp_path / "plain")
    assert not graphs
    result = trained(output=tmp_path / "compiled", compile_blocks=True)
    assert 3 <= len(graphs) <= 2 * TINY.num_blocks
    for key, value in plain.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[key], value), key
    assert not any("residual" in vars(module) for module in result.model.modules())
    assert result.card.training["command"].endswith("--compile-blocks")
