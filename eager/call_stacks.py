"""Call stacks of captured calls, walked once a call and kept once a stack."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from pathlib import Path
from types import CodeType, FrameType

import torch

from msprobe_graph.dump.records import StackFrame
from msprobe_graph.taps.likeness import extension

OURS = (str(Path(sys.modules["msprobe_graph"].__file__ or "").parent), str(Path(__file__).parent))
MODULE_CALL = torch.nn.modules.module.__file__
LEFT_OUT = {MODULE_CALL, torch.overrides.__file__}
"""Frames of ours, of nn.Module.__call__ and of torch's hand-over to modes say nothing about the program."""

Stack = tuple[StackFrame, ...]


class Anchor:
    """A frame whose own stack is known, and which stands still while the call that it made runs."""

    __slots__ = ("frame", "outer", "stack", "walk")

    def __init__(self, frame: FrameType, stack: Stack, walk: Hashable, outer: Stack | None) -> None:
        self.frame: FrameType | None = frame
        """None when the call is over."""
        self.stack = stack
        self.walk = walk
        """What the frames from there up to the outer anchor's are known by."""
        self.outer = outer
        """The outer anchor's stack."""


class CallStacks:
    """Gives equal stacks as one and the same tuple.

    A frame is known by its code object and its instruction, which are cheap to read; line numbers, which are not, are
    read once for each stack. The walk up ends at an `Anchor`, such as the frame that called the running module.
    """

    def __init__(self) -> None:
        compiled = extension()
        self._walk = walk if compiled is None else compiled.stack_key
        self._known: dict[tuple[Hashable, int], Stack] = {}
        self._codes: dict[int, CodeType] = {}
        """Keeps alive the code objects whose ids are in the keys."""

    def anchor(self, frame: FrameType, outer: Anchor | None = None) -> Anchor:
        """An anchor at `frame`, which a frame above `outer` is in the end called by."""
        end = None if outer is None else outer.frame
        walked = self._walk(frame, end)
        if walked is None:  # the outer one is not above us: a callback from elsewhere
            return self.anchor(frame)
        above = () if outer is None else outer.stack
        stack = self._known.get((walked, id(above)))
        if stack is None:
            stack = self._known[walked, id(above)] = self._read(frame, end) + above
        return Anchor(frame, stack, walked, None if outer is None else above)

    def _read(self, frame: FrameType | None, end: FrameType | None) -> Stack:
        frames = []
        while frame is not None and frame is not end:
            self._codes[id(frame.f_code)] = frame.f_code
            path = frame.f_code.co_filename
            if path not in LEFT_OUT and not path.startswith(OURS):
                frames.append(StackFrame(path, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return tuple(frames)


def walk(frame: FrameType | None, end: FrameType | None) -> Hashable | None:
    """What the frames up to but without `end` are known by; None where that is not among them."""
    key = []
    while frame is not None and frame is not end:
        key.append(id(frame.f_code))
        key.append(frame.f_lasti)
        frame = frame.f_back
    return None if frame is None and end is not None else tuple(key)
