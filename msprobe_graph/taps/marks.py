"""Records whose numbers are filled in later, in the text of the entries that hold them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from msprobe_graph.dump.encode import entry_lines
from msprobe_graph.dump.records import Entry, TensorRecord
from msprobe_graph.dump.template import BOOLEAN, INTEGER, REAL, UNSIGNED, Number, Template, Value, mark

from .statistics import REAL as REAL_DTYPES

_EXTREMES = {torch.bool: BOOLEAN, torch.uint64: UNSIGNED}


class Marks:
    """Stand in records for their numbers."""

    def __init__(self) -> None:
        self._numbers: list[Number] = []
        self._values: list[Value] = []

    def put(self, record: TensorRecord, dtype: torch.dtype, word: int) -> None:
        """Into the record of a value of that dtype, whose row begins at that word of the table. The numbers are where
        `statistics.ROW` has them."""
        real = dtype in REAL_DTYPES
        extremes = REAL if real else _EXTREMES.get(dtype, INTEGER)
        at = len(self._numbers)
        record.Max, record.Min, record.Mean, record.Norm = map(mark, range(at, at + 4))
        words = zip((0, 1, 2, 3) if real else (4, 5, 2, 3), (extremes, extremes, REAL, REAL), strict=True)
        self._numbers += [Number(word + offset, format) for offset, format in words]
        self._values.append(Value(word, real))

    def template(self, entries: Iterable[Entry]) -> Template:
        """Of the text of entries with these records."""
        return Template(entry_lines(entries), self._numbers, self._values)
