"""Where two dumps of one step part; above all, which operator was given the same in both and made something else.

    >>> found = compare(read("eager/step0/rank0"), read("compiled/step0/rank0"))
    >>> found.origin.entry, found.origin.worst.position, found.origin.worst.apart
    ('Functional.silu.0.forward', 'output.0', 0.0214...)

From two dumps come pairs of entries, from each pair the differences of its tensors.

Two tensors are as far apart as the worst of their Max, Min, Mean and Norm, each as

    |b - a| / max(rms, |a|, |b|)        with rms = |Norm| / sqrt(number of values), the larger of the two,

so that a mean near zero is measured by the tensor's own scale and a single large value by itself. Where both hold NaN
or Inf in equal numbers the statistics are those of the finite values; other numbers, or another shape, are infinitely
far apart. An equal md5 is agreement; where there is nothing but checksums, another md5 parts. The dtypes may differ.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from msprobe_graph.dump.names import parse
from msprobe_graph.dump.reader import StepDump

from .suspicion import is_made

TOLERANCES = {
    "torch.float8_e5m2": 0.25,
    "torch.float8_e4m3fn": 0.25,
    "torch.bfloat16": 2e-2,
    "torch.float16": 2e-2,
    "torch.float32": 1e-4,
    "torch.float64": 1e-9,
}
"""By dtype, the coarsest first. What is cast up is no more exact than it was: the coarsest in either dump counts."""
EXACT = 1e-9
"""The tolerance for integers: room for the order in which a mean is added up."""
UNSAID = "no reason is given"

_STATISTICS = ("Max", "Min", "Mean", "Norm")
_COUNTS = ("nan_count", "posinf_count", "neginf_count")

Side = Mapping[str, dict[str, Any]]
"""The tensor records of one entry, by position."""


class Difference(NamedTuple):
    """A tensor in both dumps."""

    position: str
    a: dict[str, Any]
    b: dict[str, Any]
    what: str
    """Of Max, Min, Mean and Norm the one that is furthest apart; or shape, md5, nan_count, posinf_count,
    neginf_count."""
    apart: float
    parts: bool
    """Whether that is more than the tolerance."""


class Compared(NamedTuple):
    """An entry in both dumps."""

    entry: str
    """Its name in B."""
    entry_a: str
    differences: list[Difference]
    """Of the tensors with values in both, in order."""
    unseen: list[str]
    """The positions whose tensors have no values in one of them, or are in one only."""

    @property
    def parts(self) -> bool:
        return any(difference.parts for difference in self.differences)

    @property
    def worst(self) -> Difference:
        """The difference furthest apart, outputs before inputs. There must be one."""
        return max(self.differences, key=lambda each: (each.parts, is_made(each.position), each.apart))

    @property
    def inputs(self) -> str:
        """Whether what it was given agrees, parts, or is not seen. A part that is not seen may agree or not."""
        if any(each.parts for each in self.differences if not is_made(each.position)):
            return "part"
        return "not seen" if any(not is_made(position) for position in self.unseen) else "agree"

    @property
    def is_origin(self) -> bool:
        """Whether all its inputs agree and an output does not. A module's gradients have no input to judge by."""
        return self.parts and self.inputs == "agree" and ".parameters_grad." not in self.entry


class Comparison(NamedTuple):
    """One process's step in both dumps."""

    tolerance: float
    entries: list[Compared]
    """Those in both, in the order of B."""
    only_a: Counter[str]
    """How many are in A only, by the reasons that B's manifest gives."""
    only_b: Counter[str]

    @property
    def parting(self) -> list[Compared]:
        return [each for each in self.entries if each.parts]

    @property
    def origin(self) -> Compared | None:
        """The first entry whose inputs agree and whose output does not."""
        return next((each for each in self.entries if each.is_origin), None)


def compare(a: StepDump, b: StepDump, tolerance: float | None = None) -> Comparison:
    """Compare each tensor in both dumps; `tolerance` None: see TOLERANCES."""
    tensors_a, tensors_b = _tensors(a), _tensors(b)
    if tolerance is None:
        dtypes = {record["dtype"] for side in (*tensors_a.values(), *tensors_b.values()) for record in side.values()}
        tolerance = next((known for dtype, known in TOLERANCES.items() if dtype in dtypes), EXACT)
    names = dict(pairs(a, b))
    entries = [_compared(entry, names[entry], tensors_a, tensors_b, tolerance) for entry in b.data if entry in names]
    joined = set(names.values())
    return Comparison(
        tolerance,
        entries,
        Counter(_reasons((entry for entry in a.data if entry not in joined), b.manifest)),
        Counter(_reasons((entry for entry in b.data if entry not in names), a.manifest)),
    )


def pairs(a: StepDump, b: StepDump) -> Iterator[tuple[str, str]]:
    """The entries that are one call, as names in B and in A.

    They are joined by name. Of an API that was called more often, or in another order, in one of the two, call numbers
    mean other calls, which shows where calls of one name stand in different modules; then calls of that API are
    joined by their sites.
    """
    groups_a, groups_b = _by_api(a), _by_api(b)
    for api in groups_b.keys() & groups_a.keys():
        entries_a, entries_b = groups_a[api], groups_b[api]
        common = entries_a.keys() & entries_b.keys()
        shifted = any(_module(entries_a[name]) != _module(entries_b[name]) for name in common)
        key: Callable[[str, dict[str, Any]], Any] = _site if shifted else lambda name, entry: name
        known = {key(name, entry): name for name, entry in entries_a.items()}
        for name, entry in entries_b.items():
            if (partner := known.get(key(name, entry))) is not None:
                yield name, partner


def _by_api(step: StepDump) -> dict[Any, dict[str, dict[str, Any]]]:
    """The entries by all of their names but the call number."""
    found: dict[Any, dict[str, dict[str, Any]]] = {}
    for name, entry in step.data.items():
        try:
            api: Any = parse(name)._replace(call=0)
        except ValueError:  # a tensor that save() was given
            api = name
        found.setdefault(api, {})[name] = entry
    return found


def _module(entry: dict[str, Any]) -> str | None:
    """The module in which the call was made; None where the dump doesn't say."""
    module: str | None = (entry.get("site") or {}).get("module")
    return module


def _site(name: str, entry: dict[str, Any]) -> tuple[str | None, int]:
    site = entry.get("site") or {}
    return site.get("module"), site.get("number", 0)


def _tensors(step: StepDump) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for tensor in step.tensors():
        found.setdefault(tensor.entry, {})[tensor.position] = tensor.record
    return found


def _compared(
    entry: str, entry_a: str, tensors_a: Mapping[str, Side], tensors_b: Mapping[str, Side], tolerance: float
) -> Compared:
    side_a, side_b = tensors_a.get(entry_a, {}), tensors_b.get(entry, {})
    differences, unseen = [], []
    for position in dict.fromkeys((*side_b, *side_a)):
        a, b = side_a.get(position), side_b.get(position)
        if a is None or b is None or not (_seen(a) and _seen(b)):
            unseen.append(position)
            continue
        what, apart = distance(a, b)
        exact = not _inexact(a) and not _inexact(b)
        differences.append(Difference(position, a, b, what, apart, apart > (EXACT if exact else tolerance)))
    return Compared(entry, entry_a, differences, unseen)


def _seen(record: dict[str, Any]) -> bool:
    """Whether the dump tells of the tensor's values; of one without elements there is nothing more to tell."""
    return record["shape"] is not None and (record["Max"] is not None or "md5" in record or 0 in record["shape"])


def _inexact(record: dict[str, Any]) -> bool:
    """Whether the tensor's values may differ in their last bits; those of bool are told from such values."""
    return not record["dtype"].startswith(("torch.int", "torch.uint"))


def distance(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, float]:
    """How far apart two tensor records are, and in what; see the formula above."""
    if a["shape"] != b["shape"]:
        return "shape", math.inf
    if "md5" in a and a.get("md5") == b.get("md5") and a["dtype"] == b["dtype"]:
        return "Max", 0.0
    for count in _COUNTS:
        if a.get(count, 0) != b.get(count, 0):
            return count, math.inf
    if a["Max"] is None or b["Max"] is None:
        return ("md5", math.inf) if "md5" in a and "md5" in b else ("Max", 0.0)
    finite = "finite_" if "finite_Max" in a and "finite_Max" in b else ""
    size = math.prod(a["shape"]) - sum(a.get(count, 0) for count in _COUNTS)
    norms = [abs(record[f"{finite}Norm"]) for record in (a, b)]
    rms = max(norms) / math.sqrt(max(size, 1))
    apart = {name: _relative(a[f"{finite}{name}"], b[f"{finite}{name}"], rms) for name in _STATISTICS}
    worst = max(apart, key=lambda name: apart[name])
    return worst, apart[worst]


def _relative(a: float, b: float, rms: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    scale = max(abs(a), abs(b), rms if math.isfinite(rms) else 0.0, sys.float_info.min)
    return abs(b - a) / scale if math.isfinite(scale) else math.inf


def _reasons(entries: Iterable[str], manifest: dict[str, Any] | None) -> Iterator[str]:
    """Why `manifest` says that it has no such entry: a hole's site is an entry, or a module that may be called."""
    told = {hole["site"]: hole["reason"] for hole in manifest["holes"]} if manifest else {}
    for entry in entries:
        yield next((told[site] for site in _sites(entry) if site in told), UNSAID)


def _sites(entry: str) -> Iterator[str]:
    """The names that a hole may have: of the entry, and of it less its call number, and less its direction."""
    yield entry
    yield entry.rsplit(".", 1)[0]
    yield entry.rsplit(".", 2)[0]
