"""JSON in which only numbers change from one step to the next: what CUDA graphs replay has a text of this kind.

Its numbers are words of a table that comes from the device. The code that writes them, template.cpp, runs without the
interpreter lock and takes about 0.1 us a number. It is optional: without it all text is made anew for each step.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from msprobe_graph.extension import compiled_function

LONGEST = 32
"""Bytes that a number may take."""
FINITES = 4 * 48
"""Bytes that the statistics of the finite values may take, with their names."""

MAX, MIN, MEAN, NORM, NANS, POSITIVES, NEGATIVES = range(7)
"""What a number is; `enum Word` in template.cpp is the same."""
REAL, INTEGER, BOOLEAN, UNSIGNED = range(4)
"""Of what kind of value: `enum Kind`."""


class Number(NamedTuple):
    """A number that stands in the text. What counts -Inf is followed by the statistics of the finite values, where not
    all are."""

    row: int
    """Where the value's row begins in the table, in words of 8 bytes."""
    word: int
    kind: int


def mark(index: int) -> msgspec.Raw:
    """What stands for number `index` in a text until it is filled in; encoded JSON has no zero bytes of its own."""
    return msgspec.Raw(b"\0%d\0" % index)


class Template:
    """
    >>> template = Template(b'{"Norm": \\x000\\x00}', [Number(0, NORM, REAL)])
    >>> template.fill(address)                      # of a table whose first row has the norm 0.5
    b'{"Norm": 0.5}'
    """

    def __init__(self, text: bytes, numbers: Sequence[Number]) -> None:
        """`text` has marks: see `mark`. OSError where numbers can't be filled in, for want of the compiled code."""
        function = _function()
        if function is None:
            raise OSError("there is no compiled _template")
        pieces = text.split(b"\0")
        between = [numbers[int(index)] for index in pieces[1::2]]
        self._text = b"".join(pieces[::2])
        self._pieces = _array(ctypes.c_int64, [len(piece) for piece in pieces[::2]])
        self._numbers = _array(ctypes.c_int32, [field for number in between for field in number])
        room = len(self._text) + sum(LONGEST + (number.word == NEGATIVES) * FINITES for number in between)
        self._out = ctypes.create_string_buffer(room)
        """Kept, because to get so much memory anew takes longer than to fill it."""
        self._fill = functools.partial(function, self._text, self._pieces, self._numbers, len(between))

    def fill(self, table: int) -> bytes:
        """The text with the numbers of the table at that address. To be called by one thread at a time."""
        return ctypes.string_at(self._out, self._fill(table, self._out))


def fills() -> bool:
    """Whether there is the code that templates need."""
    return _function() is not None


@functools.cache
def _function() -> Callable[..., int] | None:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    arguments = ctypes.c_char_p, pointer, pointer, size, pointer, pointer
    return compiled_function(Path(__file__).parent, "_template", "msprobe_graph_fill", size, *arguments)


def _array(kind: type[ctypes._SimpleCData[int]], numbers: Sequence[int]) -> ctypes.Array[ctypes._SimpleCData[int]]:
    return (kind * len(numbers))(*numbers)
