"""Whether tensors were written to, by their version counters."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from msprobe_graph.taps import versions as module
from msprobe_graph.taps.likeness import extension
from msprobe_graph.taps.versions import versions


class Weight(nn.Parameter):
    """As vLLM has them."""


@pytest.mark.parametrize("compiled", [True, False])
def test_each_write_is_seen_whatever_tensor_it_is(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(module, "extension", lambda: None)
    elif extension() is None:
        pytest.skip("_pattern is not compiled")
    plain = torch.zeros(3)
    tensors = [plain, nn.Parameter(torch.zeros(2)), Weight(torch.zeros(4)), plain[1:]]
    for tensor in tensors:
        known = versions(tensors)
        assert known.stand()
        with torch.no_grad():
            tensor.add_(1)
        assert not known.stand()
        assert versions(tensors).stand()
    assert versions([]).stand()
    with torch.inference_mode():
        without = torch.zeros(1)
    with pytest.raises(RuntimeError, match="version"):
        versions([plain, without])


def test_tensors_that_lead_back_to_them_can_be_collected() -> None:
    if extension() is None:
        pytest.skip("_pattern is not compiled")
    weight = nn.Parameter(torch.zeros(2))
    weight.leads_back_to = versions([weight])  # type: ignore[attr-defined]
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None
