"""Which tensors of a step look wrong, and why; above all, which call made the first NaN or Inf.

    >>> for tensor, suspicion in suspicions(read("dump/step0/rank0")):
    ...     if suspicion is not None:
    ...         print(tensor.entry, tensor.position, suspicion.reason)
    Tensor.div.0.forward output.0 makes the first NaN
    Functional.linear.1.forward input_args.0 NaN

Looked for are NaN and Inf anywhere, an output of zeros alone, and float16 or bfloat16 values within a factor of two of
the dtype's largest. A mask of -Inf is an Inf like any other: NaN and Inf have a first maker each, so that one doesn't
hide the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from msprobe_graph.dump.reader import StepDump, TensorAt

LARGEST = {"torch.float16": 65504.0, "torch.bfloat16": 3.3895313892515355e38}
"""The largest finite value of the dtypes that run out of range in practice."""

_INPUTS = ("input_args", "input_kwargs", "parameters", "input")
"""The parts of an entry that its call was given; every other part is what it made."""
_FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


class Suspicion(NamedTuple):
    """What is suspicious about a tensor."""

    reason: str
    origin: bool = False
    """Whether this is the first output with NaN, or with Inf, of a call that was given none."""


def suspicions(step: StepDump) -> Iterator[tuple[TensorAt, Suspicion | None]]:
    """Every tensor of `step`, in order, with what is suspicious about it, or None."""
    unmade = {"NaN", "Inf"}  # kinds whose first maker has not come yet
    for _, group in groupby(step.tensors(), key=lambda tensor: tensor.entry):
        tensors = [(tensor, nonfinite(tensor.record)) for tensor in group]
        given = set().union(*(kinds for tensor, kinds in tensors if not is_made(tensor.position)))
        made: set[str] = set()
        for tensor, kinds in tensors:
            new = _new(kinds, given) if is_made(tensor.position) else set()
            yield tensor, _judge(tensor, kinds, new, first=new & unmade)
            made |= new
        unmade -= made


def nonfinite(record: dict[str, Any]) -> set[str]:
    """Which of "NaN" and "Inf" a tensor record tells of.

    Our records count them. msProbe's show them in Max and Min; in its graph mode NaN is written as null, and that is
    taken for NaN where nothing else makes it null.
    """
    if "nan_count" in record:
        counts = {"NaN": record["nan_count"], "Inf": record["posinf_count"] + record["neginf_count"]}
        return {kind for kind, count in counts.items() if count}
    extremes = (record.get("Max"), record.get("Min"))
    if extremes == (None, None):
        return {"NaN"} if _null_is_nan(record) else set()
    floats = [value for value in extremes if isinstance(value, float)]
    return {"NaN" for value in floats if math.isnan(value)} | {"Inf" for value in floats if math.isinf(value)}


def is_made(position: str) -> bool:
    """Whether the tensor at `position` is what its entry made, rather than what it was given."""
    return position.partition(".")[0] not in _INPUTS


def _new(kinds: set[str], given: set[str]) -> set[str]:
    """The kinds that a call with `kinds` in its output did not inherit: Inf - Inf makes a NaN, but 1 / NaN no Inf."""
    return {kind for kind in kinds if kind not in given and not (kind == "Inf" and "NaN" in given)}


def _judge(tensor: TensorAt, kinds: set[str], new: set[str], first: set[str]) -> Suspicion | None:
    if first:
        return Suspicion(f"makes the first {_words(first)}", origin=True)
    if kinds:
        return Suspicion(f"{_words(kinds)}, not in its input" if new else _words(kinds))
    extremes = _extremes(tensor.record)
    if extremes is None:
        return None
    largest = LARGEST.get(tensor.record["dtype"])
    if largest is not None and max(map(abs, extremes)) > largest / 2:
        return Suspicion(f"near the largest {tensor.record['dtype'].removeprefix('torch.')}")
    if extremes == (0, 0) and is_made(tensor.position) and math.prod(tensor.record["shape"]) > 1:
        return Suspicion("all zero")
    return None


def _extremes(record: dict[str, Any]) -> tuple[float, float] | None:
    """Max and Min of a tensor of floating point or complex numbers; None of any other."""
    extremes = (record.get("Max"), record.get("Min"))
    if record["dtype"].startswith(("torch.float", "torch.bfloat", "torch.complex")) and None not in extremes:
        return extremes  # type: ignore[return-value]
    return None


def _null_is_nan(record: dict[str, Any]) -> bool:
    """No checksum stands in the statistics' place, and the tensor is one that msProbe measures."""
    known = "md5" in record or "reason" in record
    return not known and record["dtype"] in _FLOATS and math.prod(record["shape"]) > 0


def _words(kinds: set[str]) -> str:
    return " and ".join(sorted(kinds, reverse=True))
