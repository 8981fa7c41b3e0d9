"""The one path from a tap to the writer: values become leaves, leaves become entries, entries become a step.

Eager hooks and graph taps both end here. Everything is read at once, so that a later in-place change can't alter what
was recorded; a value that was measured already in this step, and has not changed since, is not measured again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from msprobe_graph.config import Settings, Slice
from msprobe_graph.dump.records import CapturedTensor, Entry, Hole, Opaque, Request, SavedTensor, Step, Unreadable
from msprobe_graph.dump.writer import Writer

from .checksum import crc32, xor_checksum
from .measured import Known, Measured
from .rows import Rows
from .unmeasurable import Unmeasurable

MAX_DEPTH = 10
"""Arguments nested deeper than this are recorded by their type only."""

_PLAIN = frozenset(
    {
        int,
        float,
        bool,
        str,
        complex,
        type(None),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Size,
        type(...),
    }
)


class Recorder:
    """Collects one step at a time.

    `cut` holds the slices that apply to every tensor of the running step (the configuration's, and one request's rows).
    """

    def __init__(self, settings: Settings, writer: Writer) -> None:
        self.cut: Sequence[Slice] = settings.slice
        self._checksum = {"md5": crc32, "xor": xor_checksum, "statistics": None}[settings.summary_mode]
        self._measures = settings.summary_mode != "xor"
        self._writer = writer
        self._measured = Measured()
        self.begin(0)

    def begin(self, number: int) -> None:
        """Start step `number` with nothing in it."""
        self._number = number
        self._rows = Rows()
        self._measured.begin(number)
        self.entries: dict[str, Entry] = {}
        """By name, in execution order."""
        self.holes: list[Hole] = []
        self.saved: dict[str, Any] = {}
        self.requests: list[Request] = []

    def as_step(
        self, finished: bool, expected: int, captured: int, late: Sequence[Entry], holes: Sequence[Hole]
    ) -> Step:
        """The step as it stands; `late` entries and `holes` are those that only its end tells."""
        return Step(
            number=self._number,
            entries=[*self.entries.values(), *late],
            holes=[*self.holes, *holes],
            requests=list(self.requests),
            saved=dict(self.saved),
            expected=expected,
            captured=captured,
            finished=finished,
        )

    def value(self, value: Any, stem: str | None, depth: int = 0) -> Any:
        """`value` with its tensors measured. `stem` is the start of their file names, None when they are not saved."""
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return self._tensor(value, stem)
        if kind in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, stem)
        if depth == MAX_DEPTH:
            return Opaque(kind.__name__)
        if isinstance(value, (list, tuple)):
            if hasattr(value, "_fields"):
                return self._fields({name: getattr(value, name) for name in value._fields}, stem, depth)
            return [
                self.value(item, None if stem is None else f"{stem}.{index}", depth + 1)
                for index, item in enumerate(value)
            ]
        if isinstance(value, dict):
            return self._fields(value, stem, depth)
        if kind is slice:
            return slice(*(part if type(part) is int else None for part in (value.start, value.stop, value.step)))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            return self._fields(fields, stem, depth)
        if isinstance(value, (int, float, str)):  # enums, numpy scalars
            return value
        return Opaque(kind.__name__)

    def _fields(self, fields: dict[Any, Any], stem: str | None, depth: int) -> dict[str, Any]:
        return {
            str(name): self.value(item, None if stem is None else f"{stem}.{name}", depth + 1)
            for name, item in fields.items()
        }

    def _tensor(self, tensor: torch.Tensor, stem: str | None) -> CapturedTensor | SavedTensor | Unreadable:
        if self.cut:
            tensor = _sliced(tensor, self.cut)
        known = self._measured.lookup(tensor)
        leaf = known.leaf if known is not None else None
        if leaf is None or leaf.requires_grad != tensor.requires_grad:
            try:
                leaf = self._read(tensor)
            except Unmeasurable as refusal:
                self.holes.append(Hole(stem or "a tensor", str(refusal)))
                return Unreadable(str(tensor.dtype), None, str(refusal))
            if known is not None:
                known.leaf = leaf
        if stem is None:
            return leaf
        name = f"{stem}.pt"
        return SavedTensor(leaf, name) if self._save(tensor, known, name) else leaf

    def _read(self, tensor: torch.Tensor) -> CapturedTensor:
        rows = self._rows if self._measures else None
        return CapturedTensor(
            rows,
            rows.add(tensor) if rows is not None else 0,
            tensor.dtype,
            tensor.shape,
            tensor.requires_grad,
            self._checksum(tensor) if self._checksum is not None else None,
        )

    def _save(self, tensor: torch.Tensor, known: Known | None, name: str) -> bool:
        """Hand a copy of the values to the writer; False (and a hole) when max_bytes leaves no room for it."""
        if known is not None and known.file is not None:
            self._writer.save_again(self._number, name, known.file)
            return True
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if not self._writer.save(self._number, name, copy):
            self.holes.append(Hole(name, "not saved: the dump has reached max_bytes"))
            return False
        if known is not None:
            known.file = self._writer.tensor_file(self._number, name)
        return True


def _sliced(tensor: torch.Tensor, cut: Sequence[Slice]) -> torch.Tensor:
    """`tensor` with each slice applied along its dimension; those of another length there, or too few dimensions, are
    whole."""
    index = [slice(None)] * tensor.dim()
    for part in cut:
        if part.dim < tensor.dim() and part.size in (None, tensor.shape[part.dim]):
            index[part.dim] = slice(part.begin, part.end)
    return tensor[tuple(index)]
