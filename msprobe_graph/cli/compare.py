"""msprobe-graph compare: where two dumps part, as lines of text."""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from msprobe_graph.analysis.compare import Compared, Comparison, compare
from msprobe_graph.dump.names import parse
from msprobe_graph.dump.reader import DumpError, StepDump, read, steps

from .command import Commands, Outcome
from .show import number

ROWS = 20
"""As many entries the table holds unless all are asked for."""


def add_parser(commands: Commands) -> None:
    """Tell the command line of this command."""
    parser = commands.add_parser(
        "compare",
        help="find where two dumps part",
        description="Compares two dumps of one program, entry by entry, and names the first whose inputs agree and "
        "whose output does not. Exit code 1 where they part, 0 where they agree. Two tensors are as far apart as the "
        "worst of their Max, Min, Mean and Norm: |b - a| / max(Norm / sqrt(number of values), |a|, |b|).",
    )
    parser.add_argument("a", type=Path, metavar="A", help="a dump_path, or a step or process folder in it")
    parser.add_argument("b", type=Path, metavar="B", help="the other; the table is in its order")
    parser.add_argument("--step", type=int, metavar="N", help="only this step (default: all)")
    parser.add_argument("--rank", type=int, metavar="R", help="only this rank (default: all)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="how far apart still agrees (default: by the coarsest dtype in the dumps, float32 1e-4, bfloat16 and "
        "float16 2e-2)",
    )
    parser.add_argument("--all", action="store_true", help="all entries that part, not only the first ones")
    parser.set_defaults(run=run)


def run(options: Namespace) -> Outcome:
    """The command, with the options of its parser."""
    return compare_dumps(options.a, options.b, options.step, options.rank, options.tolerance, options.all)


def compare_dumps(
    a: Path, b: Path, step: int | None, rank: int | None, tolerance: float | None, whole: bool
) -> Outcome:
    """Compare the steps that are in both, each with a line, the first that parts in detail; what is in one only is told
    at the end, with the other's reasons.

    `step`, `rank`: only these; `whole`: the table without an end. DumpError where the two have nothing in common.
    """
    joined = [
        (place, folder_a, folder_b)
        for place, folder_a, folder_b in _joined(steps(a.resolve()), steps(b.resolve()))
        if step in (None, number(folder_b.parent, "step")) and rank in (None, number(folder_b, "rank"))
    ]
    if not joined:
        raise DumpError(f"{a} and {b} have no such step in common")
    lines: list[str] = []
    parted = compared = 0
    only_a: Counter[str] = Counter()
    only_b: Counter[str] = Counter()
    for place, folder_a, folder_b in joined:
        step_a, step_b = read(folder_a), read(folder_b)
        found = compare(step_a, step_b, tolerance)
        compared += sum(len(entry.differences) for entry in found.entries)
        parted += bool(found.parting)
        only_a += found.only_a
        only_b += found.only_b
        lines.append(f"{place}: {_counts(found)}")
        if parted == 1 and found.parting:
            lines += ["", *_detail(found, step_a, step_b, whole), ""]
        elif found.parting:
            lines.append(f"    {_first(found)}")
    if not compared:
        raise DumpError(f"{a} and {b} have no tensor in common whose values both of them hold")
    return Outcome([*lines, *_missing("A", "B", only_a), *_missing("B", "A", only_b)], int(parted > 0))


def _joined(folders_a: list[Path], folders_b: list[Path]) -> Iterator[tuple[str, Path, Path]]:
    """The processes' folders that belong together, by step, and within it by name or, as process ids differ, by place.

    Where each dump has one step these are taken for the same.
    """
    by_step_a, by_step_b = _by_step(folders_a), _by_step(folders_b)
    together = [(number, number) for number in by_step_b if number in by_step_a]
    if len(by_step_a) == len(by_step_b) == 1:
        together = list(zip(by_step_a, by_step_b, strict=True))
    for number_a, number_b in together:
        processes_a, processes_b = by_step_a[number_a], by_step_b[number_b]
        if not processes_a.keys() & processes_b.keys():
            processes_a = dict(zip(processes_b, processes_a.values(), strict=False))
        for name, folder in processes_b.items():
            if name in processes_a:
                yield f"step{number_b}/{name}", processes_a[name], folder


def _by_step(folders: list[Path]) -> dict[int | None, dict[str, Path]]:
    found: dict[int | None, dict[str, Path]] = {}
    for folder in folders:
        found.setdefault(number(folder.parent, "step"), {})[folder.name] = folder
    return found


def _counts(found: Comparison) -> str:
    """What was compared, and what could not be."""
    unseen = sum(len(entry.unseen) for entry in found.entries)
    facts = [
        f"{len(found.parting)} of {len(found.entries)} entries part" if found.parting else "no entry parts",
        f"{sum(len(entry.differences) for entry in found.entries)} tensors compared (tolerance {found.tolerance:g})",
    ]
    if unseen:
        facts.append(f"{unseen} without values in both")
    for dump, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            facts.append(f"{only.total()} entries in {dump} only")
    return ", ".join(facts)


def _detail(found: Comparison, a: StepDump, b: StepDump, whole: bool) -> Iterator[str]:
    yield _first(found)
    yield from _inside(found.origin, a, b)
    yield ""
    rows = [_row(entry, entry is found.origin) for entry in found.parting]
    shown = rows if whole else rows[:ROWS]
    head = ["", "entry", "inputs", "position", "shape", "dtype", "of", "A", "B", "apart"]
    align = ["left"] * 7 + ["right"] * 3
    yield from tabulate(shown, head, "simple", colalign=align, disable_numparse=True).splitlines()
    if len(rows) > len(shown):
        yield f"... and {len(rows) - len(shown)} entries more (--all)"


def _first(found: Comparison) -> str:
    """Where it begins, in one sentence."""
    first = found.parting[0]
    if (origin := found.origin) is None:
        return (
            f"{first.entry} is the first to part, in {_what(first)}. Its inputs {_were(first)}; no entry whose inputs "
            "all agree parts."
        )
    sentence = f"{origin.entry} is the first whose inputs agree and whose output does not: {_what(origin)}."
    if first is not origin:
        sentence += f" (Before it {first.entry} parts, whose inputs {_were(first)}.)"
    return sentence


def _what(entry: Compared) -> str:
    worst = entry.worst
    if worst.what in ("shape", "md5"):
        return f"{worst.position}, another {worst.what}"
    a, b = (_text(record.get(worst.what)) for record in (worst.a, worst.b))
    apart = f", {worst.apart:.2g} apart" if math.isfinite(worst.apart) else ""
    return f"{worst.position}, {worst.what} {a} against {b}{apart}"


def _were(entry: Compared) -> str:
    return {"not seen": "are not all in both dumps", "part": "part too", "agree": "agree"}[entry.inputs]


def _inside(origin: Compared | None, a: StepDump, b: StepDump) -> Iterator[str]:
    """How to look into a module whose operators the compiled program hides."""
    if origin is None or not b.manifest or b.manifest["mode"] != "graph":
        return
    name = parse(origin.entry)
    hidden = [entry for entry, parent in a.construct.items() if parent == origin.entry_a and entry not in b.data]
    if name.kind == "module" and hidden:
        yield f"{len(hidden)} of the calls inside it are not in B: " + (
            f'compile with options={{"full_modules": ["{name.name}"]}} to see them.'
        )


def _row(entry: Compared, origin: bool) -> list[str]:
    worst = entry.worst
    dtypes = dict.fromkeys(record["dtype"].removeprefix("torch.") for record in (worst.a, worst.b))
    return [
        "!!" if origin else "",
        entry.entry if entry.entry == entry.entry_a else f"{entry.entry} (A: {entry.entry_a})",
        entry.inputs,
        worst.position,
        " / ".join(dict.fromkeys(str(record["shape"]) for record in (worst.a, worst.b))),
        " / ".join(dtypes),
        worst.what,
        *("" if worst.what == "shape" else _text(record.get(worst.what)) for record in (worst.a, worst.b)),
        f"{worst.apart:.2g}",
    ]


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _missing(here: str, there: str, only: Counter[str]) -> Iterator[str]:
    if only:
        yield f"Entries in {here} only, by the reason why they are not in {there}:"
        for reason, count in only.most_common():
            yield f"{count:7} {reason}"
