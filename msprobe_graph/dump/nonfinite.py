"""Where in a step a NaN or an infinity comes up first, and in whose rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .records import Request, Step, TensorRecord


class Sighting(NamedTuple):
    """The first entry of a step that has such a value, and the first place in it that has one."""

    entry: str
    position: str
    """``output.0``, ``input_args.0.1``: the way to the tensor in the entry."""
    decided: TensorRecord
    """The record that decided it: the first in the output, as a rule."""


def first_sightings(step: Step, kinds: Collection[str], chosen: Callable[[str], bool]) -> dict[str, Sighting]:
    """For each of `kinds`, "nan" and "inf", the first entry in execution order that has it, if one has; the entry that
    stands first is the first of the answer.

    An entry has what its output has; one without a tensor in its output (data_mode leaves outputs out, or it gives
    none), what is in anything else. Parameters don't count, nor does an input while the output is clean: a buffer that
    is to be filled holds anything, a mask infinities. The place named may be an input: then it came in there. Only
    what was measured in this step counts. The statistics must be complete.
    """
    kinds = [kind for kind in kinds if any(_has(record, kind) for record in step.measured)]
    found: dict[str, Sighting] = {}
    entries = [(entry.name, entry.parts) for entry in step.entries]
    entries += [(name, {"output": value}) for name, value in step.saved.items()]
    for name, parts in entries:
        if len(found) == len(kinds):
            break
        if not chosen(name):
            continue
        values = {part: value for part, value in parts.items() if part != "parameters"}
        deciding = _records(values.get("output")) or _records(values)
        for kind in kinds:
            decided = None if kind in found else next((each for each in deciding if _has(each, kind)), None)
            if decided is not None:
                position = next(where for where, record in _tensors(values, ()) if _has(record, kind))
                found[kind] = Sighting(name, ".".join(position), decided)
    return found


def whose(requests: Sequence[Request], value: torch.Tensor | None, kind: str) -> tuple[str, ...]:
    """The requests in whose rows `value` has a NaN or an infinity: all where the values or their rows aren't known.

    A tensor has a row for each token of the batch, or one for each request; they are told by their length.
    """
    names = tuple(request.request for request in requests)
    if value is None or not requests or not value.dim():
        return names
    if value.itemsize < 4:  # of some small dtypes torch can't tell
        value = value.float()
    rows = (value.isnan() if kind == "nan" else value.isinf()).reshape(len(value), -1).any(1)
    if len(rows) == requests[-1].end:
        return tuple(request.request for request in requests if rows[request.begin : request.end].any())
    if len(rows) == len(requests):
        return tuple(name for name, row in zip(names, rows.tolist(), strict=True) if row)
    return names


def _has(record: TensorRecord, kind: str) -> bool:
    if kind == "nan":
        return bool(record.nan_count)
    return bool(record.posinf_count) or bool(record.neginf_count)


def _records(value: Any) -> list[TensorRecord]:
    if isinstance(value, TensorRecord):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [record for item in items for record in _records(item)]


def _tensors(value: Any, position: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], TensorRecord]]:
    if isinstance(value, TensorRecord):
        yield position, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _tensors(item, (*position, str(name)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _tensors(item, (*position, str(index)))
