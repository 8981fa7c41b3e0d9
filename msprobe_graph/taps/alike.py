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
from .likeness import FORMS, Likeness
from .marks import Marks
from .statistics import EMPTY, ROW, read_row

if TYPE_CHECKING:
    from .launches import LaunchedRows

Calls = Sequence[tuple[Likeness, int, int]]
"""Likenesses, each with the numbers of its records' first rows: of those on the CPU and of those on a GPU."""


class Text:
    """A step that was encoded. Where all entries of a later one are the same, only numbers differ."""

    def __init__(self, entries: Sequence[Entry], calls: Calls, shared: Sequence[Shared]) -> None:
        self.entries = entries
        self.calls = calls
        self.shared = shared
        self.template: Template | None = None
        """Made when it is wanted for the first time."""

    def is_of(self, entries: Sequence[Entry], calls: Calls, shared: Sequence[Shared]) -> bool:
        """Whether they are this step's, and have their values in the same rows."""
        return (
            len(entries) == len(self.entries)
            and len(shared) == len(self.shared)
            and all(map(is_, entries, self.entries))
            and all(map(is_, shared, self.shared))
            and calls == self.calls  # no two likenesses are equal
        )


class AlikeInStep:
    """One step's calls that are like those of earlier steps: a `dump.records.Alike`."""

    def __init__(
        self, rows: bytes, launched: LaunchedRows | None, calls: Calls, shared: Sequence[Shared], texts: list[Text]
    ) -> None:
        """`rows` as `statistics.ROW` has them, and those on a GPU; `shared` are further records with the statistics of
        these calls' records, of the same shapes as in earlier steps. `texts` are those of the last steps, which the
        writer's thread alone uses: as many as there are forms of a call, the last one in front."""
        self._rows = rows
        self._launched = launched
        self._calls = calls
        self._shared = shared
        self._texts = texts

    def encode(self, entries: Sequence[Entry]) -> bytes:
        words = self._rows if self._launched is None else self._rows + self._launched.words()
        known = self._known(entries) if fills() else None
        if known is not None:
            if known.template is None:
                known.template = self._template(entries)
            address = ctypes.cast(ctypes.c_char_p(words), ctypes.c_void_p).value
            assert address is not None
            return known.template.fill(address)
        for record, dtype, shape, word in self._measured():
            reset(record, shape)
            complete(record, read_row(ROW.unpack_from(words, 8 * word), dtype))
        return entry_lines(entries)

    def _measured(self) -> Iterator[tuple[TensorRecord, torch.dtype, tuple[int, ...], int]]:
        """The records, and where among the words the row of each begins: behind the CPU's rows are the GPU's."""
        sharing = self._sharing()
        size, of_gpu = ROW.size // 8, len(self._rows) // 8
        for likeness, row, gpu_row in self._calls:
            for record, dtype, on_gpu in zip(likeness.records, likeness.dtypes, likeness.on_gpu, strict=True):
                word = of_gpu + gpu_row * WORDS if on_gpu else row * size
                gpu_row, row = gpu_row + on_gpu, row + (not on_gpu)
                for each in (record, *sharing[id(record)]):
                    assert each.shape is not None
                    yield each, dtype, each.shape, word

    def _sharing(self) -> defaultdict[int, list[TensorRecord]]:
        """By the Python id of a record those that have its statistics, from it or from one another."""
        found: defaultdict[int, list[TensorRecord]] = defaultdict(list)
        origin: dict[int, int] = {}
        for record, other, _ in self._shared:
            origin[id(other)] = origin.get(id(record), id(record))
            found[origin[id(other)]].append(other)
        return found

    def _known(self, entries: Sequence[Entry]) -> Text | None:
        """The text of an earlier step with the same entries. Without one this step's will be known."""
        texts = self._texts
        for at, text in enumerate(texts):
            if text.is_of(entries, self._calls, self._shared):
                texts.insert(0, texts.pop(at))
                return text
        texts.insert(0, Text(entries, self._calls, self._shared))
        del texts[FORMS:]
        return None

    def _template(self, entries: Sequence[Entry]) -> Template:
        marks = Marks()
        for record, dtype, shape, word in self._measured():
            reset(record, shape)
            if 0 in shape:
                complete(record, EMPTY)
            else:
                marks.put(record, dtype, word)
        return marks.template(entries)
