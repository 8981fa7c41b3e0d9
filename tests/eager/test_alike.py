"""Steps whose calls are like those of the step before hold what a capture of that step alone holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from msprobe_graph.taps.likeness import FORMS, extension
from tests.capturing import Apply

from .alike import Net, Program, captured, check, input_of

pytestmark = pytest.mark.skipif(extension() is None, reason="there is no compiled _pattern")


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_other_values(level: str, tmp_path: Path) -> None:
    with torch.no_grad():
        found = check(tmp_path, level, lambda model, n: model(input_of(n)))
    norms = {next(step.tensors()).record["Norm"] for step in found}
    assert len(norms) == len(found)


AGAIN = input_of(0, 7, 6)
PROGRAMS: dict[str, Program] = {
    "other shapes": lambda model, n: model(input_of(n, 2 + n // 2, 6)),
    "other arguments": lambda model, n: model(input_of(n), scale=0.5 * (n // 2)),
    "more calls": lambda model, n: model(input_of(n), depth=1 + n % 2),
    "not contiguous": lambda model, n: model(input_of(n, 6, 3).t() if n % 2 else input_of(n)),
    "not finite": lambda model, n: model(torch.full((3, 6), (1.0, float("nan"), float("inf"), 2.0)[n % 4])),
    "a tensor again": lambda model, n: model(AGAIN),
    "float64": lambda model, n: model.to(torch.float32 if n % 2 else torch.float64)(
        input_of(n).to(torch.float32 if n % 2 else torch.float64)
    ),
    "half of it only": lambda model, n: model(input_of(n)) if n % 2 else model.first(input_of(n)),
    "empty": lambda model, n: model.first(torch.empty(0, 6)),
}


@pytest.mark.parametrize("level", ["L0", "mix"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_other_calls(name: str, level: str, tmp_path: Path) -> None:
    with torch.no_grad():
        check(tmp_path, level, PROGRAMS[name], count=5)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_inference_mode(level: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        check(tmp_path, level, lambda model, n: model(input_of(n)))


def test_weights_that_are_written_to(tmp_path: Path) -> None:
    def program(model: nn.Module, number: int) -> None:
        assert isinstance(model, Net)
        if number == 2:
            model.first.weight.mul_(2)
        if number == 3:
            model.twice.weight.data.fill_(0.25)  # which its version counter does not see
        if number == 5:
            model.first.bias = nn.Parameter(torch.ones(6))
        model(input_of(number))

    with torch.no_grad():
        check(tmp_path, "mix", program, count=7)


def test_gradients_now_and_then(tmp_path: Path) -> None:
    """Calls that autograd records are described anew; those without gradients in between are like earlier ones."""

    def program(model: nn.Module, number: int) -> None:
        with torch.set_grad_enabled(number % 3 == 2):
            outputs = model(input_of(number))
            if number % 3 == 2:
                outputs[0].sum().backward()

    found = check(tmp_path, "mix", program, count=6)
    assert any(name.endswith("backward.0") or ".backward" in name for name in found[2].data)
    assert not any(".backward" in name for name in found[3].data)


def test_a_call_that_raises(tmp_path: Path) -> None:
    """What it was given is there, and nothing of what its earlier call returned."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] > 1:
            raise ValueError("too large")
        return x + 1

    model = nn.Sequential(Apply(forward))

    def program(value: float) -> None:
        with torch.no_grad(), contextlib.suppress(ValueError):
            model(torch.full((2, 2), value))

    found = captured(model, tmp_path, "L0", ((lambda v=v: program(v)) for v in (0.0, 1.0, 2.0, 0.5)))
    name = "Module.0.Apply.forward.0"
    assert [step.data[name].get("output") is None for step in found] == [False, False, True, False]
    assert [step.data[name]["input_args"][0]["Max"] for step in found] == [0.0, 1.0, 2.0, 0.5]
    assert found[3].data[name]["output"][0]["Max"] == 1.5


def test_a_call_from_another_line_has_its_own_stack(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)

    def forward(x: torch.Tensor, way: bool) -> torch.Tensor:
        if way:
            return layer(x)
        return layer(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, way: bool) -> torch.Tensor:
            return forward(x, way)

    model = Model()
    with torch.no_grad():
        found = captured(
            model, tmp_path, "L0", ((lambda way=way: model(torch.ones(1, 4), way)) for way in (True, True, False, True))
        )
    stacks = [
        next(frames for names, frames in step.stack.values() if "Module.layer.Linear.forward.0" in names)
        for step in found
    ]
    assert stacks[0] == stacks[1] == stacks[3] != stacks[2]


def test_one_value_in_two_places_that_part(tmp_path: Path) -> None:
    """What was one tensor in the step before are two in this one: each record has its own."""
    big = 256
    model = Apply(lambda x, y: x + y)

    def program(same: bool) -> None:
        x = torch.ones(big, big)
        model(x, x if same else torch.full((big, big), 3.0))

    found = captured(model, tmp_path, "L0", ((lambda s=s: program(s)) for s in (True, True, False, True)))
    seen = [[arg["Max"] for arg in step.data["Module.Apply.forward.0"]["input_args"]] for step in found]
    assert seen == [[1.0, 1.0], [1.0, 1.0], [1.0, 3.0], [1.0, 1.0]]


def test_a_large_input_of_several_steps(tmp_path: Path) -> None:
    """One that comes back after a step with another keeps its own statistics."""
    model = nn.Sequential(nn.ReLU())
    inputs = [torch.full((256, 256), float(value)) for value in range(3)]
    order = [0, 0, 1, 0, 2, 1, 0]
    with torch.no_grad():
        found = captured(model, tmp_path, "mix", ((lambda n=n: model(inputs[n])) for n in order))
    assert [step.data["Module.Sequential.forward.0"]["input_args"][0]["Max"] for step in found] == order


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "pair", "named"]), st.integers(1, 3), st.sampled_from([None, 1, 2.5, "a"])),
        min_size=2,
        max_size=6,
    )
)
def test_any_order_of_calls(tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, int, Any]]) -> None:
    def program(model: nn.Module, number: int) -> None:
        kind, rows, extra = calls[number]
        x = input_of(number, rows, 6)
        assert isinstance(model, Net)
        if kind == "pair":
            model.first(x)
            model.last(model.first(x), extra=x)
        elif kind == "named":
            model.last(x, scale=2.0 if extra is None else 3.0)
        else:
            model(x)

    with torch.no_grad():
        check(tmp_path_factory.mktemp("calls"), "mix", program, count=len(calls))


def test_nothing_is_described_anew_where_nothing_changes(tmp_path: Path, described: list[int]) -> None:
    """That these tests test something: in the third step no value is described."""
    with torch.no_grad():
        model = Net().eval()
        captured(model, tmp_path, "mix", ((lambda n=n: model(input_of(n))) for n in range(4)))
    assert 0 in described
    assert not {2, 3} & set(described)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_forms_that_take_turns(level: str, tmp_path: Path, described: list[int]) -> None:
    """As those of prefill and decode steps do: once each is known nothing is described."""

    def program(model: nn.Module, number: int) -> None:
        model(input_of(number, (3, 5, 8)[number % 3], 6), depth=1 + (number % 3 == 2))

    with torch.no_grad():
        check(tmp_path, level, program, count=9)
        described.clear()
        model = Net().eval()
        captured(model, tmp_path / "again", level, ((lambda n=n: program(model, n)) for n in range(9)))
    assert {0, 1, 2} <= set(described)
    assert not {3, 4, 5, 6, 7, 8} & set(described)


def test_more_forms_than_are_kept(tmp_path: Path) -> None:
    with torch.no_grad():
        check(tmp_path, "mix", lambda model, n: model(input_of(n, 2 + n % (FORMS + 2), 6)), count=3 * FORMS)


class OwnParameter(nn.Parameter):
    """As vLLM's parameters are: of a class of their own, which is asked for whatever concerns them."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_parameters_are_looked_at_without_their_class(tmp_path: Path) -> None:
    """Python code for each look at each weight would take longer than all else."""
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = OwnParameter(model[0].weight.detach().clone())
    asked: list[int] = []
    with torch.no_grad():
        for level in ("L0", "L1", "mix"):
            folder = tmp_path / level

            def program(number: int) -> None:
                before = OwnParameter.asked
                model(input_of(number))
                asked.append(OwnParameter.asked - before)

            program(0)
            captured(model, folder, level, ((lambda n=n: program(n)) for n in range(4)))
            assert len(set(asked[-2:] + asked[:1])) == 1, "no more than without capture"


def test_a_parameter_of_its_own_class(tmp_path: Path) -> None:
    def program(model: nn.Module, number: int) -> None:
        assert isinstance(model, Net)
        if type(model.first.weight) is nn.Parameter:
            model.first.weight = OwnParameter(model.first.weight.detach().clone())
        if number == 3:
            model.first.weight.add_(1)
        model(input_of(number))

    with torch.no_grad():
        check(tmp_path, "mix", program, count=5)


def test_a_lazy_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4))
    with torch.no_grad():
        found = captured(model, tmp_path, "mix", ((lambda n=n: model(input_of(n))) for n in range(3)))
    for number, step in enumerate(found):
        assert step.data["Functional.linear.0.forward"]["output"][0]["Norm"] == pytest.approx(
            model(input_of(number)).double().norm().item(), rel=1e-6
        )


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


@dataclasses.dataclass
class Fields:
    one: torch.Tensor
    other: list[torch.Tensor]


@pytest.mark.parametrize("make", [Pair, lambda x, y: Fields(x, [y]), lambda x, y: {"one": x, "other": (y, None)}])
def test_nests(make: Callable[..., Any], tmp_path: Path, described: list[int]) -> None:
    model = Apply(lambda nest: nest)
    with torch.no_grad():
        found = captured(
            model, tmp_path, "L0", ((lambda n=n: model(make(input_of(n), input_of(n + 9)))) for n in range(4))
        )
    assert not {2, 3} & set(described)
    for number, step in enumerate(found):
        norms = [tensor.record["Norm"] for tensor in step.tensors()]
        exact = [input_of(number + more).double().norm().item() for more in (0, 9)]
        assert norms == pytest.approx(exact * 2, rel=1e-6)


def test_written_to_by_what_says_nothing_of_it(tmp_path: Path) -> None:
    """Of a large tensor, in the middle of a step, as by some operators of vLLM's."""
    model = nn.Sequential(Apply(lambda x: x), Apply(lambda x: x))
    model[0].register_forward_hook(lambda module, args, output: args[0].data.mul_(2) is None or None)

    def program(number: int) -> None:
        model(torch.full((256, 256), number + 1.0))

    with torch.no_grad():
        found = captured(model, tmp_path, "L0", ((lambda n=n: program(n)) for n in range(4)))
    for number, step in enumerate(found):
        assert step.data["Module.0.Apply.forward.0"]["input_args"][0]["Max"] == number + 1
        assert step.data["Module.1.Apply.forward.0"]["input_args"][0]["Max"] == 2 * (number + 1)
