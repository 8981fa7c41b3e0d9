"""What CUDA graphs replay, as it arrives on the host: made of rows that a GPU could have sent."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msprobe_graph.dump import template
from msprobe_graph.dump.encode import entry_lines
from msprobe_graph.dump.records import NOT_REPLAYED, OVERRUN, Entry, TensorRecord
from msprobe_graph.dump.template import Filled
from msprobe_graph.taps.arrival import Arrival, Shape, Slot
from msprobe_graph.taps.replayed import ReplayedCall, ReplayedValue, ReplayInStep

from .landed import Landed

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint64, torch.bool, torch.float8_e4m3fn]
REAL_ROW = (1.5, -2.0, 0.1, 7.25, 0, 0, 0, 12)
COUNTED = Slot(0, 0, 1)
"""Tells whether the call was replayed."""


def arrival(rows: Sequence[tuple[float | int, ...]], fired: Sequence[int], shape: Shape, end: int = -1) -> Arrival:
    """The first slot tells of the call, the others are values."""
    return Arrival(Landed([REAL_ROW, *rows], [1, *fired], None), [shape], (0, end))


def call(dtypes: Sequence[torch.dtype]) -> ReplayedCall:
    """An entry for each value, and a view of the first one."""
    made = ReplayedCall(None, [COUNTED])  # type: ignore[arg-type]  # the GPU's side is not asked
    for number, dtype in enumerate(dtypes):
        record = TensorRecord("torch.Tensor", str(dtype), None, None, None, None, None, False)
        made.values.append(ReplayedValue(record, [Slot(number + 1, 0, 1)], dtype))
        made.entries[f"Module.m{number}.Linear.forward.0"] = Entry(
            f"Module.m{number}.Linear.forward.0", {"output": [record]}
        )
    view = TensorRecord("torch.Tensor", str(dtypes[0]), None, None, None, None, None, False)
    made.shared.append((made.values[0].record, view, (None, 2)))
    made.entries["view"] = Entry("view", {"output": [view]})
    return made


def decoded(lines: bytes | Filled | None) -> dict[str, object]:
    found: dict[str, object] = json.loads(b"{%b}" % bytes(lines or b""))
    return found


def expected(replay: ReplayInStep) -> dict[str, object]:
    """What the records say when they are filled in one by one."""
    block = replay.complete()
    assert block is not None
    return decoded(entry_lines(block.entries))


numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)
integers = st.integers(-(2**63), 2**63 - 1)


@st.composite
def rows(draw: st.DrawFn, dtype: torch.dtype) -> tuple[float | int, ...]:
    if dtype.is_floating_point:
        bad = draw(st.one_of(st.just((0, 0, 0)), st.tuples(counts, counts, counts)))
        return *(draw(numbers) for _ in range(4)), *bad, draw(counts)
    exact = st.integers(0, 1) if dtype is torch.bool else integers
    return *(draw(numbers) for _ in range(4)), draw(exact), draw(exact), 0, draw(counts)


@given(st.data())
def test_the_lines_of_a_replay_say_what_its_records_say(data: st.DataObject) -> None:
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5))
    replayed = call(dtypes)
    for _ in range(3):  # the second and the third time numbers are filled in
        found = [data.draw(rows(dtype)) for dtype in dtypes]
        step = ReplayInStep(replayed, arrival(found, [1] * len(found), Shape((3, 2), False)))
        block = step.encode()
        assert block is not None
        assert decoded(block.lines) == expected(step)


@given(numbers)
def test_numbers_come_back_to_the_bit(number: float) -> None:
    step = ReplayInStep(
        call([torch.float64]), arrival([(number, number, number, number, 0, 0, 0, 1)], [1], Shape((2,), False))
    )
    block = step.encode()
    assert block is not None
    (record,) = json.loads(b"{%b}" % bytes(block.lines or b""))["Module.m0.Linear.forward.0"]["output"]
    for field in ("Max", "Min", "Mean", "Norm"):
        assert type(record[field]) is float
        assert struct.pack("d", record[field]) == struct.pack("d", number)


def test_what_differs_between_steps_differs_in_their_lines() -> None:
    replayed = call([torch.float32, torch.float32])
    row = REAL_ROW
    for fired, end in itertools.product(([1, 1], [0, 1], [1, 0], [2, 1]), (-1, 3, 1)):
        step = ReplayInStep(replayed, arrival([row, row], fired, Shape((4, 2), True), end))
        block = step.encode()
        assert block is not None
        assert decoded(block.lines) == expected(step)
        first = decoded(block.lines)["Module.m0.Linear.forward.0"]["output"][0]  # type: ignore[index]
        assert first["shape"] == ([4 if end < 0 else end, 2] if fired[0] else None)
        assert first.get("reason") == (None if fired[0] else NOT_REPLAYED)
        assert [hole.reason for hole in block.holes] == ([OVERRUN] if fired[0] == 2 else [])


def test_a_call_that_was_not_replayed_is_no_block() -> None:
    made = call([torch.float32])
    none = Landed([REAL_ROW] * 2, [0, 0], None)
    step = ReplayInStep(made, Arrival(none, [], (0, -1)))
    assert step.encode() is None
    assert step.complete() is None
    assert ReplayInStep(made, None).encode() is None


def test_a_slot_of_a_later_capture_is_empty() -> None:
    arrived = arrival([REAL_ROW], [1], Shape((1,), False))
    assert arrived.first([Slot(7, 0, 1)]) is None
    assert arrived.first([Slot(7, 0, 1), Slot(1, 0, 1)]) is not None


def test_without_the_compiled_code_the_lines_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [(math.pi, -math.e, 1e-300, 5e20, 0, 0, 0, 4)]
    arrived = arrival(values, [1], Shape((2, 2), False))
    block = ReplayInStep(call([torch.float32]), arrived).encode()
    assert block is not None
    filled = decoded(block.lines)
    monkeypatch.setattr(template, "_function", lambda: None)
    assert not template.fills()
    made = ReplayInStep(call([torch.float32]), arrived).encode()
    assert made is not None
    assert filled == decoded(made.lines)
