"""Which module calls a graph consists of, as dynamo tells when asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import fx, nn

from msprobe_graph.graph._compat import module_calls
from msprobe_graph.graph.marks import Mark, Marks, Seen

from ..capturing import Apply
from .conftest import Net


class Listening:
    """A backend that asks for the marks of each graph, and compiles nothing."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.found: list[list[Mark] | None] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.found.append(self.marks.of(module.graph))
        self.graphs.append(module)
        return module.forward


@pytest.fixture
def listening() -> Listening:
    return Listening(Marks())


def test_the_graph_is_compiled_under_the_settings_of_the_first_trace(listening: Listening) -> None:
    found: list[bool] = []

    def compile(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        listening.marks.of(module.graph)
        found.append(torch._inductor.config.deterministic)
        return module.forward

    with torch._inductor.config.patch(deterministic=True):
        torch.compile(Net(layers=1).eval(), backend=compile)(torch.randn(2, 8))
    assert found == [True]


def test_marks_nest_as_the_calls_do(listening: Listening) -> None:
    model, x = Net(layers=1).eval(), torch.randn(2, 8)
    torch.compile(model, backend=listening)(x)
    (marks,) = listening.found
    assert marks is not None
    told = [("begin" if mark.returned is None else "end", mark.module[2]) for mark in marks]
    assert told == [
        ("begin", "Mlp"),
        ("begin", "LayerNorm"),
        ("end", "LayerNorm"),
        ("begin", "Linear"),
        ("end", "Linear"),
        ("begin", "Linear"),
        ("end", "Linear"),
        ("end", "Mlp"),
        ("begin", "Linear"),
        ("end", "Linear"),
    ]
    assert [mark.at for mark in marks] == sorted(mark.at for mark in marks)


def test_an_end_tells_arguments_keywords_and_outputs(listening: Listening) -> None:
    model, x = Net(layers=1).eval(), torch.randn(2, 8)
    torch.compile(model, backend=listening)(x)
    marks = listening.found[0] or []
    ((args, kwargs, outputs),) = [mark.returned for mark in marks if mark.returned and mark.module[2] == "Mlp"]
    assert [seen.node for seen in args] == ["L['x']"]
    assert dict(kwargs) == {"scale": 2.0}
    assert outputs[1] is None
    assert isinstance(outputs[0], Seen)
    nodes = [node for node in listening.graphs[0].graph.nodes if node.op not in ("placeholder", "output")]
    assert "mul" in str(nodes[outputs[0].node])


def test_what_is_compiled_has_no_mark_and_is_what_it_would_have_been(listening: Listening) -> None:
    plain: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        plain.append(module)
        return module.forward

    model, x = Net().eval(), torch.randn(2, 8)
    found = torch.compile(model, backend=listening)(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend=keep)(x), found)
    assert [module.code for module in listening.graphs] == [module.code for module in plain]


def test_no_hook_stays_behind(listening: Listening) -> None:
    before = dict(nn.modules.module._global_forward_hooks), dict(nn.modules.module._global_forward_pre_hooks)
    torch.compile(Net().eval(), backend=listening)(torch.randn(2, 8))
    after = dict(nn.modules.module._global_forward_hooks), dict(nn.modules.module._global_forward_pre_hooks)
    assert after == before
    assert not nn.modules.module._global_forward_hooks_with_kwargs


def test_no_hook_stays_behind_when_dynamo_gives_up(listening: Listening) -> None:
    """Between the traces something else ends the compilation."""
    calls: list[int] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        listening(module, inputs)
        return module.forward

    with pytest.raises(KeyboardInterrupt):
        torch.compile(Apply(torch.sin), backend=backend)(torch.randn(2))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_graph_that_is_traced_differently_has_no_marks(listening: Listening) -> None:
    """A program whose trace depends on how often it was traced."""
    traced: list[int] = []

    def depends(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) if len(traced) % 2 else torch.cos(torch.cos(x))

    def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        traced.append(1)
        return listening(module, inputs)

    model = nn.Sequential(nn.Linear(2, 2), Apply(depends))
    torch.compile(model, backend=backend)(torch.randn(2, 2))
    assert listening.found == [None]


def test_module_calls_are_those_running_now() -> None:
    found: list[list[nn.Module]] = []
    inner = Apply(lambda x: found.append(module_calls()))
    outer = nn.Sequential(nn.Identity(), inner)
    outer(torch.ones(1))
    assert found == [[inner, outer]]
    assert module_calls() == []
