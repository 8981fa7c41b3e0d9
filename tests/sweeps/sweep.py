"""Many architectures, eager against compiled: ``python tests/sweeps/sweep.py [--dtype bfloat16] [--fidelity full] [NAME ...]``.

Needs ``pip install msprobe-graph[sweep]``, downloads nothing, and takes about 20 minutes on two cores for all of them,
half of it in the C++ compiler: with --cache a second sweep finds its work done. A row for each architecture::

           outputs      graphs    breaks  L0            L1              worst error  compile
    -----  ---------  --------  --------  ------------  ------------  -------------  -----------
    llama  bit-equal         1         0  32 78% + 22%  139 51% + 9%          3e-07  4.4 s + 12%

- outputs: of the captured program against the untapped one, bit by bit; "unsteady" where two untapped ones differ.
- graphs, breaks: of the untapped program; "1 > 2" where the captured one has another number of graphs.
- L0, L1: eager's entries (modules, operators), and which share of them is in the compiled dump whole and in part.
- worst error: of a statistic against eager's, as agreement.py defines it; with --untapped, of the outputs.
- compile: CPU seconds that compiling the untapped program takes, and how many more the captured one takes. Both find
  their C++ functions compiled, but for those that only the captured one has.

Below it stand the shares over all architectures, the reasons of the holes, and the violations, with which the command
ends with status 1:

- exact: the outputs differ, though two untapped programs agree;
- the program is compiled in other graphs than without us, or breaks elsewhere (what a dump then holds would be eager
  capture's, of another program);
- the compiled dump has an L0 entry that eager's has not;
- an L0 entry of eager's, or a position in one, is missing without a reason;
- exact: fewer than 60 % of eager's L0 entries are there, whole or in part; full: fewer than 95 % are whole;
- float32: an error of an L0 entry's statistic is above 1e-4, though the untapped program's outputs are nearer to eager's;
- an architecture ended with an error.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from agreement import Coverage
from architectures import ARCHITECTURES
from examine import Report
from tabulate import tabulate

ENOUGH = {"exact": 0.60, "full": 0.95}
"""Which share of eager's L0 entries must be in the compiled dump: with exact in part, with full whole."""
TOLERANCE = 1e-4
"""Of float32 statistics, relative."""
EXAMINE = Path(__file__).with_name("examine.py")
HEAD = ["", "outputs", "graphs", "breaks", "L0", "L1", "worst error", "compile"]


def examine(name: str, options: argparse.Namespace, cache: Path) -> Report:
    """What a process of its own reports of one architecture. No two at a time may have the same folder as their cache:
    Inductor loads C++ functions that another process is still writing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, str(EXAMINE), name, str(file)]
        command += ["--dtype", options.dtype, "--threads", str(options.threads)]
        command += [] if options.untapped else ["--fidelity", options.fidelity]
        try:
            ended = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=options.timeout,
                # Some models loop over sets of strings: eager code in the order of the hashes, dynamo in that of their
                # insertion. With this seed the calls of those here are in one order.
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONHASHSEED": "0"},
            )
        except subprocess.TimeoutExpired:
            return Report(name, error=f"it took more than {options.timeout:g} s")
        if not file.exists():
            said = ended.stderr.strip().splitlines() or ["it said nothing"]
            return Report(name, error=f"exit status {ended.returncode}: {said[-1]}")
        return Report.load(file)


def violations(report: Report, dtype: str, fidelity: str) -> Iterator[str]:
    """One phrase each."""
    if report.error:
        yield f"error: {report.error}"
    if report.agreement is None:
        return
    if fidelity == "exact" and report.deterministic and not report.equal:
        yield "the outputs differ from the untapped program's"
    # How often dynamo meets a break grows with its traces, of which capture makes three instead of one.
    if (report.captured_graphs, report.captured_breaks.keys()) != (report.graphs, report.breaks.keys()):
        yield (
            f"capture has changed what is compiled: {report.captured_graphs} graphs instead of {report.graphs}, "
            f"breaks: {report.captured_breaks or 'none'}"
        )
    modules = report.agreement.coverage["L0"]
    # A position, with a space before it, may be the program's own: under tracing, models make masks that they leave out
    # in eager code.
    foreign = [name for name in modules.foreign if " " not in name]
    if foreign:
        yield f"eager has no {_some(foreign)}"
    if modules.unexplained:
        yield f"missing without a reason: {_some(modules.unexplained)}"
    there = modules.whole if fidelity == "full" else modules.whole + modules.part
    if there < ENOUGH[fidelity] * modules.entries:
        yield f"{there} of {modules.entries} L0 entries are there, fewer than {ENOUGH[fidelity]:.0%}"
    if dtype == "float32" and report.agreement.worst > TOLERANCE >= report.untapped_error:
        yield f"{report.agreement.worst_at} is off by {report.agreement.worst:.1e}"


def _some(sites: Sequence[str]) -> str:
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    return ", ".join(sites[:3]) + more


def row(report: Report) -> list[str]:
    if report.error:
        return [report.name, "error"]
    graphs, breaks = str(report.graphs), str(sum(report.breaks.values()))
    seconds = f"{report.untapped_compile:.1f} s"
    if report.agreement is None:
        steady = "steady" if report.deterministic else "unsteady"
        return [report.name, steady, graphs, breaks, "", "", f"{report.untapped_error:.0e}", seconds]
    outputs = "bit-equal" if report.equal else "differ" if report.deterministic else "unsteady"
    if report.captured_graphs != report.graphs:
        graphs += f" > {report.captured_graphs}"
    shares = (_shares([report.agreement.coverage[level]]) for level in ("L0", "L1"))
    more = report.captured_compile / report.untapped_compile - 1
    return [report.name, outputs, graphs, breaks, *shares, f"{report.agreement.worst:.0e}", f"{seconds} {more:+.0%}"]


def _shares(coverages: Sequence[Coverage]) -> str:
    entries = sum(coverage.entries for coverage in coverages)
    whole = sum(coverage.whole for coverage in coverages) / max(entries, 1)
    part = sum(coverage.part for coverage in coverages) / max(entries, 1)
    return f"{entries} {whole:.0%} + {part:.0%}"


def summary(reports: Sequence[Report]) -> Iterator[str]:
    """The lines below the table, but for the violations."""
    agreements = [report.agreement for report in reports if report.agreement is not None]
    for level in ("L0", "L1"):
        if agreements:
            yield f"{level} of all: {_shares([found.coverage[level] for found in agreements])}"
    reasons: Counter[str] = Counter()
    for found in agreements:
        reasons.update(found.holes)
    yield from (f"{count} holes: {reason}" for reason, count in reasons.most_common())
    yield from (f"{report.name} breaks: {reason} ({n})" for report in reports for reason, n in report.breaks.items())
    operators = [found.coverage["L1"] for found in agreements]
    if foreign := sum(len(coverage.foreign) for coverage in operators):
        yield f"L1: {foreign} entries, or positions in them, that eager has not"
    if unexplained := sum(len(coverage.unexplained) for coverage in operators):
        yield f"L1: {unexplained} entries, or positions in them, that are missing without a reason"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, unless given: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--fidelity", choices=tuple(ENOUGH), default="exact")
    parser.add_argument("--untapped", action="store_true", help="only what torch does without us")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each model (default: 1)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each architecture (default: 600)")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep compiled C++ functions there for the next sweep"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all reports there, too")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")

    found: dict[str, list[str]] = {}
    reports = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        caches: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            caches.put((options.cache or Path(folder)).absolute() / str(number))

        def examine_next(name: str) -> Report:
            cache = caches.get()
            try:
                return examine(name, options, cache)
            finally:
                caches.put(cache)

        for report in pool.map(examine_next, options.names or ARCHITECTURES):
            reports.append(report)
            found[report.name] = list(violations(report, options.dtype, options.fidelity))
            print(f"{report.name}: {'; '.join(found[report.name]) or 'ok'}", file=sys.stderr, flush=True)
    print(tabulate(map(row, reports), HEAD, disable_numparse=True))
    print("", *summary(reports), sep="\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    wrong = [f"{name}: {violation}" for name, each in found.items() for violation in each]
    print(f"\n{len(wrong)} violations" + "".join(f"\n  {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
