"""Gradients: the program's are what they are without capture, and the captured ones are autograd's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..capturing import LEVELS, Capture, norms
from .models import Model, Residual


@pytest.mark.parametrize("task", ["statistics", "tensor"])
@pytest.mark.parametrize("level", LEVELS)
def test_outputs_and_gradients_are_bit_identical(capture: Capture, level: str, task: str) -> None:
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(4, 6, requires_grad=True)

    def step() -> list[Tensor]:
        torch.manual_seed(1)  # dropout
        model.zero_grad()
        x.grad = None
        out = model(x * 1)
        F.cross_entropy(out, torch.tensor([0, 1, 2, 0])).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        return [out.detach().clone(), *(grad.clone() for grad in [x.grad, *grads] if grad is not None)]

    plain, captured = step(), []
    capture(model, lambda: captured.extend(step()), level, task=task)
    assert len(plain) == len(captured) == 2 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, step(), strict=True))


def test_gradients_are_those_of_autograd(capture: Capture) -> None:
    """Against autograd in float64: of outputs, of inputs (also where the input is used outside too), of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual())
    x = torch.randn(5, 6, requires_grad=True)
    step = capture(model, lambda: model(x).square().sum().backward(), "mix")

    twin = nn.Sequential(Residual(), Residual()).double()
    twin.load_state_dict(model.state_dict())
    wide = x.detach().double().requires_grad_()
    kept: dict[str, Tensor] = {}

    def block(index: int, x: Tensor) -> Tensor:
        """A Residual with every intermediate kept. Where a value is used twice, each use is a tensor of its own, so
        that its gradient is the share of that use alone."""
        layer: Any = twin[index]

        def use(name: str, value: Tensor) -> Tensor:
            kept[f"{index}.{name}"] = alias = value * 1
            alias.retain_grad()
            return alias

        for_norm, outer, factor = use("norm_in", x), use("outer", x), use("factor", x)
        normed = use("norm_out", layer.norm(for_norm))
        first = use("fc_out", layer.fc(normed))
        tanh = use("tanh_out", torch.tanh(first))
        second = use("fc_out_again", layer.fc(tanh))
        return use("out", outer + second * factor)

    block(1, block(0, wide)).square().sum().backward()

    def grad(name: str) -> float:
        found = kept[name].grad
        assert found is not None
        return found.norm().item()

    def total(index: int) -> float:
        parts = [kept[f"{index}.{name}"].grad for name in ("norm_in", "outer", "factor")]
        return sum(part for part in parts if part is not None).norm().item()  # type: ignore[union-attr]

    given, gives = norms(step, "input."), norms(step, "output.")
    expected = {}
    for index in (0, 1):
        expected |= {
            f"Module.{index}.Residual.backward.0": (grad(f"{index}.out"), total(index)),
            f"Module.{index}.norm.LayerNorm.backward.0": (grad(f"{index}.norm_out"), grad(f"{index}.norm_in")),
            f"Module.{index}.fc.Linear.backward.0": (grad(f"{index}.fc_out"), grad(f"{index}.norm_out")),
            f"Module.{index}.fc.Linear.backward.1": (grad(f"{index}.fc_out_again"), grad(f"{index}.tanh_out")),
            f"Torch.tanh.{index}.backward": (grad(f"{index}.tanh_out"), grad(f"{index}.fc_out")),
        }
    assert wide.grad is not None
    expected["Module.Sequential.backward.0"] = (grad("1.out"), wide.grad.norm().item())
    for entry, (out, into) in expected.items():
        assert (given[entry], gives[entry]) == pytest.approx((out, into), rel=1e-5), entry

    parameters = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for index, (layer, cls) in itertools.product((0, 1), [("norm", "LayerNorm"), ("fc", "Linear")]):
        entry = step.data[f"Module.{index}.{layer}.{cls}.parameters_grad.0"]
        for name in ("weight", "bias"):
            exact = parameters[f"{index}.{layer}.{name}"]
            assert exact is not None
            assert entry[name][0]["Norm"] == pytest.approx(exact.norm().item(), rel=1e-5)
    assert step.construct["Torch.tanh.0.backward"] == "Module.0.Residual.backward.0"
    assert list(step.data["Module.0.Residual.backward.0"]) == ["input", "output", "site"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_activation_checkpointing(capture: Capture, level: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
    x = torch.randn(3, 4, requires_grad=True)

    def step() -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        y: Tensor = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant)  # type: ignore[assignment]
        y.square().sum().backward()
        grads = [x.grad, *(parameter.grad for parameter in model.parameters())]
        return [grad.clone() for grad in grads if grad is not None]

    plain, captured = step(), []
    dump = capture(model, lambda: captured.extend(step()), level)
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    if level in ("L0", "mix"):  # computed, and computed again in the backward
        assert {"Module.0.0.Linear.forward.0", "Module.0.0.Linear.forward.1"} <= set(dump.data)
        first, again = (dump.data[f"Module.0.0.Linear.forward.{call}"]["output"][0]["Norm"] for call in (0, 1))
        assert first == again
        assert "Module.0.0.Linear.parameters_grad.0" in dump.data
