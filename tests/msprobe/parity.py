"""Does a dump of ours hold all that msProbe's holds? Compares two dump.json of one step of one model.

msProbe numbers each spelling of an operator apart (Tensor.__mul__.0, Tensor.mul.0) and we don't, and we see calls
that it doesn't. So a call of msProbe's is looked for, in order of execution, among our calls of the folded name; its
backward must then be the backward of the call found.

What msProbe's way of looking adds to the program is not held against us:
- A function bound at import (`def f(x, activation=F.relu)`) it can't patch, and records what that calls: Torch.relu,
  where we have Functional.relu.
- A call that ends in an exception, as activation checkpointing ends its recomputation early, leaves an entry of inputs.
- Where nothing uses an output of a module, its hook hands zeros back in place of no gradient: gradients that are zero
  there may be missing here, and so may a call's backward that saw nothing else.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]

_API = re.compile(r"(?!Module\.)(?P<api>.+)\.(?P<call>\d+)\.(?P<direction>forward|backward)")
_SIDES = ("input_args", "input_kwargs", "parameters", "input", "output")
_STATISTICS = ("Max", "Min", "Mean", "Norm")
# msProbe computes in the tensor's own dtype.
_TOLERANCE = {"torch.float32": 1e-6, "torch.float16": 2e-3, "torch.bfloat16": 2e-2}


class Difference(NamedTuple):
    """An entry of msProbe's that ours lacks, holds differently, or has elsewhere."""

    entry: str
    reason: str


def read_entries(step: Path) -> dict[str, Record]:
    """The entries of the one rank of a step's folder, in order."""
    (path,) = step.glob("*/dump.json")
    entries: dict[str, Record] = json.loads(path.read_text(encoding="utf-8"))["data"]
    return entries


def compare(theirs: dict[str, Record], ours: dict[str, Record], fold: Callable[[str], str]) -> list[Difference]:
    """Every way in which `ours` falls short of `theirs`; what it holds beyond it is welcome."""
    differences = []
    found: dict[str, str] = {}
    calls = _calls_by_name(ours)
    called: dict[tuple[str, str], str] = {}  # (their api, their call number) -> our entry's name up to the direction
    for entry, record in theirs.items():
        if (api := _API.fullmatch(entry)) is None:
            candidates = [entry] if entry in ours else []
        elif api["direction"] == "forward" and "output" not in record:
            continue
        elif api["direction"] == "forward":
            candidates = calls[fold(api["api"])] or calls[f"Functional.{api['api'].partition('.')[2]}"]
        else:
            call = called.get((api["api"], api["call"]))
            candidates = [f"{call}.backward"] if f"{call}.backward" in ours else []
        if not candidates and entry.endswith(".backward") and _is_zero(record):
            continue
        if not candidates:
            differences.append(Difference(entry, "missing"))
            continue
        unlike = [_unlike(record, ours[candidate]) for candidate in candidates]
        best = unlike.index("") if "" in unlike else 0
        if unlike[best]:
            differences.append(Difference(entry, f"{candidates[0]}: {unlike[best]}"))
        found[entry] = candidates[best]
        if api is not None and api["direction"] == "forward":
            called[api["api"], api["call"]] = candidates[best].removesuffix(".forward")
            del candidates[: best + 1]  # ours up to this one are taken, or extra
    return differences + _out_of_order(found, list(ours))


def _calls_by_name(entries: dict[str, Record]) -> defaultdict[str, list[str]]:
    calls: defaultdict[str, list[str]] = defaultdict(list)
    for entry in entries:
        api = _API.fullmatch(entry)
        if api is not None and api["direction"] == "forward":
            calls[api["api"]].append(entry)
    return calls


def _out_of_order(found: dict[str, str], order: list[str]) -> list[Difference]:
    """The fewest entries that would have to move for `found` to stand in the same order in both dumps."""
    place = {entry: number for number, entry in enumerate(order)}
    entries = list(found)
    ends: list[int] = []  # the last place of the best increasing run of each length
    heads: list[int] = []  # which entry that is
    before: list[int | None] = []
    for number, entry in enumerate(entries):
        length = bisect.bisect_left(ends, place[found[entry]])
        before.append(heads[length - 1] if length else None)
        ends[length : length + 1] = [place[found[entry]]]
        heads[length : length + 1] = [number]
    kept = set()
    last = heads[-1] if heads else None
    while last is not None:
        kept.add(last)
        last = before[last]
    return [
        Difference(entry, f"out of order: {found[entry]} follows {order[place[found[entry]] - 1]}, "
                          f"there {entry} follows {entries[number - 1] if number else 'nothing'}")
        for number, entry in enumerate(entries)
        if number not in kept
    ]  # fmt: skip


def _unlike(theirs: Record, ours: Record) -> str:
    """How a record's tensors differ; "" if they don't."""
    for side in _SIDES:
        expected, got = dict(_tensors(theirs.get(side))), dict(_tensors(ours.get(side)))
        for path, tensor in expected.items():
            if path not in got and side in ("input", "output") and "input_args" not in theirs and _is_zero(tensor):
                continue
            if path not in got:
                return f"no tensor at {'.'.join((side, *path))}, only at {['.'.join(p) for p in got]}"
            if reason := _unlike_tensor(tensor, got[path]):
                return f"{'.'.join((side, *path))}: {reason}"
        if surplus := got.keys() - expected.keys():
            return f"more tensors in {side}: {['.'.join(p) for p in surplus]}"
    return ""


def _is_zero(record: Record) -> bool:
    return all(tensor["Max"] == tensor["Min"] == 0 for _, tensor in _tensors(record))


def _unlike_tensor(theirs: Record, ours: Record) -> str:
    for key in ("dtype", "shape", "requires_grad"):
        if theirs[key] != ours[key]:
            return f"{key} {ours[key]}, there {theirs[key]}"
    zero_dim = theirs["shape"] == []
    largest = max((abs(_number(theirs[key])) for key in ("Max", "Min") if theirs[key] is not None), default=0.0)
    for key in _STATISTICS:
        if theirs[key] is None:
            continue  # it has none for this dtype; we do
        if ours.get(key) is None:
            return f"{key} is missing"
        expected, got = _number(theirs[key]), _number(ours[key])
        if key == "Norm" and zero_dim:
            expected, got = abs(expected), abs(got)  # msProbe writes the value itself
        within = _TOLERANCE.get(theirs["dtype"], 0.0) * max(abs(expected), largest if key == "Mean" else 0.0)
        same = expected == got or (math.isnan(expected) and math.isnan(got))
        if not same and not abs(expected - got) <= within:
            return f"{key} {ours[key]}, there {theirs[key]}"
    return ""


def _number(value: float | bool | str) -> float:
    return float(value)  # "nan" too


def _tensors(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Record]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, str(index)))
    elif isinstance(value, dict) and value.get("type") == "torch.Tensor":
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
