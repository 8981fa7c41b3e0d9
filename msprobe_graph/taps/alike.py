"""The text of steps in which calls are like those of earlier steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from msprobe_graph.dump.encode import complete, entry_lines, reset, same_objects
from msprobe_graph.dump.records import Arriving, Entry, Shared, TensorRecord
from msprobe_graph.dump.template import Filled, Lasting, Template, fills

from .arrival import WORDS
from .likeness import FORMS, Likeness
from .marks import Marks
from .statistics import EMPTY, ROW, read_row

if TYPE_CHECKING:
    from .launches import LaunchedTable

Calls = Sequence[tuple[Likeness, int, int]]
"""Likenesses, each with the numbers of its records' first rows: of those on the CPU and of those on a GPU."""


class AlikeForm:
    """Equal ones have their values in the same rows."""

    __slots__ = ("_calls", "_shared")

    def __init__(self, calls: Calls, shared: Sequence[Shared]) -> None:
        self._calls = calls
        self._shared = shared

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AlikeForm)
            and same_objects(self._shared, other._shared)
            and self._calls == other._calls  # no two likenesses are equal
        )

    __hash__ = None  # type: ignore[assignment]  # there is no need for it


class Text:
    """A step that was encoded. Where all entries of a later one are the same, only numbers differ."""

    def __init__(self, entries: Sequence[Entry], form: AlikeForm) -> None:
        self.entries = entries
        self.form = form
        self.template: Template | None = None
        """Made when it is wanted for the first time."""


class AlikeInStep:
    """One step's calls that are like those of earlier steps: a `dump.records.Alike`."""

    def __init__(
        self, rows: bytes, launched: LaunchedTable | None, calls: Calls, shared: Sequence[Shared], texts: list[Text]
    ) -> None:
        """`rows` as `statistics.ROW` has them, and those on a GPU; `shared` are further records with the statistics of
        these calls' records, of the same shapes as in earlier steps. `texts` are those of the last steps, which the
        writer's thread alone uses: as many as there are forms of a call, the last one in front."""
        self._rows = rows
        self._launched = launched
        self.tables: Sequence[Arriving] = [Lasting(rows), *([] if launched is None else [launched])]
        """That of the CPU and, if there is one, of a GPU."""
        self._calls = calls
        self._shared = shared
        self._texts = texts

    @property
    def form(self) -> AlikeForm:
        return AlikeForm(self._calls, self._shared)

    def encode(self, entries: Sequence[Entry]) -> bytes | Filled:
        known = self._known(entries) if fills() else None
        if known is not None:
            if known.template is None:
                known.template = self._template(entries)
            return Filled(known.template, self.tables)
        words = self._rows, b"" if self._launched is None else self._launched.words()
        for record, dtype, shape, table, word in self._measured():
            reset(record, shape)
            complete(record, read_row(ROW.unpack_from(words[table], 8 * word), dtype))
        return entry_lines(entries)

    def _measured(self) -> Iterator[tuple[TensorRecord, torch.dtype, tuple[int, ...], int, int]]:
        """The records, and where the row of each begins: in which table, at which of its words."""
        sharing = self._sharing()
        size = ROW.size // 8
        for likeness, row, gpu_row in self._calls:
            for record, dtype, on_gpu in zip(likeness.records, likeness.dtypes, likeness.on_gpu, strict=True):
                word = gpu_row * WORDS if on_gpu else row * size
                gpu_row, row = gpu_row + on_gpu, row + (not on_gpu)
                for each in (record, *sharing[id(record)]):
                    assert each.shape is not None
                    yield each, dtype, each.shape, int(on_gpu), word

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
            if same_objects(text.entries, entries) and text.form == self.form:
                texts.insert(0, texts.pop(at))
                return text
        texts.insert(0, Text(entries, self.form))
        del texts[FORMS:]
        return None

    def _template(self, entries: Sequence[Entry]) -> Template:
        marks = Marks()
        for record, dtype, shape, table, word in self._measured():
            reset(record, shape)
            if 0 in shape:
                complete(record, EMPTY)
            else:
                marks.put(record, dtype, word, table)
        return marks.template(entries)
