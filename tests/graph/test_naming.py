"""From dynamo's graph to the plan of its calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from msprobe_graph.config.operators import OperatorTable
from msprobe_graph.graph.arguments import Asked, asked
from msprobe_graph.graph.naming import NO_MARKS, plan_of
from msprobe_graph.graph.plan import Absent, Plan, Ref, gradient_id, node_of, refs, tensors, value_id
from msprobe_graph.graph.writes import Writes


def traced(function: Callable[..., Any], *inputs: Any) -> fx.Graph:
    """Dynamo's graph of a function."""
    found: list[fx.Graph] = []

    def backend(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(module.graph)
        return module.forward

    torch.compile(function, backend=backend)(*inputs)
    return found[0]


def planned(function: Callable[..., Any], *inputs: Any) -> Plan:
    return plan_of(traced(function, *inputs), (), OperatorTable(), lambda name: True, None)


@given(st.integers(0, 10**6))
def test_ids_lead_back_to_their_node(index: int) -> None:
    value = value_id(index)
    assert node_of(value) == node_of(gradient_id(value)) == index
    assert value != gradient_id(value)


def test_refs_and_absent_tensors_of_a_nest() -> None:
    absent = Absent(None, "why")  # type: ignore[arg-type]
    nest = [Ref(2), {"a": [Ref(4), {"type": "int", "value": 1}]}, absent, None]
    assert list(refs(nest)) == [Ref(2), Ref(4)]
    assert list(tensors(nest)) == [Ref(2), Ref(4), absent]


def test_a_plan_has_inputs_calls_and_outputs() -> None:
    plan = planned(lambda x, y: torch.sin(x) + y, torch.ones(2), torch.ones(2))
    sin, add = plan.calls
    assert [call.name for call in plan.calls] == ["Torch.sin", "Tensor.add"]
    assert sorted(plan.inputs.values()) == [0, 1]
    assert sin.output == [add.args[0]]
    assert plan.outputs == {add.output[0].id: 0}
    assert sin.end < add.begin
    assert plan.holes == []


def test_without_marks_the_plan_says_so() -> None:
    graph = traced(lambda x: torch.sin(x), torch.ones(2))
    plan = plan_of(graph, None, OperatorTable(), lambda name: True, None)
    assert plan.holes == [NO_MARKS]
    assert [call.name for call in plan.calls] == ["Torch.sin"]


def test_functions_that_are_not_wanted_are_left_out() -> None:
    graph = traced(lambda x: torch.sin(x) + 1, torch.ones(2))
    plan = plan_of(graph, (), OperatorTable(), lambda name: name == "Tensor.add", None)
    assert [call.name for call in plan.calls] == ["Tensor.add"]
    assert plan.inputs == {}


def test_a_dynamic_size_is_no_number() -> None:
    found: list[Plan] = []

    def backend(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(plan_of(module.graph, (), OperatorTable(), lambda name: True, None))
        return module.forward

    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(5, 3))
    (value,) = {found[0].values[ref.id].shape for ref in refs(found[0].calls[0].output)}
    assert value == (None, None)


def graph_of(*targets: Callable[..., Any]) -> tuple[fx.Node, list[fx.Node]]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return x, [graph.call_function(target, (x,)) for target in targets]


def test_a_function_is_asked_as_a_mode_is() -> None:
    x, _ = graph_of()
    assert asked(F.silu, (x,), {}) == Asked(F.silu, (x,), {"inplace": False})
    assert asked(F.linear, (x, x), {}) == Asked(F.linear, (x, x), {})
    assert asked(torch.sin, (x,), {}) == Asked(torch.sin, (x,), {})
    assert asked(torch.einsum, ("ij,jk", x, x), {}) == Asked(torch.einsum, ("ij,jk", x, x), {})
    assert asked(operator.add, (x, 1), {}) == Asked(operator.add, (x, 1), {})


def test_a_function_of_the_program_is_not_run() -> None:
    x, _ = graph_of()

    def fails(x: Any) -> Any:
        raise AssertionError("it was run")

    assert asked(fails, (x,), {}) == Asked(fails, (x,), {})


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    z = y - 3
    y[0] = 5
    return y / z


def test_the_value_of_a_changed_tensor_is_that_of_its_last_writer() -> None:
    nodes = [node for node in traced(in_place, torch.ones(2)).nodes if node.op not in ("placeholder", "output")]
    mul, add, sub = nodes[:3]
    writes = Writes(nodes)
    assert writes.value_at(mul, 0) is mul
    assert writes.value_at(mul, 1) is mul
    assert writes.value_at(mul, 2) is add
    assert writes.value_at(add, 2) is add
    assert writes.value_at(sub, len(nodes)) is sub
    assert writes.value_at(mul, len(nodes)) is None


def test_what_writes_into_a_tensor_behind_it() -> None:
    nodes = list(traced(in_place, torch.ones(2)).nodes)
    mul, add, sub, write = [node for node in nodes if node.op not in ("placeholder", "output")][:4]
    writes = Writes(nodes)
    assert list(writes.behind(mul)) == [add, write]
    assert list(writes.behind(add)) == [write]
    assert list(writes.behind(sub)) == []
