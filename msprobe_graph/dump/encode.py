"""Entries as the JSON of dump.json.

JSON has no NaN and no infinity. NaN is written as the string "nan" and infinities as the numbers 1e999 and -1e999,
which every JSON reader takes for infinities: msProbe's own tools read both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, Literal

import msgspec
import torch

from .records import Entry, Statistics, TensorRecord
from .template import Filled

_POSITIVE_INFINITY = msgspec.Raw(b"1e999")
_NEGATIVE_INFINITY = msgspec.Raw(b"-1e999")


def number(value: Any) -> Any:
    """`value` as something that JSON can hold: floats that are not finite are replaced as said above."""
    if type(value) is float and not math.isfinite(value):
        if value != value:
            return "nan"
        return _POSITIVE_INFINITY if value > 0 else _NEGATIVE_INFINITY
    return value


def complete(record: TensorRecord, found: Statistics) -> None:
    """Fill in the statistics that a tap left open, and of a replayed value its shape."""
    if found.replayed is not None:
        reset(record, found.replayed.shape)
    record.Max = found.max
    record.Min = found.min
    record.Mean = found.mean
    record.Norm = norm = found.norm
    record.nan_count = found.nan_count
    record.posinf_count = found.posinf_count
    record.neginf_count = found.neginf_count
    if norm is not None and norm - norm != 0.0:  # it is infinite or NaN; else none of the four can be
        record.Max, record.Min, record.Mean, record.Norm = map(number, (found.max, found.min, found.mean, norm))
        if found.finite_max is not None:
            record.finite_Max, record.finite_Min = found.finite_max, found.finite_min
            record.finite_Mean, record.finite_Norm = number(found.finite_mean), number(found.finite_norm)


def reset(record: TensorRecord, shape: tuple[int, ...]) -> None:
    """Remove from the record of a replayed value what an earlier step has filled in. What is left is the record of
    values that are all finite, but for their statistics."""
    record.shape = shape
    record.reason = msgspec.UNSET
    record.nan_count = record.posinf_count = record.neginf_count = 0
    record.finite_Max = record.finite_Min = record.finite_Mean = record.finite_Norm = msgspec.UNSET


def refuse(record: TensorRecord, reason: str) -> None:
    """Say of a value that was to be replayed why there is none. What an earlier step has filled in is removed."""
    record.reason = reason
    record.shape = record.Max = record.Min = record.Mean = record.Norm = None
    record.nan_count = record.posinf_count = record.neginf_count = msgspec.UNSET
    record.finite_Max = record.finite_Min = record.finite_Mean = record.finite_Norm = msgspec.UNSET


def share(
    measured: TensorRecord, other: TensorRecord, shape: tuple[int | None, ...] | Literal["same"] | None = None
) -> None:
    """Give `other`, of the same values, the statistics of a record that is complete, and its own `shape` if one is
    given: a size that is open (None) follows from the number of elements."""
    other.reason = measured.reason
    if shape is not None:
        other.shape = measured.shape if shape == "same" else None
    if measured.shape is not None and shape is not None and shape != "same":
        known = math.prod(size for size in shape if size is not None)
        open_size = math.prod(measured.shape) // known if known else 0
        other.shape = tuple(open_size if size is None else size for size in shape)
    other.Max = measured.Max
    other.Min = measured.Min
    other.Mean = measured.Mean
    other.Norm = measured.Norm
    other.nan_count = measured.nan_count
    other.posinf_count = measured.posinf_count
    other.neginf_count = measured.neginf_count
    other.finite_Max = measured.finite_Max
    other.finite_Min = measured.finite_Min
    other.finite_Mean = measured.finite_Mean
    other.finite_Norm = measured.finite_Norm


def describe(value: Any) -> Any:
    """An argument that is no tensor: ``{"type": "int", "value": 3}``. Of a type that a dump does not describe, only the
    name is kept, never the object."""
    if value is None:
        return None
    if isinstance(value, torch.Size):
        return {"type": "torch.Size", "value": [int(n) for n in value]}
    if isinstance(value, str):
        return {"type": type(value).__name__, "value": _text(str.__str__(value))}
    for kind in (bool, int, float):
        if isinstance(value, kind):  # or of a class made from it: an enum, NumPy's float64
            return {"type": type(value).__name__, "value": number(kind(value))}
    if isinstance(value, (torch.dtype, torch.device, torch.layout)):
        return {"type": f"torch.{type(value).__name__}", "value": str(value)}
    if isinstance(value, torch.memory_format):
        return {"type": "torch.memory_format", "format": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return {"type": "slice", "value": [part if type(part) is int else None for part in parts]}
    if value is Ellipsis:
        return {"type": "ellipsis", "value": "..."}
    if isinstance(value, complex):
        return {"type": "complex", "value": str(value)}
    return {"type": type(value).__name__, "value": None}


def _text(text: str) -> str:
    """`text` without lone surrogates, which UTF-8 can't hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def document(head: Mapping[str, Any], data: Iterable[bytes | Filled]) -> list[bytes | Filled]:
    """dump.json, part by part: the fields of `head`, then ``"data"`` with the lines given."""
    json = msgspec.json.Encoder()
    begin = b"".join(b" %b: %b,\n" % (json.encode(key), json.encode(value)) for key, value in head.items())
    parts: list[bytes | Filled] = [b'{\n%b "data": {\n' % begin]
    for lines in data:
        if lines:
            parts += [lines] if len(parts) == 1 else [b",\n", lines]
    return [*parts, b"\n }\n}\n"]


def lines(data: Iterable[tuple[str, Any]]) -> bytes:
    """One line a name with its value."""
    json = msgspec.json.Encoder()
    text = bytearray()
    between = b"  "
    for name, value in data:
        text += between
        json.encode_into(name, text, -1)
        text += b": "
        json.encode_into(value, text, -1)
        between = b",\n  "
    return bytes(text)


def entry_lines(entries: Iterable[Entry]) -> bytes:
    """The lines of dump.json that hold the entries."""
    return lines((entry.name, fields(entry)) for entry in entries)


def fields(entry: Entry) -> dict[str, Any]:
    """An entry as dump.json holds it::

    {"input_args":[{"type":"torch.Tensor",...}],"input_kwargs":{},"output":[...],"site":{"module":"layers.0","number":0}}
    """
    parts = dict(entry.parts)
    # A dict, because msProbe's compare searches every field of an entry for the key "md5".
    parts.setdefault("site", {"module": entry.module, "number": entry.number})
    return parts


def same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether these are the same, one by one."""
    return len(some) == len(others) and all(map(is_, some, others))


class OfEntries:
    """What `encode` makes of one step's entries after the other's. Where they are the same objects as the last step's,
    as they are where a step repeats, it is not asked again."""

    def __init__(self, encode: Callable[[Sequence[Entry]], bytes]) -> None:
        self._encode = encode
        self._last: Sequence[Entry] | None = None
        self._text = b""

    def __call__(self, entries: Sequence[Entry]) -> bytes:
        if self._last is None or not same_objects(entries, self._last):
            self._text, self._last = self._encode(entries), entries
        return self._text


class SameAgain:
    """Encodes one tree without tensors after the other. One that equals the last, as from one step to the next, is not
    encoded again; it must not be changed meanwhile."""

    def __init__(self) -> None:
        self._last: Any = msgspec.UNSET
        self._text = b""

    def encode(self, value: Any) -> bytes:
        if value != self._last:
            self._text, self._last = tree(value), value
        return self._text


def tree(value: Any) -> bytes:
    """`value`, a tree without tensors, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1)
