"""The ring: the last steps are kept in memory, and written only when something fires.

It stands between the queue and the files, on the writer's thread, so what it keeps is what the writer would have
written, and looking for a NaN costs the model nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from .nonfinite import first_sightings, whose
from .records import Flushed, Step
from .saved import File

log = logging.getLogger("msprobe_graph")


class Kept(msgspec.Struct, eq=False):
    """A step that is over."""

    step: Step
    files: list[File]


class Ring:
    """The last `keep_last` steps, and what makes them be written: `flush_on`.

    | | fires |
    |---|---|
    | nan, inf | at the end of a step that has one in an entry that `chosen` takes, when the step before had none |
    | request, signal, rpc | when the writer is told to `fire` |

    The step in which something fires is the last of those written. Keeping goes on with the next.
    """

    def __init__(self, keep_last: int, flush_on: Collection[str], chosen: Callable[[str], bool]) -> None:
        self.keep_last = keep_last
        self.flush_on = flush_on
        self.kept: deque[Kept] = deque()
        """Oldest first."""
        self.has_fired = False
        self._kinds = [kind for kind in ("nan", "inf") if kind in flush_on]
        self._chosen = chosen
        self._files: list[File] = []
        """Of the step that runs."""
        self._last = -1
        """The last step that is over."""
        self._due: Flushed | None = None
        """What has fired in the step that runs."""
        self._had: Collection[str] = ()
        """Of nan and inf, what the last step had."""

    def hold(self, file: File) -> None:
        """Keep a file of the step that runs."""
        self._files.append(file)

    def drop(self) -> list[File]:
        """Give back the files of the step that runs: it is to be forgotten."""
        files, self._files = self._files, []
        return files

    def end(self, step: Step) -> Flushed | None:
        """Keep a step that is over, its statistics complete, with its files. Gives what it fires, if it does.

        `kept` may then be longer than `keep_last`.
        """
        kept = Kept(step, self._files)
        self.kept.append(kept)
        self._files = []
        self._last = step.number
        sightings = first_sightings(step, self._kinds, self._chosen) if self._kinds else {}
        new = [kind for kind in sightings if kind not in self._had]
        self._had = sightings
        due, self._due = self._due, None
        if not new:
            return due and self._with_requests(due)
        entry, position, decided = sightings[new[0]]
        value = next((file.saved.value for file in kept.files if file.name == decided.data_name), None)
        return Flushed(new[0], step.number, entry, position, whose(step.requests, value, new[0]))

    def fire(self, flushed: Flushed, running: bool) -> Flushed:
        """Something other than a value of a step fires. When its step is `running`, the end of that fires again. Gives
        `flushed` with the requests of that step, where it names none."""
        if running and flushed.step > self._last:
            self._due = flushed
        return self._with_requests(flushed)

    def tell(self, flushed: Flushed, dump_path: Path) -> None:
        """Log what fired and what becomes of it."""
        numbers = [kept.step.number for kept in self.kept]
        if numbers:
            steps = f"step {numbers[0]} is" if len(numbers) == 1 else f"steps {', '.join(map(str, numbers))} are"
            log.warning("%s; %s written to %s", _what(flushed), steps, dump_path)
        elif flushed.on in ("signal", "rpc"):
            log.warning("%s, when no step was kept", _what(flushed))

    def _with_requests(self, flushed: Flushed) -> Flushed:
        if flushed.requests or not self.kept:
            return flushed
        names = tuple(request.request for request in self.kept[-1].step.requests)
        return msgspec.structs.replace(flushed, requests=names)


def _what(flushed: Flushed) -> str:
    names = ", ".join(flushed.requests)
    with_requests = f" (requests: {names})" if names else ""
    if flushed.entry is not None:
        kind = "a NaN" if flushed.on == "nan" else "an infinity"
        return f"step {flushed.step} has {kind}, first in {flushed.entry} {flushed.position}{with_requests}"
    if flushed.on == "request":
        return f"request {names} is over"
    called = {"signal": "SIGUSR1 came", "rpc": "flush_kept() was called"}[flushed.on]
    return f"{called} in or after step {flushed.step}{with_requests}"


def free_memory() -> int | None:
    """Bytes that the machine's programs may still take, where it tells; a container's own limit is not looked at."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
