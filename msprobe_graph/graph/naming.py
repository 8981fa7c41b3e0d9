"""The name pass: from dynamo's graph to the plan of its calls.

Names are those of an eager capture. A module call comes from the marks that dynamo's second trace has left, a torch
call from a node of the graph (`api_calls`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import fx

from msprobe_graph.config.operators import OperatorTable
from msprobe_graph.dump.encode import describe
from msprobe_graph.eager.paths import bare

from ._compat import Traced, example_value, memory, source
from .api_calls import api_call, in_body, stack
from .arguments import written_arguments
from .beside import NOT_TAKEN, Beside, steps_of
from .elements import in_row_major
from .functionals import ARGUMENTS_UNTOLD, functionals
from .marks import OTHER, Mark, Seen
from .plan import Absent, Call, Part, Place, Plan, Ref, Value, fixed_in, gradient_id, node_of, refs, value_id, writes_of
from .sources import FRAME_MODULE, anchors, split_expression
from .views import parts, whole_views
from .writes import Writes

UNUSED = "the program does not use this output, and its graph does not hold it"
IN_BODY = "it is in the body of a higher-order operator (activation checkpointing), where no taps lie"
NO_MEMORY = "it is sparse, or inside a torch.func transform"
WRITTEN = "it was changed in place before, in a way that compiled code keeps no value of"
RESHAPED = 1000
"""From here on the high bits of an id count such arguments of the graph."""
NO_MARKS = "dynamo traced this graph differently when asked for its module calls, so they are not known"


def plan_of(
    graph: fx.Graph,
    marks: Sequence[Mark] | None,
    operators: OperatorTable,
    wants_api: Callable[[str], bool],
    traced: Traced | None,
) -> Plan:
    """The plan of dynamo's `graph`.

    marks: its module calls; () where they are not wanted, None where they could not be had.
    operators: names the torch calls, of which those are left out whose name `wants_api` does not want.
    traced: what dynamo has traced; None where what it has made of it is not what will call the graph.
    """
    return _Naming(graph, operators, wants_api, traced).plan(marks)


class _Naming:
    def __init__(
        self,
        graph: fx.Graph,
        operators: OperatorTable,
        wants_api: Callable[[str], bool],
        traced: Traced | None,
    ) -> None:
        self._nodes = list(graph.nodes)
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._operators = operators
        self._wants_api = wants_api
        module = None if traced is None else traced.module
        self._paths = {} if module is None else {id(each): bare(name) for name, each in module.named_modules()}
        self._beside = None if traced is None else Beside(traced.code, {})
        self._not_taken: dict[str, int] = {}
        """Ids of the tensors beside the graph, by where they come from."""
        self._inner = [node for node in self._nodes if node.op not in ("placeholder", "output")]
        self._inputs = {source(node): node for node in self._nodes if node.op == "placeholder"}
        self._values: dict[int, Value] = {}
        self._calls: list[Call] = []
        self._running: list[int] = []
        self._positions = {node: position for position, node in enumerate(self._inner)}
        self._entered: dict[int, int] = {}
        """By module call: the position of its first node."""
        self._time = 0
        self._writes = Writes(self._inner)
        self._reshaped: dict[tuple[int, tuple[int | None, ...]], int] = {}
        """Ids of written arguments that are read in another shape, by the argument's and that shape."""
        self._functionals = functionals(self._inner, operators.name)
        self._at = 0
        """The position before which values are asked for."""

    def plan(self, marks: Sequence[Mark] | None) -> Plan:
        left = list(reversed(marks or ()))
        for position, node in enumerate(self._inner):
            while left and left[-1].at <= position:
                self._mark(left.pop())
            for each in (node, *in_body(node)):
                self._function_call(each)
        while left:
            self._mark(left.pop())
        inputs = {value_id(self._index[node]): at for at, node in enumerate(self._inputs.values())}
        inputs |= {id_: at for at, id_ in enumerate(self._not_taken.values(), len(inputs))}
        returned = next(node for node in self._nodes if node.op == "output").args[0]
        outputs: dict[int, int] = {}
        for at, node in enumerate(returned):
            last = self._current(node, len(self._inner)) if isinstance(node, fx.Node) else None
            if last is not None:
                outputs.setdefault(last, at)
        calls = self._calls
        same = {**whole_views(self._nodes, self._writes), **{id_: of for (of, _), id_ in self._reshaped.items()}}
        reshaped = self._reshaped_of(same)
        pieces = self._parts_read(self._values.keys() | reshaped.keys())
        read = self._values.keys() | reshaped.keys() | pieces.keys()
        return Plan(
            calls=calls,
            ending=sorted(range(len(calls)), key=lambda index: calls[index].end),
            fixed=fixed_in(calls),
            values=self._values,
            inputs={id_: at for id_, at in inputs.items() if id_ in read},
            outputs={id_: at for id_, at in outputs.items() if id_ in read and id_ not in inputs},
            beside=self._beside if self._not_taken else None,
            anchors=anchors(list(self._inputs)),
            same=same,
            reshaped=reshaped,
            parts=pieces,
            holes=[*([] if marks is not None else [NO_MARKS]), *self._untold()],
        )

    def _reshaped_of(self, same: dict[int, int]) -> dict[int, list[int]]:
        """See Plan.reshaped."""
        found: dict[int, list[int]] = {}
        for view, base in same.items():
            if view not in self._values or self._values[view].shape.count(None) > 1:
                continue
            if writes_of(view) >= RESHAPED or all(in_row_major(self._tensor(id_)) for id_ in (view, base)):
                found.setdefault(base, []).append(view)
        return found

    def _parts_read(self, read: Set[int]) -> dict[int, list[Part]]:
        """See Plan.parts: of those that are `read`, and of those that have such parts in turn."""
        found = parts(self._nodes, self._writes)
        kept: dict[int, list[Part]] = {}
        for base in reversed(found):  # a part comes behind what it is a part of
            wanted = [part for part in found[base] if part.id in read or part.id in kept]
            if wanted:
                kept[base] = wanted
        return kept

    def _tensor(self, id: int) -> torch.Tensor:
        """The fake tensor of a value."""
        node, nth = self._nodes[node_of(id)], writes_of(id)
        if nth:
            _, node = list(written_arguments(node))[nth - 1]
        tensor: torch.Tensor = example_value(node)
        return tensor

    def _untold(self) -> list[str]:
        names = {self._operators.name(call.function): call.told for call in self._functionals.values()}
        return [ARGUMENTS_UNTOLD.format(name) for name, told in names.items() if not told]

    def _now(self) -> int:
        self._time += 1
        return self._time

    def _mark(self, mark: Mark) -> None:
        if mark.returned is None:
            key, expression, cls = mark.module
            inside = self._running[-1] if self._running else None
            self._running.append(len(self._calls))
            self._entered[len(self._calls)] = mark.at
            self._calls.append(Call("module", cls, self._place(key, expression), self._now(), 0, inside=inside))
            return
        index = self._running.pop()
        call = self._calls[index]
        call.end = self._now()
        args, kwargs, outputs = mark.returned
        self._at = self._entered[index]
        call.args, call.kwargs = self._nest(list(args)), self._nest(dict(kwargs))
        self._at = mark.at
        call.output = self._nest(outputs)
        own = range(self._entered[index], mark.at)
        call.given = self._gradients(call.output, lambda at: at not in own)
        call.gives = self._gradients([call.args, call.kwargs], own.__contains__)

    def _gradients(self, nest: Any, proper: Callable[[int], bool]) -> list[Ref | None]:
        """The gradients of the values in `nest`. Of one that has uses at other than `proper` positions, the gradient
        can't be told."""
        found: set[int] = set()
        gradients: list[Ref | None] = []
        for ref in refs(nest):
            wanted = self._values[ref.id].requires_grad and ref.id not in found and node_of(ref.id) < len(self._nodes)
            users = self._nodes[node_of(ref.id)].users if wanted else ()
            told = all(proper(self._positions[user]) for user in users if user in self._positions)
            gradients.append(Ref(gradient_id(ref.id), told) if wanted else None)
            found.add(ref.id)
        return gradients

    def _function_call(self, node: fx.Node) -> None:
        functional = self._functionals.get(node)
        if functional is not None and node is not functional.nodes[-1]:
            return
        function, args, kwargs = api_call(node) if functional is None else functional.call()
        name = self._operators.name(function)
        if name is None or not self._wants_api(name):
            return
        args, kwargs = self._operators.as_written(name, args, kwargs)
        now = self._now()
        self._at = self._positions.get(node, 0)
        arguments = self._nest(list(args)), self._nest(dict(kwargs))
        self._at += 1
        output = self._outputs(node)
        self._calls.append(
            Call(
                "api",
                name,
                self._place_of(node),
                now,
                now,
                *arguments,
                output,
                self._running[-1] if self._running else None,
                self._gradients(output, lambda at: True)[:1],
                stack=stack(node),
            )
        )

    def _outputs(self, node: fx.Node) -> list[Any]:
        """A tuple is spread over the outputs, as `spread` does in eager capture."""
        value = node.meta.get("example_value")
        if not isinstance(value, (tuple, list)):
            return [self._leaf(node)]
        items = {
            user.args[1]: user for user in reversed(node.users) if user.target is operator.getitem
        }  # of several users of one item the first in the graph
        outputs = [self._leaf(items[i]) if i in items else _unused(item) for i, item in enumerate(value)]
        return outputs if isinstance(value, tuple) else [outputs]

    def _nest(self, value: Any) -> Any:
        if isinstance(value, Seen):
            node = self._inputs.get(value.node) if isinstance(value.node, str) else self._inner[value.node]
            return self._leaf(node) if node is not None else self._dropped(value)
        if isinstance(value, fx.Node):
            return self._leaf(value)
        if isinstance(value, (tuple, list)) and len(value) == 3 and value[0] == OTHER:
            return {"type": value[1], "value": _plain_numbers(value[2])}
        if isinstance(value, (list, tuple)) and type(value) is not torch.Size:
            return [self._nest(item) for item in value]
        if isinstance(value, dict):
            return {str(key): self._nest(item) for key, item in value.items()}
        return describe(value)

    def _dropped(self, seen: Seen) -> Any:
        """What the marked graph had, and this one hasn't."""
        if seen.value is None:
            return {"type": "int", "value": None}
        expression = str(seen.node)
        way = steps_of(expression)
        if self._beside is None or way is None:
            return Absent(seen.value, NOT_TAKEN)
        id_ = self._not_taken.setdefault(expression, value_id(len(self._nodes) + len(self._not_taken)))
        self._beside.ways[id_] = way
        self._values[id_] = seen.value
        return Ref(id_)

    def _leaf(self, node: fx.Node) -> Any:
        """The value of `node` as it is at the moment that is being named."""
        value = example_value(node)
        if not isinstance(value, torch.Tensor):
            # Nothing, a number that the program computes as it runs, or a tuple of tensors.
            return describe(None) if value is None else {"type": _python_type(value), "value": None}
        if node not in self._index:
            return Absent(Value.of(value), IN_BODY)
        if memory(value) is None:
            return Absent(Value.of(value), NO_MEMORY)
        current = self._current(node, self._at)
        if current is None:
            return Absent(Value.of(value), WRITTEN)
        if current not in self._values:
            self._values[current] = Value.of(value if writes_of(current) else self._tensor(current))
        return Ref(current)

    def _current(self, node: fx.Node, position: int) -> int | None:
        """The id of the value that the tensor of `node` has right before `position`; None if it has none."""
        current = self._writes.value_at(node, position)
        if current is None:
            return None
        if isinstance(current, fx.Node):
            return value_id(self._index[current])
        writer = self._index[current.writer]
        written = value_id(writer, current.nth)
        if not current.reshaped:
            return written
        shape = Value.of(example_value(node)).shape
        return self._reshaped.setdefault((written, shape), value_id(writer, RESHAPED + len(self._reshaped)))

    def _place_of(self, node: fx.Node) -> Place | None:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return None
        key, (expression, _) = next(reversed(stack.items()))
        return self._place(key, expression)

    def _place(self, key: str, expression: str) -> Place:
        root, path = split_expression(expression)
        number = key.partition("@")[0]
        known = self._paths.get(int(number)) if root in FRAME_MODULE and number.isdigit() else None
        return Place(root, bare(path) if known is None else known)


def _unused(value: Any) -> Any:
    """An output for which the graph has no node."""
    return Absent(Value.of(value), UNUSED) if isinstance(value, torch.Tensor) else describe(value)


def _plain_numbers(value: Any) -> Any:
    """Sizes, with None for those that the graph computes."""
    return [None if isinstance(item, Seen) else item for item in value] if isinstance(value, (list, tuple)) else value


def _python_type(value: Any) -> str:
    for symbolic, name in ((torch.SymInt, "int"), (torch.SymFloat, "float"), (torch.SymBool, "bool")):
        if isinstance(value, symbolic):
            return name
    return type(value).__name__
