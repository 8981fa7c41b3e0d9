"""Which tensors lose the rows that only pad a batch."""

from __future__ import annotations

import torch
from torch import nn

from msprobe_graph.taps.padding import Padding


def test_the_batch_is_cut_and_nothing_else() -> None:
    padding = Padding(rows=3, padded=8)
    for batch in (torch.arange(8.0), torch.rand(8, 4), torch.rand(4, 8).t(), torch.rand(16, 2)[::2]):
        assert torch.equal(padding.cut(batch), batch[:3])
    for other in (torch.tensor(8.0), torch.rand(3, 8), torch.rand(0), torch.rand(7, 2), torch.rand(1, 8, 4)):
        assert padding.cut(other) is other


def test_what_a_model_owns_is_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    padding = Padding(3, 8, [model])
    weight = model[0].weight
    views = [weight.data, weight.detach()[:, 1:], weight.view(8, 2, 2)]
    with torch.inference_mode():  # which keeps no record of what is a view of what
        views.append(weight.t().t())
    for tensor in (*model.parameters(), *model.buffers(), *views):
        assert padding.cut(tensor) is tensor
    assert padding.cut(weight.clone()).shape == (3, 4)


def test_memory_that_a_model_has_given_back_is_not_its_own() -> None:
    model = nn.Linear(4, 8, bias=False)
    old = model.weight.data
    assert Padding(3, 8, [model]).cut(old) is old
    model.weight.data = torch.rand(8, 4)
    assert Padding(3, 8, [model]).cut(old).shape == (3, 4)


def test_no_values_to_read() -> None:
    sparse = torch.eye(8).to_sparse()
    assert Padding(3, 8, [nn.Linear(8, 8)]).cut(sparse) is sparse, "which torch can't cut, and no tap can measure"
    assert Padding(3, 8).cut(torch.rand(8, 2, device="meta")).shape == (3, 2)
