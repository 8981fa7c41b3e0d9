"""Records whose numbers are filled in later, in the text of the entries that hold them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from msprobe_graph.dump.encode import entry_lines
from msprobe_graph.dump.records import Entry, TensorRecord
from msprobe_graph.dump.template import (
    BOOLEAN,
    INTEGER,
    MAX,
    MEAN,
    MIN,
    NANS,
    NEGATIVES,
    NORM,
    POSITIVES,
    REAL,
    UNSIGNED,
    Number,
    Template,
    mark,
)

from .statistics import REAL as REAL_DTYPES

_FIELDS = {"Max": MAX, "Min": MIN, "Mean": MEAN, "Norm": NORM}
_COUNTS = {"nan_count": NANS, "posinf_count": POSITIVES, "neginf_count": NEGATIVES}
_KINDS = {torch.bool: BOOLEAN, torch.uint64: UNSIGNED}


class Marks:
    """Stand in records for their numbers."""

    def __init__(self) -> None:
        self._numbers: list[Number] = []

    def put(self, record: TensorRecord, dtype: torch.dtype, row: int, table: int = 0) -> None:
        """Into the record of a value of that dtype, whose row begins at that word of that table. It is to be one that
        was reset."""
        kind = REAL if dtype in REAL_DTYPES else _KINDS.get(dtype, INTEGER)
        for field, word in (_FIELDS | _COUNTS if kind == REAL else _FIELDS).items():
            setattr(record, field, mark(len(self._numbers)))
            self._numbers.append(Number(row, word, kind, table))

    def template(self, entries: Iterable[Entry]) -> Template:
        """Of the text of entries with these records."""
        return Template(entry_lines(entries), self._numbers)
