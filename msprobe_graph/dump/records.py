"""What travels from a tap to the disk: a step, its entries, and the records inside them.

A tap makes these on the hot path and never touches them again; the writer turns them into JSON. They are plain data: no
method here reads a tensor.

One entry as it comes out in dump.json::

    "Functional.linear.0.forward": {
      "input_args": [{"type": "torch.Tensor", "dtype": "torch.float32", "shape": [1, 4], "Max": 1.5, "Min": -0.5,
                      "Mean": 0.25, "Norm": 1.9, "requires_grad": false, "nan_count": 0, ...}, ...],
      "input_kwargs": {}, "output": [...]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from .saved import Sink
from .template import Filled, Table


class TensorRecord(msgspec.Struct, omit_defaults=True, gc=False):
    """A tensor, as a tap has read it and as dump.json holds it. A tap leaves the statistics open; the writer fills
    them in from the step's rows (`encode.complete`). A value that did not change since is the same record again, in
    this step or a later.

    The first eight fields and md5, data_name are msProbe's, in its order; the rest is ours.

    Max, Min, Mean and Norm (L2) are over all values and propagate NaN and infinities as torch's do; where a tensor
    holds such values, finite_* are the same over the finite values only. NaN is written as "nan", infinities as 1e999
    and -1e999.
    """

    type: str
    dtype: str
    shape: tuple[int, ...] | None
    Max: Any
    Min: Any
    Mean: Any
    Norm: Any
    requires_grad: bool
    md5: str | float | msgspec.UnsetType = msgspec.UNSET
    data_name: str | msgspec.UnsetType = msgspec.UNSET
    nan_count: int | msgspec.UnsetType = msgspec.UNSET
    posinf_count: int | msgspec.UnsetType = msgspec.UNSET
    neginf_count: int | msgspec.UnsetType = msgspec.UNSET
    finite_Max: Any = msgspec.UNSET
    finite_Min: Any = msgspec.UNSET
    finite_Mean: Any = msgspec.UNSET
    finite_Norm: Any = msgspec.UNSET
    reason: str | msgspec.UnsetType = msgspec.UNSET


class StackFrame(msgspec.Struct, frozen=True, gc=False):
    """One frame of a call stack."""

    path: str
    line: int
    function: str


class Entry(msgspec.Struct, gc=False):
    """One call in one direction: what went in, what came out, and where in the program it stood."""

    name: str
    parts: dict[str, Any]
    """``input_args``, ``input_kwargs``, ``output``, ``parameters`` or ``input``, ``output``: what dump.json holds of
    them, nested lists and dicts with TensorRecords in them, made by `encode.describe` where an argument is no
    tensor."""
    module: str | None = None
    """Qualified name of the module in whose forward the call was made ("" is the root, None is unknown)."""
    number: int = 0
    """Which call of that name within that module, from 0: joins programs whose global call numbers differ."""
    parent: str | None = None
    """The module entry that this entry ran inside."""
    stack: tuple[StackFrame, ...] | None = None
    nested: bool = True
    """Whether it has a place in construct.json (a module's parameters_grad has none)."""


class Hole(msgspec.Struct, frozen=True):
    """Something that should have been captured and was not."""

    site: str
    reason: str


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request of a serving step and the rows of the batch that belong to it: ``begin <= row < end``."""

    request: str
    begin: int
    end: int
    phase: Literal["prefill", "decode"] | None = None
    """decode: the rows are the token that was made last, and draft tokens after it. prefill: they are a prompt or a
    part of one, or what was known of a request that has to be computed anew. None where nobody knows."""
    positions: tuple[int, int] | None = None
    """Where the rows' tokens stand in the request's sequence: from the first up to but without the second."""


class Flushed(msgspec.Struct, frozen=True):
    """Why steps that were kept in memory have been written: see `ring.Ring`."""

    on: str
    """nan, inf, request, signal or rpc."""
    step: int
    """In which step that came: the one that ran, or, between steps, the last."""
    entry: str | None = None
    position: str | None = None
    """Where a NaN or an infinity came up first."""
    requests: tuple[str, ...] = ()
    """The requests of that step; of a NaN or an infinity those in whose rows it is, where the values were there to
    tell."""


NOT_REPLAYED = "no graph that computes it was replayed in this step"
OVERRUN = "graphs that compute them were replayed more than once in this step; the statistics are of the last time"


FULL = "not saved: the dump has reached max_bytes"


class Replayed(msgspec.Struct, frozen=True, gc=False):
    """What only the device can tell of a value that a replayed graph has measured."""

    shape: tuple[int, ...]
    times: int
    """How often it was computed in the step; the statistics are of the last time."""


class Statistics(msgspec.Struct, frozen=True, gc=False):
    """The statistics of one tensor.

    `max`, `min`, `mean` and `norm` (the L2 norm over all elements) are what torch.max, torch.min, torch.mean and
    torch.norm make of NaN and infinities, but computed in float64: 16 elements of 60000 in float16 have the norm
    240000. Of a complex tensor they are those of its absolute values. `max` and `min` are exact ints for integer
    dtypes and bools for torch.bool. All four are None for an empty tensor.

    `finite_max` to `finite_norm` are the same over the finite values alone: None unless the tensor holds finite values
    and others.

    Of torch.tensor([3.0, 4.0, float("inf")]):
    Statistics(max=inf, min=3.0, mean=inf, norm=inf, nan_count=0, posinf_count=1, neginf_count=0,
               finite_max=4.0, finite_min=3.0, finite_mean=3.5, finite_norm=5.0)
    """

    max: float | int | bool | None
    min: float | int | bool | None
    mean: float | None
    norm: float | None
    nan_count: int = 0
    posinf_count: int = 0
    neginf_count: int = 0
    finite_max: float | None = None
    finite_min: float | None = None
    finite_mean: float | None = None
    finite_norm: float | None = None
    replayed: Replayed | None = None
    """Of a value that a CUDA graph has measured."""


class RowSource(Protocol):
    """Where the writer reads a step's statistics."""

    def fetch(self) -> Sequence[Statistics | None]:
        """The statistics of all rows so far, by row number; None where nothing was measured, because the graph that
        would have was not replayed. May wait for a device."""


Shared = tuple[TensorRecord, TensorRecord, "tuple[int | None, ...] | Literal['same'] | None"]
"""A record, another one with the same values, and the shape of that if it is still to be found out: see
`encode.share`."""


class Block(NamedTuple):
    """The entries of a call that a CUDA graph has replayed."""

    entries: Sequence[Entry]
    measured: Sequence[TensorRecord]
    """The records in them that this step has measured."""
    holes: Sequence[Hole]
    graphs: Mapping[int, dict[str, Any]]
    """As `Step.graphs`."""
    lines: bytes | Filled | None = None
    """What dump.json holds of them, where that is known without filling in their records."""


class Arriving(Table, Protocol):
    """A table that a device may still write."""

    @property
    def kind(self) -> tuple[bytes, bytes] | None:
        """Of a table of slots, as int64s: how often each was written, and the numbers of the shapes. Waits for the
        device. None of a table that holds numbers alone."""

    def lies_at(self) -> tuple[int, int, int, int] | None:
        """The address, without waiting; how many slots there are; the address of a C function that gives 0 for an event
        that has happened and 600 for one that has not; and that event. No function: all is there. None where there is
        no such function."""


class Replay(Protocol):
    """A call that a CUDA graph may have replayed in a step. The device tells; to be asked when all other records of the
    step are complete."""

    def complete(self) -> Block | None:
        """With all records filled in; None if it was not replayed."""

    def encode(self) -> Block | None:
        """The same with `lines` in place of the records, but where files are still to be told in these."""

    @property
    def form(self) -> object:
        """Equal to that of another step's where the two differ in nothing but what the device has written."""

    @property
    def arrival(self) -> Arriving | None:
        """Where that comes to be."""


class Copies(Protocol):
    """Values that CUDA graphs may have copied in a step."""

    def save(self, sink: Sink) -> Sequence[Hole]:
        """Make files of those that were, and tell their names in the records, which are complete but for that. What
        can't be saved is a hole."""


class Alike(Protocol):
    """What a step has measured of calls that are like those of earlier steps."""

    def encode(self, entries: Sequence[Entry]) -> bytes | Filled:
        """What dump.json holds of the step's entries, among which are those calls', when all other records are
        complete. To be asked step after step."""

    @property
    def form(self) -> object:
        """Equal to that of another step's where the two differ in nothing but numbers."""

    @property
    def tables(self) -> Sequence[Arriving]:
        """Where these come to be: always the same objects."""


class Step(msgspec.Struct):
    """All that one step has captured."""

    number: int
    entries: list[Entry] = []
    rows: RowSource | None = None
    """Where the statistics of this step's records come from; None where none were taken."""
    records: dict[int, TensorRecord] = {}
    """The records that this step has measured, by row."""
    shared: list[Shared] = []
    """Records with the statistics of another one."""
    alike: Alike | None = None
    replays: list[Replay] = []
    """What was replayed stands before all entries, in this order."""
    blocks: list[Block] = []
    """What the replays have turned out to be, where they are encoded already."""
    copies: list[Copies] = []
    """Of these, files are made when all records are complete."""
    arriving: int = 0
    """Bytes of the host's memory that the copies take until the step is complete."""
    holes: list[Hole] = []
    requests: list[Request] = []
    graphs: dict[int, dict[str, Any]] = {}
    """The compiled graphs that ran in this step, by id: what compiled them, and what the taps changed."""
    saved: dict[str, Any] = {}
    """What PrecisionDebugger.save() was given (level "debug"), by name: written to debug.json."""
    expected: int = 0
    """Sites that the configuration asked for in this step, as far as they are known before it runs (modules at L0,
    mix)."""
    captured: int = 0
    """How many of those were captured."""
    measured: list[TensorRecord] = []
    """The records whose statistics are of this step; filled in by the writer."""
    flushed: Flushed | None = None
    """Why it was written; None where every step is."""
    finished: bool = False
    """False while the step may still grow (stop() was called, step() was not)."""

    @property
    def all_entries(self) -> Iterator[Entry]:
        """Those that are encoded already, and the others."""
        return chain(chain.from_iterable(block.entries for block in self.blocks), self.entries)
