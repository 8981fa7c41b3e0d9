"""What a compiled module runs eagerly: between graph breaks, in frames that dynamo gives up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msprobe_graph import PrecisionDebugger, msprobe_backend
from msprobe_graph.eager.stretches import NO_GRAPH, OWN_MODE

from ..capturing import Capture, holes
from .conftest import EAGER, Both, Mlp, differences


def graphs() -> int:
    """How many graphs dynamo has compiled."""
    number: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return number


class Broken(nn.Module):
    """A graph break in the middle and a number that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.before = Mlp()
        self.between = nn.Linear(8, 8)
        self.after = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x, scale=1.0)[0]
        torch._dynamo.graph_break()
        y = self.between(x) * float(x.sum().item())
        return self.after(y, scale=2.0)[0]


class InALoop(nn.Module):
    """Modules with a break in each, called in a loop: of forward itself, dynamo compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Break() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.sin(part(x + 1)) * 2
        return x


class Break(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x) - x


class Skipped(nn.Module):
    """A module that dynamo doesn't compile at all, in one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.eager = Eager()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.eager(torch.tanh(self.fc(x)))) + 1


class Eager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sin(x))


class Mixed(nn.Module):
    """Forward runs eagerly and calls modules and functions that dynamo compiles, with breaks and without, and some that
    it doesn't; a function that it can't have in a graph; and an error."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Break() for _ in range(2))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = compiled_alone(part(x) * 2) + 1
            x = torch.relu(broken_alone(x) / 2) * size(x)
            x = disabled(x) - torch.unique(x).sum()
            try:
                raises(x)
            except ValueError:
                x = torch.abs(x)
        return x.exp()


def compiled_alone(x: Tensor) -> Tensor:
    return torch.cos(x) + torch.sin(x)


def broken_alone(x: Tensor) -> Tensor:
    x = torch.cos(x)
    torch._dynamo.graph_break()
    return torch.sin(x) * 3


def size(x: Tensor) -> int:
    return x.shape[0]


@torch.compiler.disable
def disabled(x: Tensor) -> Tensor:
    return compiled_alone(torch.tanh(x))


def raises(x: Tensor) -> None:
    torch.neg(x)
    torch._dynamo.graph_break()
    raise ValueError


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
@pytest.mark.parametrize("model", [Broken, InALoop, Skipped, Mixed])
def test_graph_breaks_change_nothing_in_a_dump(both: Both, model: type[nn.Module], level: str) -> None:
    x = torch.randn(2, 8)
    eager, compiled = both(model().eval(), lambda run: run(x), level=level)
    assert differences(eager, compiled) == []
    assert NO_GRAPH not in holes(compiled).values()
    assert graphs() > 1
    assert eager.data


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("model", [Broken, InALoop, Skipped, Mixed])
def test_what_ran_before_capture_is_not_compiled_anew_for_it(
    tmp_path: Path, capture: Capture, model: type[nn.Module], in_place: bool
) -> None:
    """Nor what is first compiled under capture, when capture is over."""
    program, x = model().eval(), torch.randn(2, 8)
    eager = capture(program, lambda: program(x))
    PrecisionDebugger({"dump_path": str(tmp_path / "dump"), "level": "mix", "risk_level": "ALL"})
    if in_place:
        program.compile(backend=msprobe_backend, options=EAGER)
    compiled = program if in_place else torch.compile(program, backend=msprobe_backend, options=EAGER)
    expected = compiled(x)
    before = graphs()
    assert before > 1
    step = capture(compiled, lambda: compiled(x))
    assert differences(eager, step) == []
    assert torch.equal(compiled(x), expected)
    assert graphs() == before
    assert torch._C._len_torch_function_stack() == 0


def test_functions_around_graphs_of_which_nothing_is_wanted(both: Both) -> None:
    """The graphs have none of the functions that the list names."""
    x = torch.randn(2, 8)
    eager, compiled = both(Mixed().eval(), lambda run: run(x), level="L1", statistics={"list": ["relu", "exp", "abs"]})
    assert differences(eager, compiled) == []
    assert [name.split(".")[1] for name in eager.data] == ["relu", "abs", "relu", "abs", "exp"]


class Numbered(nn.Module):
    """Compiled anew for each number, until dynamo has enough of it; the functions around it are compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Number()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            x = self.part(x) + 1
        return torch.relu(x)


class Number(nn.Module):
    number = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        torch._dynamo.graph_break()
        return x * self.number


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = torch.tan(breaks_at_once(x))
        return x


def breaks_at_once(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    torch._dynamo.graph_break()
    return x


def test_functions_behind_compiled_code_without_a_graph_are_a_hole(capture: Capture) -> None:
    """Such code leaves no trace when it runs."""
    model, x = Silent().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    for _ in range(2):
        step = capture(compiled, lambda: compiled(x), level="L1")
        assert [site.rpartition(" ")[2] for site, reason in holes(step).items() if reason == NO_GRAPH] == ["forward"]


def test_functions_of_what_was_compiled_too_often_are_a_hole(capture: Capture) -> None:
    model, x = Numbered().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)

    def program() -> None:
        for number in range(4):
            model.part.number = number
            compiled(x)

    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            step = capture(compiled, program)
            assert NO_GRAPH in holes(step).values()
    assert "Torch.sin.3.forward" in step.data
    assert "Torch.relu.3.forward" in step.data
    assert "Tensor.mul.3.forward" not in step.data


class Passing(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class UnderAMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Break()

    def forward(self, x: Tensor) -> Tensor:
        with Passing():
            x = torch.sin(x)
            torch._dynamo.graph_break()
            x = disabled(self.part(x))
        return torch.tan(x)


def test_a_mode_of_the_programs_own_keeps_its_place(capture: Capture) -> None:
    model, x = UnderAMode().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=msprobe_backend, options=EAGER)
    with torch.no_grad(), Passing() as mode:
        step = capture(compiled, lambda: compiled(x))
        before = graphs()
        torch.testing.assert_close(compiled(x), model(x))
        assert torch.overrides._get_current_function_mode_stack() == [mode]
    assert graphs() == before
    assert OWN_MODE in holes(step).values()
    assert {"Torch.sin.0.forward", "Torch.tan.0.forward"} <= set(step.data)


class GivenUp(nn.Module):
    """Dynamo gives its forward up, which then calls a module of torch's own and one of the program's."""

    def __init__(self) -> None:
        super().__init__()
        self.torchs = nn.Linear(8, 8)
        self.own = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = self.own(self.torchs(x), scale=1.0)[0]
        return x


@pytest.mark.parametrize("make", [InALoop, GivenUp])
def test_the_counters_are_those_of_an_untapped_backend(make: type[nn.Module], capture: Capture) -> None:
    def stats(backend: Any) -> dict[str, Any]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, x = make().eval(), torch.randn(2, 8)
        compiled = torch.compile(model, backend=backend, options=EAGER if backend is msprobe_backend else None)
        if backend is msprobe_backend:
            capture(compiled, lambda: compiled(x))
        compiled(x)
        counters = torch._dynamo.utils.counters
        return {"graphs": graphs(), "breaks": set(counters["graph_break"])}

    with torch.no_grad():
        assert stats(msprobe_backend) == stats("eager")
