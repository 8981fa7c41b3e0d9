"""The text of steps in which calls are like those of earlier steps."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import is_

from msprobe_graph.dump.encode import complete, entry_lines, reset
from msprobe_graph.dump.records import Entry
from msprobe_graph.dump.template import Template, fills

from .likeness import Likeness
from .marks import Marks
from .statistics import EMPTY, ROW, read_row

Calls = Sequence[tuple[Likeness, int]]
"""Likenesses, each with the number of the first of its records' rows."""


class LastText:
    """The step that was encoded last. Where all entries of the next are the same, only numbers differ."""

    def __init__(self) -> None:
        self.entries: Sequence[Entry] = ()
        self.calls: Calls = ()
        self.template: Template | None = None


class AlikeInStep:
    """One step's calls that are like those of earlier steps: a `dump.records.Alike`."""

    def __init__(self, rows: bytes, calls: Calls, last: LastText) -> None:
        """`rows` as `statistics.ROW` has them; `last` is shared by all steps, and used in the writer's thread only."""
        self._rows = rows
        self._calls = calls
        self._last = last

    def encode(self, entries: Sequence[Entry]) -> bytes:
        last = self._last
        if fills() and self._same_entries(entries):
            if last.template is None:
                last.template = self._template(entries)
            address = ctypes.cast(ctypes.c_char_p(self._rows), ctypes.c_void_p).value
            assert address is not None
            text = last.template.fill(address)
            if text is not None:
                return text
        else:
            last.entries, last.calls, last.template = entries, self._calls, None
        for likeness, first in self._calls:
            for row, (record, dtype) in enumerate(zip(likeness.records, likeness.dtypes, strict=True), first):
                assert record.shape is not None
                reset(record, record.shape)
                complete(record, read_row(ROW.unpack_from(self._rows, row * ROW.size), dtype))
        return entry_lines(entries)

    def _same_entries(self, entries: Sequence[Entry]) -> bool:
        """Whether they are the last step's, and have their values in the same rows."""
        last = self._last
        return (
            len(entries) == len(last.entries)
            and len(self._calls) == len(last.calls)
            and all(map(is_, entries, last.entries))
            and all(now[0] is then[0] and now[1] == then[1] for now, then in zip(self._calls, last.calls, strict=True))
        )

    def _template(self, entries: Sequence[Entry]) -> Template:
        marks = Marks()
        for likeness, first in self._calls:
            for row, (record, dtype) in enumerate(zip(likeness.records, likeness.dtypes, strict=True), first):
                assert record.shape is not None
                reset(record, record.shape)
                if 0 in record.shape:
                    complete(record, EMPTY)
                else:
                    marks.put(record, dtype, row * (ROW.size // 8))
        return marks.template(entries)
