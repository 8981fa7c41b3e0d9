"""What is known of one graph before it runs: the calls in it, and which of its values each of them read and gave.

Plain data, made by `naming` from dynamo's graph and read by `region` at run time. Everything in it is relative to what
was compiled, because one compiled graph can serve many layers: module paths get their prefix, and calls their numbers,
when the graph runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import msgspec
import torch

from msprobe_graph.dump.records import StackFrame

from .beside import Beside


class Value(msgspec.Struct, frozen=True):
    """A tensor of dynamo's graph, as it was when the graph was traced. A dynamic size is None."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Value:
        shape = tuple(size if type(size) is int else None for size in tensor.shape)
        return cls(shape, tensor.dtype, tensor.requires_grad)

    def fits(self, found: Any) -> bool:
        """Whether it is a tensor of that dtype and these sizes."""
        return (
            isinstance(found, torch.Tensor)
            and found.dtype == self.dtype
            and len(found.shape) == len(self.shape)
            and all(own in (None, size) for own, size in zip(self.shape, found.shape, strict=True))
        )


class Ref(msgspec.Struct, frozen=True):
    """Stands in a call's arguments or results for the value of this id.

    The value of the node at index n of dynamo's graph has the id 2n (and high bits, if it is an argument that the node
    has written); the gradient of the loss with respect to it has the next id.
    """

    id: int
    told: bool = True
    """False: of a gradient, that it can't be told from the gradient that the rest of the program gives."""


class Absent(msgspec.Struct, frozen=True):
    """Stands in a call's arguments or results for a tensor that is no value of the graph's."""

    value: Value
    reason: str


_WRITTEN = 40
"""The bit of an id from which on it counts the arguments that a node has written."""


def value_id(index: int, nth: int = 0) -> int:
    """Of what the node at `index` gives, or of the `nth` argument, counted from 1, that it writes."""
    return (nth << _WRITTEN) + 2 * index


def node_of(id: int) -> int:
    """The index of the node that the value, or gradient, of that id belongs to."""
    return (id & ((1 << _WRITTEN) - 1)) // 2


def writes_of(id: int) -> int:
    """Which of the arguments that its node writes the value is; 0 if it is what the node gives."""
    return id >> _WRITTEN


def valued(id: int) -> int:
    """The id itself, or for a gradient that of the value that it belongs to."""
    return id & ~1


def gradient_id(value: int) -> int:
    """The id of the gradient with respect to the value of id `value`."""
    return value + 1


def refs(nest: Any) -> Iterator[Ref]:
    """The values that a call's arguments or results refer to."""
    return (tensor for tensor in tensors(nest) if isinstance(tensor, Ref))


def tensors(nest: Any) -> Iterator[Ref | Absent]:
    """All tensors among a call's arguments or results."""
    if isinstance(nest, (Ref, Absent)):
        yield nest
    elif isinstance(nest, (list, dict)):
        for item in nest.values() if isinstance(nest, dict) else nest:
            yield from tensors(item)


def fixed_parts(nest: Any) -> Iterator[Any]:
    """The parts of a nest that hold no tensors, the largest ones."""
    if not any(True for _ in tensors(nest)):
        yield nest
    elif isinstance(nest, (list, dict)):
        for item in nest.values() if isinstance(nest, dict) else nest:
            yield from fixed_parts(item)


def fixed_in(calls: list[Call]) -> set[int]:
    """See Plan.fixed."""
    return {id(part) for call in calls for part in fixed_parts([call.args, call.kwargs, call.output])}


class Place(msgspec.Struct, frozen=True):
    """A module, by the variable of the compiled frame that it was reached from ("L['self']") and the path from there
    ("layers.0")."""

    root: str
    path: str


class Call(msgspec.Struct):
    """One call in the graph: of a module, or of a torch function. It becomes an entry at each run of the graph."""

    kind: Literal["module", "api"]
    name: str
    """A module's class, a function's name in dumps ("Functional.linear")."""
    place: Place | None
    """The module itself, or the one in whose forward the function was called. None: in none that the graph knows."""
    begin: int
    end: int
    """Both are places in the program's order: an inner call begins after its outer one and ends before it."""
    args: list[Any] = []
    """Nests with `Ref`s in place of tensors, and everything else as `encode.describe` puts it."""
    kwargs: dict[str, Any] = {}
    output: list[Any] = []
    inside: int | None = None
    """The module call in which this one was made, as an index into the plan's calls."""
    given: list[Ref | None] = []
    """For the backward entry: the gradient of each tensor among the outputs, None for one that has none."""
    gives: list[Ref | None] = []
    """The same for the tensors among the inputs. Of modules only."""
    stack: tuple[StackFrame, ...] = ()
    """Innermost frame first; of functions only."""


class Part(msgspec.Struct, frozen=True):
    """A value that is a part of another one along one dimension: ``other.narrow(dim, start, length)``."""

    id: int
    dim: int
    start: int
    length: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.narrow(self.dim, self.start, self.length)


class Plan(msgspec.Struct):
    """One graph."""

    calls: list[Call]
    """In the order in which they begin."""
    values: dict[int, Value]
    """By id: all tensors that calls refer to, gradients left out."""
    inputs: dict[int, int]
    """Ids of those among them that are inputs of the graph, with their positions."""
    outputs: dict[int, int]
    """Ids of those that the graph returns, with their positions."""
    anchors: dict[str, list[tuple[int, str]]]
    """By a place's root: inputs that are parameters or buffers below it, as position and path. At run time they tell
    which module the root is."""
    beside: Beside | None = None
    """Those tensors that calls refer to and the graph doesn't take. They count as inputs behind its own."""
    same: dict[int, int] = {}
    """Ids of values that are views of others with all their elements, and the ids of these."""
    reshaped: dict[int, list[int]] = {}
    """By the id of a value: those of its views that can be had from it, by Tensor.reshape, where they have no memory of
    their own."""
    parts: dict[int, list[Part]] = {}
    """By the id of a value: those that are parts of it, such as what split gives."""
    ending: list[int] = []
    """The calls, by index, in the order in which they end."""
    fixed: set[int] = set()
    """The Python ids of those parts of the nests that hold no tensors, so that a run need not look into them."""
    holes: list[str] = []
    """What could not be learned of the graph, one sentence each."""

    @property
    def not_taken(self) -> Collection[int]:
        """Ids of the tensors beside the graph."""
        return () if self.beside is None else self.beside.ways

    @property
    def columns(self) -> dict[int, tuple[int, Part]]:
        """By the id of a part that has all rows (dimension 0) of another value: the id of that one, and which part."""
        return {part.id: (whole, part) for whole, parts in self.parts.items() for part in parts if part.dim}

    @property
    def views(self) -> dict[int, int]:
        """By the id of a view in `reshaped`: what it is a view of."""
        return {view: base for base, views in self.reshaped.items() for view in views}

    def with_parts(self, values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """`values`, by id, and their parts."""
        found: dict[int, torch.Tensor] = {}
        left = list(values.items())
        while left:
            id, value = left.pop()
            found[id] = value
            left += [(part.id, part.of(value)) for part in self.parts.get(id, ()) if part.id not in values]
        return found
