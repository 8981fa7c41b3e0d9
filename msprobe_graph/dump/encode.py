"""Entries as the JSON of dump.json.

JSON has no NaN and no infinity. NaN is written as the string "nan" and infinities as the numbers 1e999 and -1e999,
which every JSON reader takes for infinities: msProbe's own tools read both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import torch

from .records import Entry, Statistics, TensorRecord

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
        record.shape = found.replayed.shape
    record.Max, record.Min, record.Mean, record.Norm = found.max, found.min, found.mean, found.norm
    record.nan_count = found.nan_count
    record.posinf_count = found.posinf_count
    record.neginf_count = found.neginf_count
    norm = found.norm
    if norm is not None and norm - norm != 0.0:  # it is infinite or NaN; else none of the four can be
        record.Max, record.Min, record.Mean, record.Norm = map(number, (found.max, found.min, found.mean, norm))
        if found.finite_max is not None:
            record.finite_Max, record.finite_Min = found.finite_max, found.finite_min
            record.finite_Mean, record.finite_Norm = number(found.finite_mean), number(found.finite_norm)


_STATISTICS = (
    *("Max", "Min", "Mean", "Norm", "nan_count", "posinf_count", "neginf_count"),
    *("finite_Max", "finite_Min", "finite_Mean", "finite_Norm"),
)


def share(measured: TensorRecord, other: TensorRecord) -> None:
    """Give `other`, of the same values, the statistics of a record that is complete. A size that `other` leaves open
    (None) follows from the number of elements."""
    if measured.reason is not msgspec.UNSET:
        other.reason = measured.reason
    elif measured.shape is not None and other.shape is not None and None in other.shape:
        known = math.prod(size for size in other.shape if size is not None)
        open_size = math.prod(size or 0 for size in measured.shape) // known if known else 0
        other.shape = tuple(open_size if size is None else size for size in other.shape)
    for name in _STATISTICS:
        setattr(other, name, getattr(measured, name))


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


def document(head: Mapping[str, Any], data: Iterable[tuple[str, bytes]]) -> bytes:
    """dump.json: the fields of `head`, then ``"data"`` with one line an entry, in the order given."""
    json = msgspec.json.Encoder()
    fields = [b'"%b": %b' % (key.encode(), json.encode(value)) for key, value in head.items()]
    entries = b",\n".join(b"  %b: %b" % (json.encode(name), record) for name, record in data)
    return b"{\n " + b",\n ".join([*fields, b'"data": {\n' + entries + b"\n }"]) + b"\n}\n"


def encoded(entries: Iterable[Entry]) -> Iterator[tuple[str, bytes]]:
    """Each entry's name and JSON::

    {"input_args":[{"type":"torch.Tensor",...}],"input_kwargs":{},"output":[...],"site":{"module":"layers.0","number":0}}
    """
    json = msgspec.json.Encoder()
    for entry in entries:
        parts = dict(entry.parts)
        # A dict, because msProbe's compare searches every field of an entry for the key "md5".
        parts.setdefault("site", {"module": entry.module, "number": entry.number})
        yield entry.name, json.encode(parts)


def tree(value: Any) -> bytes:
    """`value`, a tree without tensors, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1)
