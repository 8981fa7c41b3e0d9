"""Finding the values of dynamo's graph again in the aten graphs that AOTAutograd and Inductor make of it.

Each node of dynamo's graph is stamped with its index, which AOTAutograd carries along to every aten node that it makes
of it, forward and backward, and which rewriting patterns lose or hand on. What a value has become is told from the
stamp, its shape and its dtype; a value for which that leaves any doubt is not found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._compat import example_value
from .arguments import written_arguments
from .elements import alike
from .plan import value_id
from .writes import Writes

KEY = "msprobe_graph"
"""Below this name the stamp lies in ``node.meta["custom"]``."""


class Wanted(NamedTuple):
    """A tensor of dynamo's graph, by what it can be told from in an aten graph."""

    stamp: int
    """Of the call that made it."""
    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    item: int | None = None
    """Its place among the outputs of a call that returns several."""
    written: str | None = None
    """The name of the argument that it is, for an operator that returns nothing and writes its arguments."""
    returned: int | None = None
    """Its place among the outputs of dynamo's graph, where nothing in the graph reads it."""
    alike: bool = False
    """Whether another output of that call has its shape and dtype."""
    view_of: int | None = None
    """The id of the value that it is a view of, where that serves for it."""
    overwritten: bool = False
    """Whether an operator at which a graph is split into several programs writes into its memory later."""


def spare(wanted: Mapping[int, Wanted], found: Collection[int]) -> list[int]:
    """Those of the values found that are views of another one."""
    return [id for id in found if wanted[id].view_of in found]


class Found(NamedTuple):
    """A value in an aten graph: what `node` is once `after` has run. They differ where `after` writes `node`."""

    node: fx.Node
    after: fx.Node


def stamp(module: fx.GraphModule) -> None:
    """Stamp the nodes of dynamo's graph with their indices."""
    for index, node in enumerate(module.graph.nodes):
        if node.op not in ("placeholder", "output"):
            node.meta["custom"] = {**node.meta.get("custom", {}), KEY: index}


def values(graph: fx.Graph) -> dict[int, Wanted]:
    """The tensors of dynamo's graph by value id."""
    index = {node: number for number, node in enumerate(graph.nodes)}
    inner = [node for node in index if node.op not in ("placeholder", "output")]
    writes, first = Writes(inner), index[inner[0]] if inner else 0
    wanted: dict[int, Wanted] = {}
    for node, number in index.items():
        example = example_value(node)
        if node.op in ("placeholder", "output"):
            if isinstance(example, torch.Tensor):
                wanted[2 * number] = Wanted(number, tuple(example.shape), example.dtype)
        elif isinstance(example, torch.Tensor):
            argument = _unchanged(node, example)
            source = node if argument is None else writes.value_at(argument, number - first + 1)
            made = index[source] if isinstance(source, fx.Node) else None
            if made == number:
                wanted[2 * number] = _wanted(node, number, example, index)
            elif made is not None and 2 * made in wanted:
                wanted[2 * number] = wanted[2 * made]
        for nth, (name, written) in enumerate(written_arguments(node), 1):
            tensor = written.meta.get("example_value")
            if isinstance(tensor, torch.Tensor):
                wanted[value_id(number, nth)] = Wanted(number, tuple(tensor.shape), tensor.dtype, written=name)
    return wanted


def _wanted(node: fx.Node, number: int, example: torch.Tensor, index: Mapping[fx.Node, int]) -> Wanted:
    stamped, item, has_twin = number, None, False
    if _name(node.target) == "getitem" and isinstance(node.args[0], fx.Node):
        container = node.args[0].meta.get("example_value")
        if isinstance(container, (tuple, list)) and isinstance(node.args[1], int):
            stamped, item = index[node.args[0]], node.args[1] % len(container)
            others = [each for at, each in enumerate(container) if at != item and isinstance(each, torch.Tensor)]
            has_twin = any(each.dtype == example.dtype and _same(each.shape, example.shape) for each in others)
    return Wanted(stamped, tuple(example.shape), example.dtype, item, None, _returned(node), has_twin)


def _returned(node: fx.Node) -> int | None:
    if [user.op for user in node.users] != ["output"]:
        return None
    outputs = node.graph.output_node().args[0]
    places = [place for place, output in enumerate(outputs) if output is node] if isinstance(outputs, Sequence) else []
    return places[0] if len(places) == 1 else None


# fmt: off
_MAY_CHANGE_NOTHING = frozenset({
    "contiguous", "to", "float", "half", "bfloat16", "double", "type", "type_as", "cpu", "cuda", "npu",
    "view", "view_as", "reshape", "expand", "expand_as", "flatten", "squeeze", "unsqueeze", "detach", "alias",
    "identity", "dropout",
})
# fmt: on


def _unchanged(node: fx.Node, example: torch.Tensor) -> fx.Node | None:
    """The argument that the call returned just as it was (``x.contiguous()``, dropout in evaluation)."""
    if _name(node.target) not in _MAY_CHANGE_NOTHING or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0] if alike(example_value(node.args[0]), example) else None


def _name(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def stamp_of(node: fx.Node) -> int | None:
    found = node.meta.get("custom", {}).get(KEY)
    return found if isinstance(found, int) else None


def find(graph: fx.Graph, wanted: Mapping[int, Wanted]) -> dict[int, Found]:
    """What the wanted values (even ids) are in an aten graph of the forward pass, as far as that is sure.

    Several ids may be one node. Of nodes that compute gradients ahead of the backward pass, none is taken. In a graph
    that has been rewritten, a part of what a call was decomposed into may look like its result: see `pins`.
    """
    original = originals(graph)
    inputs = _inputs(graph)
    groups: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        number = stamp_of(node)
        if number is not None and node.op == "call_function" and not _of_backward(node):
            groups[number].append(node)
    found = {}
    for id, value in wanted.items():
        if id % 2:
            continue
        group = groups.get(value.stamp, [])
        place: Found | None = None
        if value.written is not None:
            place = _find_written(group, value)
        elif value.stamp in inputs:
            place = Found(inputs[value.stamp], inputs[value.stamp]) if fits(inputs[value.stamp], value) else None
        else:
            place = _find_result(_results(group, value, original), value)
        if place is not None:
            found[id] = place
    return found


def _inputs(graph: fx.Graph) -> dict[int, fx.Node]:
    """Inputs of dynamo's graph, by their places. AOTAutograd describes them."""
    found = {}
    for node in graph.nodes:
        described = node.meta.get("desc")
        if node.op == "placeholder" and type(described).__name__ == "PlainAOTInput":
            found[described.idx] = node
    return found


_COPIES = {
    **dict.fromkeys(("alias", "clone", "detach", "lift_fresh", "lift_fresh_copy"), 0),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "expand", "slice", "_to_copy", "convert_element_type"), 0),
    **dict.fromkeys(("copy", "copy_"), 1),
}
"""Operators of aten graphs, with the place of the argument that they return, if they change neither shape nor dtype."""


def originals(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Nodes that have the same value as another one, which they copy, and that one."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        place = _COPIES.get(node.target.overloadpacket.__name__)
        source = node.args[place] if place is not None and place < len(node.args) else None
        if isinstance(source, fx.Node) and _same_meta(node, source):
            found[node] = found.get(source, source)
    return found


def _same_meta(one: fx.Node, other: fx.Node) -> bool:
    left, right = one.meta.get("val"), other.meta.get("val")
    return (
        isinstance(left, torch.Tensor)
        and isinstance(right, torch.Tensor)
        and (left.dtype, left.device) == (right.dtype, right.device)
        and _same(left.shape, right.shape)
    )


def _of_backward(node: fx.Node) -> bool:
    """Whether it is part of the backward pass, wherever the partitioner has put it."""
    tag = node.meta.get("partitioner_tag")
    return tag in ("is_backward", "must_be_in_backward") or "fwd_nn_module_stack" in node.meta


def _results(group: list[fx.Node], value: Wanted, original: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """A result is what the call computes and does not use any further. Of copies, the original."""
    inside = set(group)
    leaves = [node for node in group if fits(node, value) and inside.isdisjoint(node.users)]
    sources = {original.get(node, node): node for node in leaves}
    return [source if source in inside else node for source, node in sources.items()]


def _find_result(results: list[fx.Node], value: Wanted) -> Found | None:
    if value.alike:
        if any(_name(node.target) != "getitem" for node in results) or len({node.args[0] for node in results}) != 1:
            return None
        results = [node for node in results if node.args[1] == value.item]
    return Found(results[0], results[0]) if len(results) == 1 else None


def _find_written(group: list[fx.Node], value: Wanted) -> Found | None:
    results = []
    for node in group:
        for name, argument in written_arguments(node):
            if name == value.written and fits(argument, value):
                results.append(Found(argument, node))
        results += [Found(item, item) for item in _functionalized(node, value) if fits(item, value)]
    return results[0] if len(results) == 1 else None


def _functionalized(node: fx.Node, value: Wanted) -> Iterator[fx.Node]:
    """The items of an auto-functionalized operator's outputs that are the written argument."""
    if not (isinstance(node.target, torch._ops.HigherOrderOperator) and "auto_functionalized" in str(node.target)):
        return
    overload = node.args[0]
    if not isinstance(overload, torch._ops.OpOverload):
        return
    returns = max(1, len(overload._schema.returns))
    place = node.kwargs.get(f"_{value.written}_base_index")
    if not isinstance(place, int):
        names = [each.name for each in overload._schema.arguments if each.alias_info and each.alias_info.is_write]
        place = names.index(value.written or "")
    for user in node.users:
        if _name(user.target) == "getitem" and user.args[1] == returns + place:
            yield user


def find_gradients(graph: fx.Graph, wanted: Mapping[int, Wanted]) -> dict[int, Found]:
    """What the wanted gradients (odd ids, each with the value that it is the gradient of) are in an aten graph of the
    backward pass, as far as that is sure.

    A call's gradient is what flows into those nodes of the backward pass that bear its stamp. A recomputed value of
    the forward pass is no gradient: it does not depend on what the backward pass is given.
    """
    original = originals(graph)
    flow = gradient_flow(graph)
    entering: dict[int, dict[fx.Node, None]] = defaultdict(dict)
    for node in graph.nodes:
        number = stamp_of(node)
        if number is None or node not in flow or node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            if source in flow and (stamp_of(source) != number or source.op == "placeholder"):
                entering[number][source] = None
    of_inputs, of_outputs = _at_the_border(graph)
    found = {}
    for id, value in wanted.items():
        if id % 2 == 0:
            continue
        sources: list[fx.Node] = []
        if id == 2 * value.stamp + 1 and value.stamp in of_inputs:
            sources = [of_inputs[value.stamp]]
        elif value.returned in of_outputs:
            sources = [of_outputs[value.returned]]
        elif value.item is None and value.written is None:
            sources = list(entering.get(value.stamp, ()))
        fitting = {original.get(node, node): node for node in sources if fits(node, value)}
        if len(fitting) == 1:
            (node,) = fitting.values()
            found[id] = Found(node, node)
    return found


def _at_the_border(graph: fx.Graph) -> tuple[dict[int | None, fx.Node], dict[int | None, fx.Node]]:
    """Gradients with respect to inputs of dynamo's graph, by the inputs' places, and those with respect to its
    outputs, by theirs. AOTAutograd describes both in the backward graph."""
    output = graph.output_node()
    gradients = zip(output.meta.get("desc") or (), output.args[0], strict=False)  # type: ignore[arg-type]
    of_inputs = {
        getattr(described.grad_of, "idx", None): node
        for described, node in gradients
        if type(getattr(described, "grad_of", None)).__name__ == "PlainAOTInput" and isinstance(node, fx.Node)
    }
    of_outputs = {}
    for node in graph.nodes:
        described = getattr(node.meta.get("desc"), "output", None)
        if node.op == "placeholder" and type(described).__name__ == "PlainAOTOutput":
            of_outputs[getattr(described, "idx", None)] = node
    return of_inputs, of_outputs


def gradient_flow(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on a gradient that the backward pass is given."""
    flow: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name.startswith("tangents"):
                flow.add(node)
        elif node.op != "output" and not flow.isdisjoint(node.all_input_nodes):
            flow.add(node)
    return flow


def fits(node: fx.Node, value: Wanted) -> bool:
    """Whether the node of an aten graph gives a tensor of the value's shape and dtype. Adds no guard."""
    tensor = node.meta.get("val")
    return isinstance(tensor, torch.Tensor) and tensor.dtype == value.dtype and _same(tensor.shape, value.shape)


def _same(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(
        one == other if isinstance(one, int) and isinstance(other, int) else statically_known_true(one == other)
        for one, other in zip(left, right, strict=True)
    )
