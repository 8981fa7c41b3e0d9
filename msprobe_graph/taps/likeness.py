"""Calls that are like calls of an earlier step: only their values are read, into the records that were made then.

From step to step most calls of a model differ in nothing but numbers. So what the values of a call were like is kept: a
`Likeness`. Where the values of a later call are found to be like them, its tensors are measured without being described
anew. The code that compares and measures, in pattern/, is optional: without it each call is described anew.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import msgspec
import torch
from torch.nn.parameter import is_lazy

from msprobe_graph.dump.encode import describe
from msprobe_graph.dump.records import Entry, TensorRecord

from . import native
from .rows import has_triton
from .unmeasurable import PLAIN

if TYPE_CHECKING:
    from .launches import Launch
    from .versions import Versions

T = TypeVar("T")

FORMS = 16
"""Of a call as many forms are kept: what a model is given in decode steps and prefill steps, say, takes turns."""
MAX_DEPTH = 10
"""Arguments nested deeper than this are recorded by their type only."""


class Pattern(Protocol):
    """What values are to be like, part by part."""


class Table(Protocol):
    """The rows of one step. `begin` and `end` raise nothing: what they can't do is to be done anew.

    Made with `without_gradients`, calls that autograd records are like no others; nor is any call if, when the first is
    looked at, `weights` don't stand.
    """

    def begin(
        self,
        numbers: dict[str, int],
        within: dict[tuple[str, str | None], int] | None,
        stack: list[Any],
        name: str,
        earlier: Mapping[int, list[EarlierCall]],
        given: object,
    ) -> EarlierCall | None:
        """Where a call begins like one of the earlier ones of its number: count it, and measure what it was given. Of
        these the one that was found comes first from then on.

        To be called in the frame that the earlier one's was walked from. numbers, within: calls counted so far, by
        name, and by name and module where that counts. stack: the module calls that run, innermost last; a module's
        call is pushed there.
        """

    def end(
        self,
        entries: dict[str, Entry],
        earlier: EarlierCall,
        returned: object,
        parameters: Mapping[str, torch.Tensor | None] | None,
    ) -> bool | None:
        """True if the call has also ended like that earlier one: then what it returned is measured, and its entry is
        among `entries`. `parameters` are those of a module."""

    def measure(self, likeness: Likeness, values: object) -> bool:
        """Measure `values` if they are like those."""

    def calls(self) -> list[tuple[Likeness, int, int]]:
        """What was measured: likenesses with records, each with the numbers of their first rows, of those on the CPU
        and of those on a GPU."""

    def contents(self) -> bytes:
        """All rows of tensors on the CPU, as `statistics.ROW` has them."""

    def attach(self, device: int, stream: int, address: int, rows: int) -> None:
        """Rows in a GPU's memory, for tensors there; without them calls with such tensors are like no others."""

    def headers(self) -> bytes:
        """Of each value that was measured there the number of its header's row, as int64s."""

    def ran_out(self) -> bool:
        """Whether they were too few."""


class Probes(Protocol):
    """Tensors as they were: each a weak reference, address, elements, their size in bytes, and fingerprint."""


class Likeness(NamedTuple):
    """What the values of a call were like."""

    pattern: Pattern
    records: Sequence[TensorRecord]
    """Of the tensors that are measured, in the order of their rows."""
    dtypes: Sequence[torch.dtype]
    on_gpu: Sequence[bool]
    """Where each is measured."""
    gpu: torch.device | None
    """The GPU among those places."""


class Anchor(Protocol):
    """Where a call was made."""

    @property
    def stack(self) -> object:
        """Equal ones are the same."""

    @property
    def walk(self) -> Hashable:
        """What the frames above it are known by, up to the call of the module that runs: see `stack_key`."""

    @property
    def outer(self) -> object:
        """That call's stack."""


class EarlierCall(NamedTuple):
    """A call as it was in an earlier step; calls.h has the same order."""

    entry: Entry
    inputs: Likeness
    outputs: Likeness
    """Of what it returned, and of a module's own parameters."""
    anchor: Anchor | None
    """Where it was called; None where stacks are not wanted."""
    call: Any
    """A module's call, which serves again; None of a function."""

    def begun(self) -> Entry:
        """The entry of a call that has begun like this one and goes on differently."""
        parts = {key: part for key, part in self.entry.parts.items() if key in ("input_args", "input_kwargs")}
        return msgspec.structs.replace(self.entry, parts=parts)

    def keep_in(self, forms: list[EarlierCall]) -> None:
        """Put it in front of the other forms of that call, of which those not seen for long are forgotten."""
        forms.insert(0, self)
        del forms[FORMS:]

    def take_from(self, forms: list[EarlierCall]) -> None:
        """It is no form of that call any more."""
        forms[:] = [each for each in forms if each is not self]


class Kind(IntEnum):
    """What is looked at of a value; likeness.h has the same order."""

    TENSOR = 0
    """A plain tensor in the CPU's memory of the same dtype, shape and requires_grad. It is measured."""
    WEIGHT = 1
    """The same nn.Parameter, which nobody has written to."""
    EQUAL = 2
    """The same value."""
    TYPE = 3
    """Only its type, which is all that is recorded of it."""
    ITEMS = 4
    """A list or tuple, with its items."""
    KEYS = 5
    """A dict, with its values."""
    FIELDS = 6
    """A dataclass, with its fields."""
    ON_GPU = 7
    """As TENSOR, but on a GPU, and lying in its memory the same way."""
    FORM = 8
    """A tensor of the same type, dtype, shape and requires_grad. It is not measured."""


def anything(kind: type) -> Likeness | None:
    """What all values of that type are like: nothing of them is measured."""
    known = extension()
    return None if known is None else Likeness(known.Pattern([_Part(Kind.TYPE, kind)]), [], [], [], None)


def form(values: object) -> Likeness | None:
    """What values are like that are not measured: the same weights, tensors of the same form, and the same of
    everything else. None where that can't be told."""
    known = extension()
    if known is None:
        return None
    parts = [part for part, _ in _parts(values, -2, _form)]
    pattern = None if None in parts else _pattern(known, parts)
    return None if pattern is None else Likeness(pattern, [], [], [], None)


class _Part(NamedTuple):
    """One line of a pattern, as likeness.h reads it."""

    kind: Kind
    type: type
    object: object = None
    """WEIGHT: a weak reference to it. EQUAL: the value. KEYS, FIELDS: the names."""
    size: int = 0
    """ITEMS: how many there are."""
    code: int = 0
    """Of a tensor's dtype, in statistics.c."""
    tensor: torch.Tensor | None = None
    """What is to be like it, as it is now. It is not kept."""
    launch: Launch | None = None
    """ON_GPU."""


class _Extension(Protocol):
    def Pattern(self, parts: Sequence[_Part | None]) -> Pattern:
        """Of no None. BufferError for a tensor that has no memory of its own."""

    def Table(self, without_gradients: bool, weights: Probes | None) -> Table: ...

    def Probes(self, tensors: Sequence[tuple[object, int, int, int, int]]) -> Probes: ...

    def Versions(self, counter: object, tensors: list[torch.Tensor]) -> Versions: ...

    def set_up(self, *functions: object) -> None: ...

    def set_up_gpu(self, *functions: object) -> None: ...

    def launch(self, kernel: tuple[int, int, int, int], grid: int, stream: int, *parameters: int) -> bool:
        """Launch a `launching.Kernel` on the current device; False if the driver refuses. `parameters` are pointers and
        int64s."""

    def stack_key(self, frame: FrameType, end: FrameType | None) -> bytes | None:
        """Code objects and instructions of the frames up to but without `end`; None where that is not among them."""


@functools.cache
def extension() -> _Extension | None:
    """The compiled code in pattern/; None without it."""
    library = native.library()
    try:
        found = cast("_Extension", importlib.import_module("._pattern", __package__))
    except ImportError:
        return None
    if library is None:
        return None
    found.set_up(
        *library.addresses,
        torch.Tensor.__dlpack_c_exchange_api__,
        torch._C._len_torch_function_stack,
        torch._C.DisableTorchFunction,
        torch._C._disabled_torch_function_impl,
        torch.is_grad_enabled,
    )
    return found


def likeness(values: object, described: object, records: object) -> Likeness | None:
    """What `values` are like; None where that can't be told, or they lie on several GPUs.

    values: a tuple of lists or dicts of values, such as the arguments by position and by name.
    described: a nest with the same tensors, in which `records` (a nest, too) has the record of each.
    """
    known = extension()
    if known is None:
        return None
    tensors, of_each = list(_found(described, torch.Tensor, -2)), list(_found(records, TensorRecord, -2))
    if len(tensors) != len(of_each):
        return None
    waiting: defaultdict[int, list[TensorRecord]] = defaultdict(list)
    for each, record in zip(reversed(tensors), reversed(of_each), strict=True):
        waiting[id(each)].append(record)
    parts: list[_Part] = []
    measured: list[TensorRecord] = []
    dtypes: list[torch.dtype] = []
    on_gpu: list[bool] = []
    gpus: set[torch.device] = set()
    for part, tensor in _parts(values, -2, _tensor):
        if part is None:
            return None
        parts.append(part)
        if tensor is None:
            continue
        if not waiting[id(tensor)]:
            return None
        record = waiting[id(tensor)].pop()
        if record.reason is not msgspec.UNSET:
            return None
        if part.kind in (Kind.TENSOR, Kind.ON_GPU):
            measured.append(record)
            dtypes.append(tensor.dtype)
            on_gpu.append(part.kind is Kind.ON_GPU)
            if on_gpu[-1]:
                gpus.add(tensor.device)
    pattern = _pattern(known, parts) if len(gpus) < 2 else None
    return None if pattern is None else Likeness(pattern, measured, dtypes, on_gpu, gpus.pop() if gpus else None)


def _pattern(known: _Extension, parts: Sequence[_Part | None]) -> Pattern | None:
    """None where a tensor has no memory of its own."""
    try:
        return known.Pattern(parts)
    except BufferError:
        return None


def _parts(
    value: Any, depth: int, of_tensor: Callable[[torch.Tensor], _Part | None]
) -> Iterator[tuple[_Part | None, torch.Tensor | None]]:
    """The lines for `value`, with the tensor that one is for. None in place of a line where there can be none."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        yield of_tensor(value), value
        return
    children = contents(value) if depth < MAX_DEPTH else None
    if children is None:
        described = describe(value)
        by_type = described is not None and all(each is None for key, each in described.items() if key != "type")
        yield _Part(Kind.TYPE, kind) if by_type else _Part(Kind.EQUAL, kind, value), None
        return
    if isinstance(value, (list, tuple)):
        yield _Part(Kind.ITEMS, kind, size=len(value)), None
    else:
        yield _Part(Kind.KEYS if isinstance(value, dict) else Kind.FIELDS, kind, tuple(children)), None
    for child in children.values() if isinstance(children, Mapping) else children:
        yield from _parts(child, depth + 1, of_tensor)


def _tensor(tensor: torch.Tensor) -> _Part | None:
    """The line for a tensor that is measured, unless it is a weight."""
    form = _form(tensor)
    if form is None or form.kind is Kind.WEIGHT:
        return form
    if form.type not in PLAIN:
        return None
    if tensor.is_cpu:
        return form._replace(kind=Kind.TENSOR) if tensor.numel() < native.LARGE else None
    if not (tensor.is_cuda and has_triton()):
        return None
    if not tensor.numel():
        return form
    from .launches import launch_of

    launch = launch_of(tensor)
    return launch and form._replace(kind=Kind.ON_GPU, launch=launch)


def _form(tensor: torch.Tensor) -> _Part | None:
    """The line for a tensor that is not measured."""
    kind = type(tensor)
    code = native.CODES.get(tensor.dtype)
    if code is None or tensor.is_nested:
        return None
    if is_weight(tensor) and not tensor.is_inference():
        return _Part(Kind.WEIGHT, kind, weakref.ref(tensor), code=code, tensor=tensor)
    return _Part(Kind.FORM, kind, code=code, tensor=tensor)


def _found(nest: Any, kind: type[T], depth: int) -> Iterator[T]:
    """What is of that kind in a nest, as deep as its contents are recorded."""
    if isinstance(nest, kind):
        yield nest
        return
    children = contents(nest) if depth < MAX_DEPTH else None
    if children is not None:
        for child in children.values() if isinstance(children, Mapping) else children:
            yield from _found(child, kind, depth + 1)


def is_weight(tensor: torch.Tensor) -> bool:
    """Whether it is an nn.Parameter, or of a class made from that, as vLLM's are, and has a value yet."""
    return issubclass(type(tensor), torch.nn.Parameter) and not is_lazy(tensor)


def contents(value: Any) -> Sequence[Any] | Mapping[Any, Any] | None:
    """What is recorded of a value one by one: its items, or by name its fields; None of what is recorded as it is."""
    if isinstance(value, (list, tuple)) and type(value) is not torch.Size:
        if hasattr(value, "_fields"):
            return {name: getattr(value, name) for name in value._fields}
        return value
    if isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None
