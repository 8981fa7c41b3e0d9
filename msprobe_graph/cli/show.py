"""msprobe-graph show: one process's dump of one step, as lines of text."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from msprobe_graph.analysis.suspicion import Suspicion, suspicions
from msprobe_graph.dump.reader import DumpError, StepDump, TensorAt, read, steps

from .command import Commands, Outcome
from .table import table

LISTED = 5
"""As many steps, holes, requests are named in a line; of the rest only the number is given."""

Found = tuple[TensorAt, Suspicion | None]


def add_parser(commands: Commands) -> None:
    """Tell the command line of this command."""
    parser = commands.add_parser(
        "show",
        help="print a step as a table",
        description="Prints a step as a table, a row for each tensor. Suspicious ones are marked with ! and a reason; "
        "!! marks the call that makes the first NaN or Inf. In a terminal, names are shortened to fit and long tables "
        "cut; piped, all is printed.",
    )
    parser.add_argument("dump", type=Path, metavar="DUMP", help="a dump_path, or a step or process folder in it")
    parser.add_argument("--step", type=int, metavar="N", help="the step (default: the first one captured)")
    parser.add_argument("--rank", type=int, metavar="R", help="the rank (default: the first one)")
    parser.add_argument("--entry", metavar="SUBSTRING", help="only entries whose name contains this")
    parser.add_argument("--suspicious", action="store_true", help="only what is suspicious")
    parser.set_defaults(run=run)


def run(options: Namespace) -> Outcome:
    """The command, with the options of its parser."""
    return Outcome(show(options.dump, options.step, options.rank, options.entry, options.suspicious))


def show(dump: Path, step: int | None, rank: int | None, entry: str | None, suspicious: bool) -> Iterator[str]:
    """The lines that describe one step at or below `dump`; DumpError when there is none that fits."""
    folders = steps(dump.resolve())
    folder = _chosen(folders, dump, step, rank)
    content = read(folder)
    found = list(suspicions(content))
    yield _place(folder, folders)
    yield from _head(content)
    yield ""
    rows = [row for row in found if (entry or "") in row[0].entry and (row[1] or not suspicious)]
    yield from table(rows) if rows else [_nothing(entry, suspicious)]
    yield ""
    yield from _holes(content)
    yield _summary(found)


def _chosen(folders: list[Path], dump: Path, step: int | None, rank: int | None) -> Path:
    """The first of `folders` that is of that step and rank."""
    if len(roots := {str(folder.parent.parent): None for folder in folders}) > 1:
        raise DumpError(f"{dump} holds several dumps: show one of {_listed(roots)}")
    for folder in folders:
        if step in (None, number(folder.parent, "step")) and rank in (None, number(folder, "rank")):
            return folder
    wanted = [f"{name}{number}" for name, number in (("step", step), ("rank", rank)) if number is not None]
    there = _listed(f"{folder.parent.name}/{folder.name}" for folder in folders)
    raise DumpError(f"{dump} has no {'/'.join(wanted)}: there is {there}")


def number(folder: Path, kind: str) -> int | None:
    """The N of a folder called ``<kind><N>``."""
    number = folder.name.removeprefix(kind)
    return int(number) if number != folder.name and number.isdecimal() else None


def _place(folder: Path, folders: list[Path]) -> str:
    """Which step of which process this is, and which others there are."""
    step_names = dict.fromkeys(each.parent.name for each in folders)
    processes = [each.name for each in folders if each.parent == folder.parent]
    place = f"{folder}: one step"
    if len(step_names) > 1:
        place = f"{folder}: one of {len(step_names)} steps ({_listed(step_names)})"
    if len(processes) > 1:
        place += f", one of {len(processes)} processes ({_listed(processes)})"
    return place


def _head(content: StepDump) -> Iterator[str]:
    """What was captured, of what, and whether it is whole."""
    facts = [f"task {content.task}", f"level {content.level}"]
    manifest = content.manifest
    if manifest is None:
        facts.append("no manifest, as in dumps of msProbe")
    else:
        facts += [f"mode {manifest['mode']}", f"model {manifest['model'] or 'unknown'}", f"device {manifest['device']}"]
        facts.append(
            "finished" if content.finished else "UNFINISHED: its process ended, or still runs, within the step"
        )
        if expected := manifest["sites"]["expected"]:
            facts.append(f"{manifest['sites']['captured']} of {_counted(expected, 'expected site')} captured")
    yield ", ".join([*facts, _counted(len(content.data), "entry", "entries")])
    if manifest and (requests := manifest["requests"]):
        yield "requests: " + _listed(f"{one['request']} (rows {one['begin']} to {one['end'] - 1})" for one in requests)


def _nothing(entry: str | None, suspicious: bool) -> str:
    what = "suspicious tensor" if suspicious else "tensor"
    return f"No {what} in an entry whose name contains {entry!r}." if entry else f"No {what} in this step."


def _holes(content: StepDump) -> Iterator[str]:
    """What should have been captured and was not, as far as a manifest says."""
    if content.manifest and (holes := content.manifest["holes"]):
        reasons = _listed((f"{hole['site']} ({hole['reason']})" for hole in holes), between="; ")
        yield f"{_counted(len(holes), 'hole')}: {reasons}"


def _summary(found: list[Found]) -> str:
    """How many tensors are suspicious, and who began it."""
    marked = [(tensor, suspicion) for tensor, suspicion in found if suspicion]
    origins = [f"{tensor.entry} {suspicion.reason}" for tensor, suspicion in marked if suspicion.origin]
    count = f"{len(marked)} of {_counted(len(found), 'tensor')} suspicious"
    return ": ".join([count, "; ".join(dict.fromkeys(origins))] if origins else [count])


def _listed(names: Iterable[str], between: str = ", ") -> str:
    names = list(names)
    rest = len(names) - LISTED
    return between.join(names[:LISTED] + ([f"and {rest} more"] if rest > 0 else []))


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
