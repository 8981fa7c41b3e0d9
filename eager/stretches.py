"""What a compiled module runs eagerly: the mode is on there, too, and off wherever dynamo looks.

Compiled code is guarded by the modes that were on when dynamo traced it. With ours on, dynamo would find no code that
fits and compile anew. So inside a compiled module the mode is on from where code is known to run eagerly up to the
next frame that dynamo looks at:

| on | off |
|---|---|
| a module's hooks run: dynamo has left its call to Python | dynamo looks for code that fits a frame, or compiles it |
| a compiled graph has returned | the module call is over, and was made by code that is not known to run eagerly |
| dynamo has given a frame up | |

What is missed becomes a hole: functions that come after compiled code without a graph, or with one of another backend,
or after a frame that dynamo no longer compiles because it was compiled too often; and functions under the program's own
TorchFunctionMode. One gap leaves no hole: functions that compiled code without a graph calls itself, at a graph break,
before the next graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from types import CodeType
from typing import Any, NamedTuple

from msprobe_graph.dump.records import Hole

from ._compat import FrameCallback, frame_callback, on_stack, others_on_stack, replace_frame_callback, runs_what_fits
from .call_stacks import MODULE_CALL
from .context import Context, here
from .modes import ModeSwitch

OWN_MODE = (
    "a TorchFunctionMode of the program is on there, and dynamo hands the stack of modes from one compiled graph to "
    "the next: so functions between them are not captured"
)
NO_GRAPH = (
    "dynamo looked for compiled code for what is called here, and no graph of ours ran: functions that ran eagerly "
    "from here up to the next compiled graph or module call are not captured"
)


class Place(NamedTuple):
    """Where in the program something is called."""

    code: CodeType
    instruction: int
    line: int

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} {self.code.co_name}"


class Stretches:
    """Turns `mode` on and off on the thread that captures, while the capture of `context` is on."""

    def __init__(self, mode: ModeSwitch, context: Context) -> None:
        self._mode = mode
        self._context = context
        self._thread = get_ident()
        self._held: Place | None = None
        """Where the frame was called for which the mode was turned off, until a graph runs or the frame is given up."""
        self._next = False
        """Dynamo has looked at another frame since, which that compiled frame, or what follows it, has called."""
        self._in_graph = False

    def on_this_thread(self) -> None:
        """The thread that calls is the one that captures."""
        self._thread = get_ident()

    def module_begins(self) -> Callable[[], None] | None:
        """To be called by a hook when a module call begins, so that its functions are seen where dynamo leaves them to
        Python. What it returns is to be called at its end; None: nothing is."""
        mode = self._mode
        if frame_callback() is None and self._held is None and mode.on and on_stack(mode.mode):
            return None  # no compiled code is near
        if get_ident() != self._thread or self._in_graph or self._left_to_the_program():
            return None
        callback = replace_frame_callback(None)  # nothing that we do here is dynamo's business
        inside: Any = callback
        end: Callable[[], None] | None = None
        self._mode.learn()
        self._let_go()
        before = self._mode.on
        if callback is None:
            end = None if before else partial(self._end, None, None, before)
        elif self._is_ours(callback):
            end = partial(self._end, callback, callback, True)  # what calls the module runs eagerly under our eyes
        elif callback is not False:
            inside = FrameCallback(callback, self._look, self._given_up)
            end = partial(self._end, inside, callback, before)
        if end is not None:
            self._switch(True)
        replace_frame_callback(inside)
        return end

    def _end(self, inside: Any, outside: Any, on: bool) -> None:
        """The end of a module call that the callback `inside` was there for, in a place where `outside` was."""
        callback = replace_frame_callback(None)
        self._mode.learn()
        if self._held is not None and self._held.code.co_filename != MODULE_CALL:
            self._let_go()  # else all that ran is the module's forward, which is compiled
        self._switch(on)
        replace_frame_callback(outside if callback is inside else callback)

    @contextmanager
    def graph(self) -> Iterator[None]:
        """A context in which a compiled graph runs."""
        if get_ident() != self._thread:
            with self._mode.unseen_on_this_thread():
                yield
            return
        outer, self._in_graph = self._in_graph, True
        try:
            with self._mode.passive():
                yield
        finally:
            self._in_graph = outer
            self._mode.learn()
            if self._held is not None and not self._left_to_the_program():
                self._switch(True)

    def _is_ours(self, callback: Any) -> bool:
        return isinstance(callback, FrameCallback) and callback.look == self._look

    def _switch(self, on: bool) -> None:
        self._held = None
        if on and self._context.on:
            self._mode.turn_on()
        elif self._mode.on:
            self._mode.turn_off()

    def _look(self) -> None:
        caller = here(2)
        place = Place(caller.f_code, caller.f_lasti, caller.f_lineno)
        if self._mode.on:
            self._held, self._next = place, False
            self._mode.turn_off()
        elif self._held is not None:
            self._next = self._next or place != self._held  # one look may ask twice

    def _left_to_the_program(self) -> bool:
        """Whether the stack of modes is not to be touched inside a compiled module."""
        if self._mode.on or not others_on_stack(self._mode.mode):
            return False
        self._miss("functions that run eagerly in a compiled module", OWN_MODE)
        return True

    def _miss(self, site: str, reason: str) -> None:
        holes, hole = self._context.recorder.holes, Hole(site, reason)
        if self._context.on and hole not in holes:
            holes.append(hole)

    def _let_go(self) -> None:
        """The mode is not off for a frame any more. If it still is, what came after that frame was missed."""
        if self._held is not None:
            self._miss(str(self._held), NO_GRAPH)
            self._held = None

    def _given_up(self, result: Any) -> None:
        if self._held is not None and not self._next and not runs_what_fits(result):
            self._switch(True)
