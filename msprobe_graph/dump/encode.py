"""Entries as the JSON of dump.json.

JSON has no NaN and no infinity. NaN is written as the string "nan" and infinities as the numbers 1e999 and -1e999,
which every JSON reader takes for infinities: msProbe's own tools read both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from msgspec.structs import replace

from .records import CapturedTensor, Entry, Opaque, RowSource, SavedTensor, Statistics, TensorRecord, Unreadable

_POSITIVE_INFINITY = msgspec.Raw(b"1e999")
_NEGATIVE_INFINITY = msgspec.Raw(b"-1e999")


def number(value: Any) -> Any:
    """`value` as something that JSON can hold: floats that are not finite are replaced as said above."""
    if type(value) is float and not math.isfinite(value):
        if value != value:
            return "nan"
        return _POSITIVE_INFINITY if value > 0 else _NEGATIVE_INFINITY
    return value


class EntryEncoder:
    """Turns the entries of one step into JSON, one at a time.

    >>> EntryEncoder().encode(entry)
    b'{"input_args":[{"type":"torch.Tensor",...}],"input_kwargs":{},"output":[...],"site":{"module":"layers.0","number":0}}'
    """

    def __init__(self) -> None:
        self._fetched: dict[RowSource, Sequence[Statistics]] = {}
        """The statistics of all rows that leaves of this step point at."""
        self._json = msgspec.json.Encoder()

    def encode(self, entry: Entry) -> bytes:
        record = {part: self.leaf(value) for part, value in entry.parts.items()}
        # A dict, because msProbe's compare searches every field of an entry for the key "md5".
        record.setdefault("site", {"module": entry.module, "number": entry.number})
        return self._json.encode(record)

    def encode_value(self, value: Any) -> bytes:
        """One value by itself, as debug.json holds it."""
        return self._json.encode(self.leaf(value))

    def leaf(self, value: Any) -> Any:
        """One argument, or a nest of them, in the form that dump.json gives it."""
        kind = type(value)
        if kind is CapturedTensor:
            return value.record or self._record(value)
        if kind is SavedTensor:
            return replace(value.tensor.record or self._record(value.tensor), data_name=value.data_name)
        if value is None:
            return None
        if kind is list:  # most are lists of tensors: one call less for each
            return [
                (item.record or self._record(item)) if type(item) is CapturedTensor else self.leaf(item)
                for item in value
            ]
        if kind is dict:
            return {_text(str(key)): self.leaf(item) for key, item in value.items()}
        if kind is Opaque:
            return {"type": value.type, "value": None}
        if kind is Unreadable:
            return TensorRecord(
                "torch.Tensor", value.dtype, value.shape, None, None, None, None, False, reason=value.reason
            )
        return _plain(value)

    def _record(self, tensor: CapturedTensor) -> TensorRecord:
        rows, checksum = tensor.rows, tensor.checksum
        md5 = msgspec.UNSET if checksum is None else checksum
        dtype = _DTYPES[tensor.dtype]
        if rows is None:
            record = TensorRecord(TENSOR, dtype, tensor.shape, None, None, None, None, tensor.requires_grad, md5)
        else:
            fetched = self._fetched.get(rows)
            if fetched is None:
                fetched = self._fetched[rows] = rows.fetch()
            found = fetched[tensor.row]
            record = TensorRecord(
                TENSOR,
                dtype,
                tensor.shape,
                found.max,
                found.min,
                found.mean,
                found.norm,
                tensor.requires_grad,
                md5,
                msgspec.UNSET,
                found.nan_count,
                found.posinf_count,
                found.neginf_count,
            )
            norm = found.norm
            if norm is not None and norm - norm != 0.0:  # it is infinite or NaN; else none of the four can be
                _spell_out(record, found)
            tensor.rows = None
        tensor.record = record
        return record


def _spell_out(record: TensorRecord, found: Statistics) -> None:
    """Fill in what a record says of values that are not finite."""
    record.Max, record.Min, record.Mean, record.Norm = map(number, (found.max, found.min, found.mean, found.norm))
    if found.finite_max is not None:
        record.finite_Max, record.finite_Min = found.finite_max, found.finite_min
        record.finite_Mean, record.finite_Norm = number(found.finite_mean), number(found.finite_norm)


TENSOR = "torch.Tensor"
_DTYPES = {value: str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _where_any(value: float | None) -> Any:
    """A statistic of the finite values; left out where there are none."""
    return msgspec.UNSET if value is None else number(value)


def _plain(value: Any) -> Any:
    """An argument that is no tensor: ``{"type": "int", "value": 3}``."""
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
        return {"type": "slice", "value": [value.start, value.stop, value.step]}
    if value is Ellipsis:
        return {"type": "ellipsis", "value": "..."}
    if isinstance(value, complex):
        return {"type": "complex", "value": str(value)}
    raise TypeError(f"{type(value).__name__} is no leaf of an entry")


def _text(text: str) -> str:
    """`text` without lone surrogates, which UTF-8 can't hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def document(head: Mapping[str, Any], data: Iterable[tuple[str, bytes]]) -> bytes:
    """dump.json: the fields of `head`, then ``"data"`` with one line an entry, in the order given."""
    json = msgspec.json.Encoder()
    fields = [b'"%b": %b' % (key.encode(), json.encode(value)) for key, value in head.items()]
    entries = b",\n".join(b"  %b: %b" % (json.encode(name), record) for name, record in data)
    return b"{\n " + b",\n ".join([*fields, b'"data": {\n' + entries + b"\n }"]) + b"\n}\n"


def tree(value: Any) -> bytes:
    """`value`, a tree without tensors, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1)
