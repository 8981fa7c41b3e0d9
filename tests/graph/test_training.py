"""Training: backward entries are those of the eager run, and the gradients that the model gets are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msprobe_graph import msprobe_backend
from msprobe_graph.dump.reader import StepDump
from msprobe_graph.graph.naming import IN_BODY

from ..capturing import Apply, Capture, holes
from .conftest import Both, Net, differences


def train(model: nn.Module, x: Tensor) -> Callable[[Any], None]:
    """A program that runs a model forward and backward."""

    def program(run: Any) -> None:
        model.zero_grad()
        run(x).pow(2).mean().backward()

    return program


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def of(step: StepDump, kind: str) -> dict[str, Any]:
    return {name: entry for name, entry in step.data.items() if kind in name}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_of_the_model_are_bit_equal(capture: Capture, inner: str) -> None:
    model, x = Net(layers=4), torch.randn(4, 8)
    train(model, x)(torch.compile(model, backend=inner))
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": inner})
    capture(compiled, lambda: train(model, x)(compiled))
    assert all(map(torch.equal, gradients(model), expected))
    assert len(expected) == len(list(model.parameters()))


@pytest.mark.parametrize("fidelity", ["exact", "full"])
def test_a_graph_that_computes_no_value_to_tap_runs(both: Both, fidelity: str) -> None:
    """All that its forward part consists of is its output; the gradients are wanted."""
    x = torch.randn(4, 8)
    model = Apply(lambda x, y: x + y)
    options = {"fidelity": fidelity}
    eager, compiled = both(model, lambda run: run(x, x.clone().requires_grad_()).sum().backward(), options, level="mix")
    assert {name: entry["output"] for name, entry in of(compiled, ".forward").items()} == {
        name: entry["output"] for name, entry in of(eager, ".forward").items()
    }
    assert of(eager, ".backward").keys() - compiled.data.keys() <= holes(compiled).keys()


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_forward_entries_of_training_are_those_of_eager(both: Both, level: str) -> None:
    model, x = Net(), torch.randn(4, 8)
    eager, compiled = both(model, train(model, x), {"inner": "aot_eager"}, level=level)
    left, right = of(eager, ".forward"), of(compiled, ".forward")
    assert list(left) == list(right)
    assert differences(eager._replace(data=left, construct={}), compiled._replace(data=right, construct={}), 1e-6) == []


def test_backward_entries_are_eagers_or_holes(both: Both) -> None:
    model, x = Net(), torch.randn(4, 8)
    eager, compiled = both(model, train(model, x), {"inner": "aot_eager"}, level="L0")
    expected, found = of(eager, ".backward"), of(compiled, ".backward")
    assert list(found) == [name for name in expected if name in found]
    assert expected.keys() - found.keys() <= holes(compiled).keys()
    assert len(found) >= 0.6 * len(expected)
    told = 0
    for name, entry in found.items():
        for part in ("input", "output"):
            assert len(entry[part]) in (0, len(expected[name][part])), name
            for one, other in zip(expected[name][part], entry[part], strict=False):
                assert (one is None) == (other is None), name
                if other is not None and other["Max"] is not None:
                    told += 1
                    assert other["shape"] == one["shape"]
                    for key in ("Max", "Min", "Mean", "Norm"):
                        assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5 * one["Norm"]), (name, key)
                elif other is not None:
                    assert other["reason"]
    assert told >= 10


def test_parameters_have_their_gradients(both: Both) -> None:
    model, x = Net(), torch.randn(4, 8)
    eager, compiled = both(model, train(model, x), {"inner": "aot_eager"}, level="L0")
    left, right = of(eager, "parameters_grad"), of(compiled, "parameters_grad")
    assert set(left) == set(right)
    assert len(left) == 7
    order = {name: {key: right[name][key] for key in left[name]} for name in left}
    assert differences(eager._replace(data=left, construct={}), compiled._replace(data=order, construct={}), 1e-6) == []


def test_where_no_tap_can_lie_in_the_backward_pass_the_manifest_says_so(both: Both) -> None:
    model, x = Net(), torch.randn(4, 8)
    _, compiled = both(model, train(model, x), {"inner": "eager"})
    assert any("backward" in reason for reason in holes(compiled).values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_are_no_backward_entries(both: Both, mode: Any) -> None:
    model, x = Net(), torch.randn(4, 8)
    with mode():
        eager, compiled = both(model, lambda run: run(x), {"inner": "aot_eager"})
    assert differences(eager, compiled, 1e-6) == []
    assert not of(compiled, ".backward")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(layers=2)
        self.scale = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net.layers:
            x = x + checkpoint(lambda x, layer=layer: layer(x, scale=2.0)[0], x, use_reentrant=False)
        return self.scale(self.net.head(x))


def test_activation_checkpointing(capture: Capture) -> None:
    """The model goes on as it did; of a module inside, which is not captured, the manifest tells."""
    model, x = Checkpointed(), torch.randn(4, 8)
    train(model, x)(torch.compile(model, backend="aot_eager"))
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": "aot_eager"})
    found = capture(compiled, lambda: train(model, x)(compiled), level="L0")
    assert all(map(torch.equal, gradients(model), expected))
    assert not [reason for reason in holes(found).values() if "failed" in reason]
    assert "Module.net.layers.0.up.Linear" in holes(found)
    eager = capture(model, lambda: model(x), level="L0").data
    for name in ("Module.net.head.Linear.forward.0", "Module.scale.Linear.forward.0", "Module.Checkpointed.forward.0"):
        assert found.data[name]["output"][0]["Norm"] == pytest.approx(eager[name]["output"][0]["Norm"], rel=1e-4)


def test_functions_behind_a_checkpoint_bear_their_numbers(both: Both) -> None:
    model, x = Checkpointed(), torch.randn(4, 8)
    eager, compiled = both(model, lambda run: run(x), {"inner": "aot_eager"}, level="L1")
    assert list(compiled.data) == [name for name in eager.data if name in compiled.data]
    assert {holes(compiled)[name] for name in eager.data.keys() - compiled.data.keys()} == {IN_BODY}
    for name in ("Functional.linear.4.forward", "Functional.linear.5.forward"):
        found, expected = compiled.data[name]["output"][0], eager.data[name]["output"][0]
        assert found["Norm"] == pytest.approx(expected["Norm"], rel=1e-4), name


def test_two_forwards_before_two_backwards(both: Both) -> None:
    """A graph's backward pass belongs to the run of the graph that it is of."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    one, other = torch.randn(2, 4), 3 * torch.randn(2, 4)

    def program(run: Any) -> None:
        model.zero_grad()
        first, second = run(one).sum(), run(other).sum() * 2
        second.backward()
        first.backward()

    eager, compiled = both(model, program, {"inner": "aot_eager"}, level="L0")
    told = 0
    for name, entry in of(compiled, ".backward").items():
        given, expected = entry["input"][0], eager.data[name]["input"][0]
        if given["Max"] is not None:
            told += 1
            assert given["Norm"] == pytest.approx(expected["Norm"], rel=1e-4), name
    assert told >= 4


def test_a_backward_pass_after_stop_is_not_captured(capture: Capture) -> None:
    model, x = Net(), torch.randn(4, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": "aot_eager"})
    kept: list[Tensor] = []
    step = capture(compiled, lambda: kept.append(compiled(x).sum()), level="L0")
    kept[0].backward()
    assert not of(step, ".backward")
    assert len(gradients(model)) == len(list(model.parameters()))
