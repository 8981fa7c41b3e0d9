"""JSON in which only numbers change from one step to the next: what CUDA graphs replay has a text of this kind.

Its numbers are words of tables that come from devices. The code that writes them, in writing/, runs without the
interpreter lock and takes about 0.1 us a number. It is optional: without it all text is made anew for each step.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from msprobe_graph.extension import compiled_function

LONGEST = 32
"""Bytes that a number may take."""
FINITES = 4 * 48
"""Bytes that the statistics of the finite values may take, with their names."""

MAX, MIN, MEAN, NORM, NANS, POSITIVES, NEGATIVES = range(7)
"""What a number is; `enum Word` in writing/numbers.h is the same."""
REAL, INTEGER, BOOLEAN, UNSIGNED = range(4)
"""Of what kind of value: `enum Kind`."""


class Number(NamedTuple):
    """A number that stands in the text. What counts -Inf is followed by the statistics of the finite values, where not
    all are."""

    row: int
    """Where the value's row begins in its table, in words of 8 bytes."""
    word: int
    kind: int
    table: int = 0
    """In which of the tables that the text is filled from."""


class Table(Protocol):
    """Where numbers are, or will be."""

    @property
    def address(self) -> int:
        """Of the first word. Waits for the device that writes them."""


class Lasting:
    """A table that is there: these words, as they lie in memory. See `records.Arriving`."""

    kind = None

    def __init__(self, words: bytes) -> None:
        self._words = words

    @property
    def address(self) -> int:
        return ctypes.cast(ctypes.c_char_p(self._words), ctypes.c_void_p).value or 0

    def lies_at(self) -> tuple[int, int, int, int]:
        return self.address, 0, 0, 0


def mark(index: int) -> msgspec.Raw:
    """What stands for number `index` in a text until it is filled in; encoded JSON has no zero bytes of its own."""
    return msgspec.Raw(b"\0%d\0" % index)


class Text(ctypes.Structure):
    """A text with holes, as writing/numbers.h has it."""

    _fields_ = (
        ("characters", ctypes.c_char_p),
        ("pieces", ctypes.c_void_p),
        ("holes", ctypes.c_void_p),
        ("hole_count", ctypes.c_int64),
        ("first_table", ctypes.c_int32),
    )


class Template:
    """
    >>> template = Template(b'{"Norm": \\x000\\x00}', [Number(0, NORM, REAL)])
    >>> template.fill([table])                      # whose first row has the norm 0.5
    b'{"Norm": 0.5}'
    """

    def __init__(self, text: bytes, numbers: Sequence[Number] = ()) -> None:
        """`text` has marks: see `mark`."""
        pieces = text.split(b"\0")
        between = [numbers[int(index)] for index in pieces[1::2]]
        self._text = b"".join(pieces[::2])
        self._pieces = _array(ctypes.c_int64, [len(piece) for piece in pieces[::2]])
        holes = [field for number in between for field in (number.table, number.row, number.word, number.kind)]
        self._holes = _array(ctypes.c_int32, holes)
        self._hole_count = len(between)
        self.room = len(self._text) + sum(LONGEST + (number.word == NEGATIVES) * FINITES for number in between)
        """Bytes that it may take."""

    def text(self, first_table: int = 0) -> Text:
        """For the code in writing/, as long as this lives. Its table 0 is that one of all."""
        pieces, holes = ctypes.addressof(self._pieces), ctypes.addressof(self._holes)
        return Text(self._text, pieces, holes, self._hole_count, first_table)

    def fill(self, tables: Sequence[Table]) -> bytes:
        """The text with its numbers. OSError where they can't be filled in, for want of the compiled code."""
        function = _function()
        if function is None:
            raise OSError("there is no compiled _writing")
        out = ctypes.create_string_buffer(self.room)
        addresses = (ctypes.c_void_p * len(tables))(*(table.address for table in tables))
        return ctypes.string_at(out, function(ctypes.byref(self.text()), addresses, out))


class Filled:
    """A template's text with the numbers of one step."""

    def __init__(self, template: Template, tables: Sequence[Table]) -> None:
        self.template = template
        self.tables = tables

    def __bool__(self) -> bool:
        """Whether there is any text."""
        return self.template.room > 0

    def __bytes__(self) -> bytes:
        return self.template.fill(self.tables)


def fills() -> bool:
    """Whether there is the code that templates need."""
    return _function() is not None


def writing(name: str, result: Any, *arguments: Any, locked: bool = False) -> Callable[..., int] | None:
    """A C function in writing/ (see `compiled_function`)."""
    return compiled_function(Path(__file__).parent, "_writing", name, result, *arguments, locked=locked)


@functools.cache
def _function() -> Callable[..., int] | None:
    pointer = ctypes.c_void_p
    return writing("msprobe_graph_fill", ctypes.c_int64, pointer, pointer, pointer)


def _array(kind: type[ctypes._SimpleCData[int]], numbers: Sequence[int]) -> ctypes.Array[ctypes._SimpleCData[int]]:
    return (kind * len(numbers))(*numbers)
