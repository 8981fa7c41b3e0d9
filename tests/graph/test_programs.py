"""Programs as found in the wild that naming went wrong on: each a class of models, in a few lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msprobe_graph.eager.paths import Paths
from msprobe_graph.graph import lower as lower_module

from ..capturing import Capture, holes, modules
from .conftest import Both, Net, differences


class Tied(nn.Module):
    """An encoder and a decoder that share their embedding, with a break behind it: T5, BART."""

    class Half(nn.Module):
        def __init__(self, embed: nn.Embedding) -> None:
            super().__init__()
            self.embed, self.out = embed, nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embed(ids)
            torch._dynamo.graph_break()
            return self.out(hidden)

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(10, 8)
        self.encoder, self.decoder = self.Half(self.shared), self.Half(self.shared)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids) + self.decoder(ids)


class MadeAsItRuns(nn.Module):
    """A module that no other holds: Mamba."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.SiLU()(x) + 1


class ShapeOnly(nn.Module):
    """A module of whose argument only the shape is used, so that dynamo drops the indexing that makes it: BART."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8))

        def forward(self, like: Tensor) -> Tensor:
            return F.embedding(torch.arange(like.shape[1]), self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.positions = self.Positions()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions(x[:, :, -1])


class Functionals(nn.Module):
    """Functions of torch.nn.functional that dynamo looks into: one operator, several, twice on a line."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        near = F.cosine_similarity(x, x + 1, dim=-1)
        return F.normalize(self.norm(x), dim=-1) + F.rms_norm(F.rms_norm(x, (8,)), (8,)) * near[..., None]


def test_tied_modules_bear_their_first_name(both: Both) -> None:
    eager, compiled = both(Tied(), lambda run: run(torch.arange(4)))
    assert "Module.shared.Embedding.forward.1" in compiled.data
    assert differences(eager, compiled) == []


def test_a_module_that_no_other_holds_is_no_call_of_its_maker(both: Both) -> None:
    eager, compiled = both(nn.Sequential(MadeAsItRuns()), lambda run: run(torch.randn(2, 8)), level="L0")
    assert modules(compiled) == modules(eager) == ["Module.0.MadeAsItRuns.forward.0", "Module.Sequential.forward.0"]


def test_an_argument_that_dynamo_drops_costs_only_itself(both: Both) -> None:
    eager, compiled = both(ShapeOnly(), lambda run: run(torch.randn(2, 4, 8)), level="L0")
    assert modules(compiled) == modules(eager)
    (record,) = compiled.data["Module.positions.Positions.forward.0"]["input_args"]
    assert record["Max"] is None
    assert "Module.positions.Positions.forward.0.input.0" in holes(compiled)


def test_functions_that_dynamo_looks_into_bear_eager_names(both: Both) -> None:
    x = torch.randn(2, 8)
    eager, compiled = both(Functionals(), lambda run: run(x))
    assert list(compiled.data) == list(eager.data)
    for name in ("Functional.rms_norm.0.forward", "Functional.rms_norm.2.forward"):
        assert compiled.data[name] == eager.data[name]
    assert (
        compiled.data["Functional.normalize.0.forward"]["output"]
        == (eager.data["Functional.normalize.0.forward"]["output"])
    )


def test_a_vmap_in_a_graph_is_no_obstacle(both: Both) -> None:
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: row * row.sum())(x)

    x = torch.randn(3, 8)
    _, compiled = both(Mapped(), lambda run: run(x))
    assert "Module.Mapped.forward.0" in compiled.data


def test_a_graph_that_cannot_be_understood_is_compiled_without_taps(
    capture: Capture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("never seen")

    monkeypatch.setattr(lower_module, "plan_of", fail)
    model, x = Net().eval(), torch.randn(2, 8)
    expected = model(x)
    compiled: Any = torch.compile(model, backend="msprobe", options={"inner": "eager"})
    found: list[Tensor] = []
    step = capture(compiled, lambda: found.append(compiled(x)))
    assert torch.equal(found[0], expected)
    assert "capture failed: KeyError: 'never seen'" in holes(step).values()
    assert "capture of a compiled graph failed" in caplog.text


def test_paths_of_one_tensor_are_told_apart_by_the_module_that_runs() -> None:
    model, paths = Tied(), Paths()
    paths.add({"": model})
    weight = model.shared.weight
    assert paths.prefix(weight, "shared.weight", None) == ""
    assert paths.prefix(weight, "embed.weight", "decoder") == "decoder"
    assert paths.prefix(weight, "embed.weight", None) is None
    assert paths.first("decoder.embed") == "shared"
