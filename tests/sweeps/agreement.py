"""How much of an eager dump a compiled one holds, and how well the two agree.

An entry of the eager dump is *whole* in the compiled one when each of its tensors (arguments, outputs, parameters) is
there with statistics, *in part* when some are. What is missing must be explained: by a `reason` in its record, or by a
hole in the compiled dump's manifest whose site is the entry's name, or that and the position, or the beginning of it.

Operators are joined by what an entry's ``site`` says: the module in which they are called, and which call of that name
in it they are. Where tracing leaves out a check that eager code makes, the numbers in later names differ.

The error of a statistic is relative to what it can be at most, so that none explodes where it is near zero and each is
one for a tensor that has nothing to do with the other:

- Max and Min: relative to the largest magnitude in the eager tensor, max(|Max|, |Min|);
- Mean: relative to the root mean square of its elements, Norm / sqrt(n), which no mean exceeds;
- Norm: relative to itself.

Of a tensor with NaN or infinities the finite values are compared; their numbers must be equal. Another dtype or shape,
another number of non-finite values, and anything but zero where eager has zeros only are infinitely wrong.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from msprobe_graph.dump.names import parse
from msprobe_graph.dump.reader import StepDump

Records = dict[str, dict[str, dict[str, Any]]]
"""Tensor records by entry and position."""


class Coverage(NamedTuple):
    """Of the entries of one level."""

    entries: int = 0
    """How many the eager dump has."""
    whole: int = 0
    part: int = 0
    """How many of them are in the compiled dump in part, the whole ones not counted."""
    foreign: tuple[str, ...] = ()
    """What the compiled dump has and the eager one hasn't: entries, and positions of entries that both have."""
    unexplained: tuple[str, ...] = ()
    """What the eager dump has and the compiled one hasn't, without a reason: entries or positions of them."""


class Agreement(NamedTuple):
    coverage: dict[str, Coverage]
    """By level: "L0" (modules) and "L1" (operators)."""
    worst: float
    """The largest relative error of a statistic: of modules where there are any. Between operators there is no telling
    an error from a program that takes another way when it is traced."""
    worst_at: str
    """Its entry, position and name."""
    holes: dict[str, int]
    """How many holes the compiled dump's manifest has, by reason."""


def agreement(eager: StepDump, compiled: StepDump) -> Agreement:
    """What of the one step's eager dump is in its compiled dump. Both may have been taken at any level."""
    expected, found = _records(eager), _records(compiled)
    twins = {_site(name, eager): name for name in expected}
    found = {twins.get(_site(name, compiled), _alone(name, expected)): records for name, records in found.items()}
    holes = (compiled.manifest or {}).get("holes", [])
    sites = [f"{hole['site']}." for hole in holes]
    names: dict[str, list[str]] = defaultdict(list)
    for name in expected:
        names[_level(name)].append(name)
    foreign = [name for name in found if name not in expected]
    foreign += [f"{name} {at}" for name in expected for at in found.get(name, ()) if at not in expected[name]]
    coverage = {}
    for level in ("L0", "L1"):
        shares = [_share(expected[name], found.get(name)) for name in names[level]]
        coverage[level] = Coverage(
            entries=len(shares),
            whole=sum(share == 1 for share in shares),
            part=sum(0 < share < 1 for share in shares),
            foreign=tuple(name for name in foreign if _level(name) == level),
            unexplained=tuple(
                missing for name in names[level] for missing in _unexplained(name, expected[name], found, sites)
            ),
        )
    errors = [
        (*relative_error(found[name][at], record), f"{name} {at}")
        for name, positions in expected.items()
        if _is_module(name) or not any(map(_is_module, expected))
        for at, record in positions.items()
        if at in found.get(name, {}) and _measured(found[name][at], record)
    ]
    worst, field, at = max(errors, default=(0.0, "", ""))
    return Agreement(coverage, worst, f"{at} {field}".strip(), dict(Counter(hole["reason"] for hole in holes)))


def relative_error(compiled: dict[str, Any], eager: dict[str, Any]) -> tuple[float, str]:
    """The largest relative error of the compiled record's statistics, and the name of the one it is in."""
    for field in ("dtype", "shape", "nan_count", "posinf_count", "neginf_count"):
        if compiled.get(field) != eager.get(field):
            return math.inf, field
    if eager["Norm"] is None:  # it is empty, or can't be measured
        return 0.0, ""
    not_finite = sum(eager.get(count, 0) for count in ("nan_count", "posinf_count", "neginf_count"))
    count = math.prod(eager["shape"]) - not_finite
    if not count:
        return 0.0, ""
    prefix = "finite_" if not_finite else ""
    ours, theirs = (
        {field: float(record[prefix + field]) for field in ("Max", "Min", "Mean", "Norm")}
        for record in (compiled, eager)
    )
    largest = max(abs(theirs["Max"]), abs(theirs["Min"]))
    scales = {"Max": largest, "Min": largest, "Mean": theirs["Norm"] / math.sqrt(count), "Norm": theirs["Norm"]}
    return max((_relative(ours[field] - theirs[field], scale), field) for field, scale in scales.items())


def _relative(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    error = abs(difference) / scale if scale else math.inf
    return math.inf if math.isnan(error) else error


def _records(step: StepDump) -> Records:
    records: Records = {name: {} for name in step.data}
    for tensor in step.tensors():
        records[tensor.entry][tensor.position] = tensor.record
    return records


def _site(name: str, step: StepDump) -> tuple[Any, ...]:
    """What a dump's entry has in common with that of another dump of the same call."""
    parts, site = parse(name), step.data[name].get("site", {})
    if parts.kind == "module":
        return (name,)
    return parts.name, parts.direction, site.get("module"), site.get("number")


def _alone(name: str, expected: Records) -> str:
    """What to call a compiled dump's entry without a twin: not by a name that means another call in the eager dump."""
    return f"{name} (compiled)" if name in expected else name


def _is_module(name: str) -> bool:
    return _level(name) == "L0"


def _level(name: str) -> str:
    return "L0" if name.startswith("Module.") else "L1"


def _measured(record: dict[str, Any], eager: dict[str, Any]) -> bool:
    """Whether `record` has the statistics that eager's has (of an empty tensor there are none, and no reason why)."""
    return record["Norm"] is not None or (eager["Norm"] is None and ("reason" in record) == ("reason" in eager))


def _share(expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]] | None) -> float:
    """Which part of an entry's tensors was found; of an entry without tensors, whether it was itself."""
    if found is None:
        return 0.0
    if not expected:
        return 1.0
    return sum(at in found and _measured(found[at], record) for at, record in expected.items()) / len(expected)


def _unexplained(name: str, expected: dict[str, dict[str, Any]], found: Records, sites: list[str]) -> list[str]:
    if any(f"{name}.".startswith(site) for site in sites):
        return []
    if name not in found:
        return [name]
    return [
        f"{name} {at}"
        for at, record in expected.items()
        if not (at in found[name] and (_measured(found[name][at], record) or found[name][at].get("reason")))
        and not any(f"{name}.{at}.".startswith(site) for site in sites)
    ]
