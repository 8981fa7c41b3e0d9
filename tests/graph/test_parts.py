"""Values that are parts of others: what split, chunk and slicing give is read out of what is in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ..capturing import holes
from .conftest import Both, differences


class Turn(nn.Module):
    """What rotary embeddings do to a query and a key, to new memory or in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.in_place:
            return query.mul_(2), key.add_(1)
        return query.sin() * 2, key.cos() + 1


class Mix(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query.unflatten(-1, (3, 4)) * key[..., None, :] + value[..., None, :]).flatten(-2)


class Attention(nn.Module):
    """One projection for query, key and value, taken apart in one of several ways."""

    def __init__(self, way: str, in_place: bool) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.turn, self.mix, self.out = nn.Linear(8, 20), Turn(in_place), Mix(), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.way == "split":
            query, key, value = qkv.split([12, 4, 4], dim=-1)
        elif self.way == "slices":
            query, key, value = qkv[..., :12], qkv[..., 12:16], qkv[..., 16:]
        else:
            query, key, value = qkv.narrow(-1, 0, 12), *qkv.narrow(-1, 12, 8).chunk(2, dim=-1)
        query, key = self.turn(query, key)
        return self.out(self.mix(query, key, value))


@pytest.mark.parametrize("way", ["split", "slices", "narrow and chunk"])
@pytest.mark.parametrize("in_place", [False, True], ids=["new memory", "in place"])
def test_parts_of_a_projection_are_there(both: Both, way: str, in_place: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    with torch.no_grad():
        model = Attention(way, in_place).eval()
        eager, compiled = both(model, lambda run: run(x), options={"inner": "inductor"}, level="L0")
    parts = [f"Module.turn.Turn.forward.0.input.{at}" for at in (0, 1)] + ["Module.mix.Mix.forward.0.input.2"]
    assert not [site for site in parts if site in holes(compiled)]
    known = {(t.entry, t.position): t.record for t in eager.tensors()}
    for tensor in compiled.tensors():
        if tensor.record.get("Norm") is not None:
            expected = known[tensor.entry, tensor.position]
            assert tensor.record["shape"] == expected["shape"]
            assert tensor.record["Norm"] == pytest.approx(expected["Norm"], rel=1e-5), (tensor.entry, tensor.position)


def test_parts_of_an_input_are_as_it_came_in(both: Both) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = Turn(False)

        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=1)
            return sum(self.turn(first, second))

    x = torch.randn(5, 8)
    with torch.no_grad():
        eager, compiled = both(Halves().eval(), lambda run: run(x), options={"inner": "inductor"}, level="L0")
    inputs = "Module.turn.Turn.forward.0"
    assert not [site for site in holes(compiled) if site.startswith(f"{inputs}.input")]
    assert not [each for each in differences(eager, compiled, 1e-6) if "input_args" in each]
