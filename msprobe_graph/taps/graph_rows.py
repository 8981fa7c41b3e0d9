"""Rows that a CUDA graph writes each time it is replayed. No Python runs then: all is laid out when it is captured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeGuard

import torch
import triton.language as tl

from . import triton_listed as kernels
from .arrival import Arrival, Shape, Slot
from .graph_copies import GraphCopies
from .landing import Landings
from .launching import current_stream, launch, on_device
from .triton_copies import AT_ONCE, WORDS_PER_PROGRAM, copy_listed, copy_plain
from .triton_rows import DENSE, KINDS, WARPS, layout, meaning, parts

ROWS = 1 << 20
"""Of 64 bytes, for the parts of all values."""
VALUES = 1 << 17
"""Of 128 bytes, for a description of each value of each graph."""
OWNERS = 1 << 24
"""Of 4 bytes, for the parts of all of these: which value each is of."""
TOGETHER = 8 << 20
"""Bytes of values that are measured together. To read so many takes about as long as to launch what does."""
MOST_STANDING = 64 << 20
"""Bytes of values that memory is kept for, until they are measured."""
SMALL = 1 << 20
"""Bytes of values that are copied in about the time that any kernel takes."""
WORD = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}
"""What an element of so many bytes is copied as."""


class Group(NamedTuple):
    """What one launch can measure together."""

    dtype: torch.dtype
    strided: int
    aligned: bool
    """See `triton_listed.measure_listed`."""


class Entry(NamedTuple):
    """One value, as `triton_listed.describe` takes it, but for its place and the number of its first part."""

    address: int
    elements: int
    inner: int
    each: int
    parts: int
    header: int
    tag: int
    s1: int
    s2: int
    s3: int
    t0: int
    t1: int
    t2: int
    t3: int
    copy: int


class Listed:
    """Values that are to be measured together."""

    def __init__(self) -> None:
        self.groups: defaultdict[Group, list[Entry]] = defaultdict(list)
        self.slots: set[Slot] = set()
        self.bytes = 0
        self.places: set[tuple[int, int]] = set()
        """Of those that lie in one piece: address and bytes."""
        self._tensors: list[torch.Tensor] = []
        """Referred to, so that their memory serves nothing else meanwhile."""

    def add(self, slot: Slot, tensor: torch.Tensor, group: Group, entry: Entry) -> None:
        self.groups[group].append(entry)
        self.slots.add(slot)
        self.bytes += tensor.nbytes
        if tensor.is_contiguous():
            self.places.add((tensor.data_ptr(), tensor.nbytes))
        self._tensors.append(tensor)


class GraphRows:
    """Does what `RowsInGraphs` says. To be made before the first graph is captured: its memory is no graph's."""

    def __init__(self, device: torch.device, copies: GraphCopies | None = None) -> None:
        """`copies`: None where nothing is to be copied."""
        self.device = device
        self._copies = copies
        self._landings = Landings()
        self._slots: list[Slot] = []
        self._shapes: list[Shape] = []
        self._used_rows = 0
        self._used_values = 0
        self._used_parts = 0
        self._state = (0, 0, -1)
        """As `switch` was told."""
        self._waits = False
        """There was something aside since anyone waited for it."""
        self._prepared: set[Group] = set()
        self._standing = Listed()
        """What the graph that is being captured is to measure when that is enough, or when it is told to `join`. A
        decode step's kernels are short: a launch between them takes as long as they do, however little it reads."""
        self._measuring: dict[torch.cuda.Event, Listed] = {}
        """What it measures beside its other kernels, in order, by the events that tell that this is done."""
        with torch.cuda.device(device):
            self._rows = torch.zeros((ROWS, 8), dtype=torch.int64, device=device)
            self._table = torch.zeros((VALUES, kernels.FIELDS.value), dtype=torch.int64, device=device)
            self._owners = torch.zeros(OWNERS, dtype=torch.int32, device=device)
            """Of each part, by number: its value's row of the table."""
            self._headers = torch.zeros(VALUES, dtype=torch.int64, device=device)
            """Of each slot, by number: its header's row."""
            self._control = torch.zeros(3, dtype=torch.int64, device=device)
            self._outside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            """What is not to become part of a graph runs here, while one is captured. Nothing is measured before it is
            over: `switch` waits for it, and to capture within a step takes longer."""
            self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            """The branch of a graph that is being captured in which it measures what stands."""
            for dtype, kind in KINDS.items():
                if kind.bytes:
                    meaning(dtype, device)
            kernels.describe[(1,)](self._table, self._owners, 0, *(0,) * 7, *DENSE[1:], 0, 0)
            kernels.put[(1,)](self._headers, 0, 0)
            _copy([(0, 0, 0)])
            torch.cuda.synchronize(device)

    def takes(self, value: object) -> TypeGuard[torch.Tensor]:
        return (
            isinstance(value, torch.Tensor)
            and value.device == self.device
            and value.dtype in KINDS
            and value.layout is torch.strided
            and value.numel() > 0
            and not value.is_neg()
            and layout(value) is not None
        )

    def prepare(self, values: Iterable[torch.Tensor]) -> None:
        for tensor in values:
            lies = layout(tensor)
            if tensor.dtype not in KINDS or lies is None or self._state[0]:
                continue
            for aligned in {False, tensor.data_ptr() % 16 == 0}:
                group = Group(tensor.dtype, lies.strided, aligned)
                if group not in self._prepared:
                    self._prepared.add(group)
                    self._launch(group, 0, 1)  # which does nothing: nothing is switched on
                    if self._copies is not None:
                        self._launch_copy(group, 0, 1)

    def measure(
        self,
        values: Iterable[tuple[Sequence[Slot], torch.Tensor]],
        padded: int | None,
        copied: Collection[int] = (),
        standing: bool = False,
    ) -> list[Slot]:
        now = Listed()
        taken: list[Slot] = []
        for position, (slots, tensor) in enumerate(values):
            lies = layout(tensor)
            assert lies is not None
            kind, count, address = KINDS[tensor.dtype], tensor.numel(), tensor.data_ptr()
            number_of_parts, each = parts(count, kind.block)
            slot = next((slot for slot in slots if slot.room >= number_of_parts), None) or self._slot(number_of_parts)
            taken.append(slot)
            shape = Shape.of(tensor, padded)
            copy = 0
            if self._copies is not None and position in copied:
                shape = self._copies.placed(shape, slot, tensor)
                copy = 0 if shape.place is None else self._copies.memory(shape.place, tensor.nbytes).data_ptr()
            inner = count // tensor.shape[0] if shape.batch else 0
            tag = len(self._shapes)
            self._shapes.append(shape)
            entry = Entry(address, count, inner, each, number_of_parts, slot.header, tag, *lies[1:], copy)
            if standing and slot in self._standing.slots:  # a launch writes each but once
                self.join()
            (self._standing if standing else now).add(
                slot, tensor, Group(tensor.dtype, lies.strided, not (address % 16 or count % 16 or inner % 16)), entry
            )
        self._measure(now)
        if self._standing.bytes > TOGETHER:
            self._branch()
        return taken

    def keep(self, values: Mapping[int, object]) -> dict[int, torch.Tensor]:
        copies: dict[tuple[object, ...], torch.Tensor] = {}
        moves: list[tuple[int, int, int]] = []
        kept = {}
        for id, value in values.items():
            if not self.takes(value) or not value.is_contiguous():
                continue
            address, size = value.data_ptr(), value.nbytes
            if any((address, size) in listed.places for listed in (self._standing, *self._measuring.values())):
                kept[id] = value
            elif size <= SMALL and not (address % 16 or size % 16):  # `prepare` has seen what lies as its copy
                same = address, value.dtype, value.shape
                if same not in copies:
                    copies[same] = torch.empty_like(value)
                    moves.append((address, copies[same].data_ptr(), size // 8))
                kept[id] = copies[same]
        for at in range(0, len(moves), AT_ONCE):
            _copy(moves[at : at + AT_ONCE])
        return kept

    def join(self) -> None:
        # Whatever fails here, the next graph has nothing to do with it.
        measuring, self._measuring = self._measuring, {}
        standing, self._standing = self._standing, Listed()
        if measuring:
            torch.cuda.current_stream(self.device).wait_event(next(reversed(measuring)))
        self._measure(standing)

    def _branch(self) -> None:
        """Measure what stands, beside what the graph goes on with."""
        main = torch.cuda.current_stream(self.device)
        standing, self._standing = self._standing, Listed()
        self._beside.wait_stream(main)
        try:
            with torch.cuda.stream(self._beside):
                self._measure(standing)
        finally:
            self._measuring[self._beside.record_event()] = standing
        while sum(listed.bytes for listed in self._measuring.values()) > MOST_STANDING:
            done = next(iter(self._measuring))
            main.wait_event(done)
            del self._measuring[done]

    def _measure(self, listed: Listed) -> None:
        without_room = 0
        for group, entries in listed.groups.items():
            first, count = self._used_parts, sum(entry.parts for entry in entries)
            if self._used_values + len(entries) > VALUES or first + count > OWNERS:
                without_room += len(entries)
                continue
            with self._aside():
                for entry in entries:
                    kernels.describe[(1,)](self._table, self._owners, self._used_values, *entry, self._used_parts)
                    self._used_values += 1
                    self._used_parts += entry.parts
            self._launch(group, first, count)
            if any(entry.copy for entry in entries):
                self._launch_copy(group, first, count)
        if without_room:
            raise MemoryError(
                f"{without_room} values have no room: there are more than {VALUES}, or than {OWNERS} parts of values, "
                "in CUDA graphs"
            )

    def switch(self, on: bool, begin: int = 0, end: int = -1) -> None:
        state = (1, begin, end) if on else (0, *self._state[1:])
        if state != self._state or self._waits:
            with on_device(self.device):
                self._wait()
                if state != self._state:
                    self._state = state
                    launch(kernels.set_control, 1, self._control, *state)

    def arrive(self, copied: Collection[Slot] = ()) -> Arrival | None:
        count = len(self._slots)
        if not count:
            return None
        with on_device(self.device):
            return self._arrive(count, copied)

    def _arrive(self, count: int, copied: Collection[Slot]) -> Arrival:
        rows = self._state[1], self._state[2]
        self._wait()
        stream = current_stream(self.device.index)
        landing = self._landings.bring(self._rows, self._headers, count, stream, anew=True)
        copies = None if self._copies is None else self._copies.bring(copied, rows)
        landing.expect(stream)
        return Arrival(landing, self._shapes, rows, copies)

    def _aside(self) -> torch.cuda.StreamContext:
        """A context beside the graph that is being captured. There are few streams, so the one that was taken may come
        to be one that is captured: then another is taken. A capture begins when all else is done."""
        self._waits = True
        while True:
            with torch.cuda.stream(self._outside):
                free = not torch.cuda.is_current_stream_capturing()
            if free:
                return torch.cuda.stream(self._outside)
            self._outside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _wait(self) -> None:
        if self._waits:
            self._waits = False
            torch.cuda.current_stream(self.device).wait_stream(self._outside)

    def _slot(self, room: int) -> Slot:
        header, self._used_rows = self._used_rows, self._used_rows + room + 1
        if self._used_rows > ROWS:
            raise MemoryError(f"the parts of values in CUDA graphs take more than {ROWS} rows")
        slot = Slot(len(self._slots), header, room)
        self._slots.append(slot)
        with self._aside():
            kernels.put[(1,)](self._headers, slot.number, header)
        return slot

    def _launch(self, group: Group, first: int, count: int) -> None:
        """Measure so many parts, by number from the first."""
        kind = KINDS[group.dtype]
        # On the current device: what is captured, or prepared for that, is on this one.
        kernels.measure_listed[(count,)](
            self._table, self._owners, meaning(group.dtype, self.device) if kind.bytes else None, self._rows,
            self._control, first,
            ELEMENT=kind.element, STRIDED=group.strided, ALIGNED=group.aligned, **kind.constants, num_warps=WARPS,
        )  # fmt: skip

    def _launch_copy(self, group: Group, first: int, count: int) -> None:
        copy_listed[(count,)](
            self._table, self._owners, self._control, first,
            ELEMENT=WORD[group.dtype.itemsize], BLOCK=KINDS[group.dtype].block, STRIDED=group.strided,
            ALIGNED=group.aligned, num_warps=WARPS,
        )  # fmt: skip


def _copy(moves: Sequence[tuple[int, int, int]]) -> None:
    """From an address to another one so many words each: see `triton_copies.copy_plain`."""
    programs = max(-(-words // WORDS_PER_PROGRAM.value) for _, _, words in moves)
    missing = [(0, 0, 0)] * (AT_ONCE - len(moves))
    copy_plain[(max(programs, 1), len(moves))](*(number for move in (*moves, *missing) for number in move))
