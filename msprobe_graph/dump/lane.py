"""Steps whose form is known, written by a thread that has nothing to do with Python: see forms.py and writing/lane.h.

The writer's thread and the program's take the interpreter's lock from one another, which costs the program far more
than what is done under it. A step that goes this way costs the program one call of a C function.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from .budget import Budget
from .encode import tree
from .forms import Candidates, Forms, tables
from .records import Step
from .template import writing


class Lane:
    """Writes steps in the order in which it takes them. For the thread that captures."""

    def __init__(
        self, forms: Forms, folder: Callable[[int], str], budget: Budget, otherwise: Callable[[Step], None]
    ) -> None:
        """`folder` gives the path of a step's. `otherwise` takes the steps that turn out to be of another form, or
        that can't be written like this; it is called in a thread of this lane's. OSError for want of the compiled
        code."""
        functions = _functions()
        if functions is None:
            raise OSError("there is no compiled _writing")
        self._functions = functions
        self._handle = functions.make()
        self._counts = (ctypes.c_int64 * 2).from_address(functions.counts(self._handle))
        """How many steps are settled, and how many bytes were written."""
        self._forms = forms
        self._folder = folder
        self._budget = budget
        self._otherwise = otherwise
        self._taken = 0
        """So many steps were; they count from 0."""
        self._kept: dict[int, tuple[Step, Candidates]] = {}
        """Those that may not be settled yet, with all that their texts are made of."""
        self._released = 0
        self._bytes = 0
        """So many of those written were counted in the budget."""
        threading.Thread(target=self._run, name="msprobe_graph lane", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many steps are not on disk yet."""
        return self._taken - self._counts[0]

    def wait(self, behind: int) -> None:
        """Return when at most so many are."""
        if self.waiting > behind:
            self._functions.wait(self._handle, self._taken - behind)

    def take(self, step: Step) -> bool:
        """False where the step is to be written otherwise."""
        self._settle()
        known = self._forms.find(step)
        if known is None or not self._budget.has((self.waiting + 1) * known.room):
            return False
        places = [table.lies_at() for table in tables(step)]
        if None in places:
            return False
        try:
            folder, requests = os.fsencode(self._folder(step.number)), tree(step.requests)
        except UnicodeEncodeError:  # the writer says so
            return False
        there = b"".join(_TABLE.pack(*place) for place in places if place is not None)
        self._kept[self._taken] = step, known
        self._taken += 1
        self._functions.put(
            self._handle, known.addresses, len(known.forms), there, len(places), folder, step.number, requests
        )
        return True

    def _settle(self) -> None:
        """Let go of what was written, and count it."""
        settled, written = self._counts
        while self._released < settled:
            del self._kept[self._released]
            self._released += 1
        self._budget.add(written - self._bytes)
        self._bytes = written

    def _run(self) -> None:
        while True:
            step, _ = self._kept[self._functions.run(self._handle)]
            self._otherwise(step)


_TABLE = struct.Struct("=4q")
"""What `dump.records.Arriving.lies_at` gives, as writing/lane.h has it."""


class _Functions(NamedTuple):
    """What writing/writing.cpp says of a lane."""

    make: Callable[[], int]
    put: Callable[..., int]
    run: Callable[[int], int]
    wait: Callable[[int, int], int]
    counts: Callable[[int], int]


@functools.cache
def _functions() -> _Functions | None:
    pointer, size, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    prefix = "msprobe_graph_lane"
    found = (
        writing(prefix, pointer),
        writing(f"{prefix}_put", None, pointer, pointer, size, text, size, text, size, text, locked=True),
        writing(f"{prefix}_run", size, pointer),
        writing(f"{prefix}_wait", None, pointer, size),
        writing(f"{prefix}_counts", pointer, pointer),
    )
    return None if None in found else _Functions(*found)  # type: ignore[arg-type]


def lanes() -> bool:
    """Whether there is the code that a lane needs."""
    return _functions() is not None
