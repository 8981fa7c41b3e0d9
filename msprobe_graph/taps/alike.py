"""The text of steps in which calls are like those of earlier steps."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import is_
from typing import TYPE_CHECKING

import torch

from msprobe_graph.dump.encode import complete, entry_lines, reset
from msprobe_graph.dump.records import Entry, Shared, TensorRecord
from msprobe_graph.dump.template import Template, fills

from .arrival import WORDS
from .likeness import Likeness
from .marks import Marks
from .statistics import EMPTY, ROW, read_row

if TYPE_CHECKING:
    from .launches import LaunchedRows

Calls = Sequence[tuple[Likeness, int]]
"""Likenesses, each with the number of the first of its records' rows."""


class LastText:
    """The step that was encoded last. Where all entries of the next are the same, only numbers differ."""

    def __init__(self) -> None:
        self.entries: Sequence[Entry] = ()
        self.calls: Calls = ()
        self.shared: Sequence[Shared] = ()
        self.template: Template | None = None


class AlikeInStep:
    """One step's calls that are like those of earlier steps: a `dump.records.Alike`."""

    def __init__(
        self, rows: bytes, launched: LaunchedRows | None, calls: Calls, shared: Sequence[Shared], last: LastText
    ) -> None:
        """`rows` as `statistics.ROW` has them, and those on a GPU; `shared` are further records with the statistics of
        these calls' records, of the same shapes as in earlier steps. `last` is of all steps, and used in the writer's
        thread only."""
        self._rows = rows
        self._launched = launched
        self._calls = calls
        self._shared = shared
        self._last = last

    def encode(self, entries: Sequence[Entry]) -> bytes:
        last = self._last
        words = self._rows if self._launched is None else self._rows + self._launched.words()
        if fills() and self._same_entries(entries):
            if last.template is None:
                last.template = self._template(entries)
            address = ctypes.cast(ctypes.c_char_p(words), ctypes.c_void_p).value
            assert address is not None
            text = last.template.fill(address)
            if text is not None:
                return text
        else:
            last.entries, last.calls, last.shared, last.template = entries, self._calls, self._shared, None
        for record, dtype, shape, word in self._measured():
            reset(record, shape)
            complete(record, read_row(ROW.unpack_from(words, 8 * word), dtype))
        return entry_lines(entries)

    def _measured(self) -> Iterator[tuple[TensorRecord, torch.dtype, tuple[int, ...], int]]:
        """The records, and where among the words the row of each begins: behind the CPU's rows are the GPU's."""
        sharing = self._sharing()
        for likeness, first in self._calls:
            on_cpu = likeness.device.type == "cpu"
            begin, size = (0, ROW.size // 8) if on_cpu else (len(self._rows) // 8, WORDS)
            for row, (record, dtype) in enumerate(zip(likeness.records, likeness.dtypes, strict=True), first):
                for each in (record, *sharing[id(record)]):
                    assert each.shape is not None
                    yield each, dtype, each.shape, begin + row * size

    def _sharing(self) -> defaultdict[int, list[TensorRecord]]:
        """By the Python id of a record those that have its statistics, from it or from one another."""
        found: defaultdict[int, list[TensorRecord]] = defaultdict(list)
        origin: dict[int, int] = {}
        for record, other, _ in self._shared:
            origin[id(other)] = origin.get(id(record), id(record))
            found[origin[id(other)]].append(other)
        return found

    def _same_entries(self, entries: Sequence[Entry]) -> bool:
        """Whether they are the last step's, and have their values in the same rows."""
        last = self._last
        return (
            len(entries) == len(last.entries)
            and len(self._calls) == len(last.calls)
            and len(self._shared) == len(last.shared)
            and all(map(is_, entries, last.entries))
            and all(map(is_, self._shared, last.shared))
            and all(now[0] is then[0] and now[1] == then[1] for now, then in zip(self._calls, last.calls, strict=True))
        )

    def _template(self, entries: Sequence[Entry]) -> Template:
        marks = Marks()
        for record, dtype, shape, word in self._measured():
            reset(record, shape)
            if 0 in shape:
                complete(record, EMPTY)
            else:
                marks.put(record, dtype, word)
        return marks.template(entries)
