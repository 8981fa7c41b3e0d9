"""Call stacks of captured calls, walked once a call and kept once a stack."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch

from msprobe_graph.dump.records import StackFrame

OURS = (str(Path(sys.modules["msprobe_graph"].__file__ or "").parent), str(Path(__file__).parent))
MODULE_CALL = torch.nn.modules.module.__file__
LEFT_OUT = {MODULE_CALL, torch.overrides.__file__}
"""Frames of ours, of nn.Module.__call__ and of torch's hand-over to modes say nothing about the program."""

Stack = tuple[StackFrame, ...]


class Anchor(NamedTuple):
    """A frame whose own stack is known, and which stands still while the call that it made runs."""

    frame: FrameType
    stack: Stack


class CallStacks:
    """Gives equal stacks as one and the same tuple.

    A frame is known by its code object and its instruction, which are cheap to read; line numbers, which are not, are
    read once for each stack. The walk up ends at an `Anchor`, such as the frame that called the running module.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Stack] = {}
        self._codes: set[CodeType] = set()
        """Keeps alive the code objects whose ids are in the keys."""

    def of(self, frame: FrameType | None, anchor: Anchor | None = None) -> Stack:
        """The stack that ends in `frame`, innermost frame first."""
        key = [0 if anchor is None else id(anchor.stack)]
        end = None if anchor is None else anchor.frame
        at = frame
        while at is not None and at is not end:
            key.append(id(at.f_code))
            key.append(at.f_lasti)
            at = at.f_back
        if at is None and anchor is not None:  # the anchor is not above us: a callback from elsewhere
            return self.of(frame)
        known = self._known.get(tuple(key))
        if known is None:
            known = self._known[tuple(key)] = self._read(frame, end) + (anchor.stack if anchor else ())
        return known

    def _read(self, frame: FrameType | None, end: FrameType | None) -> Stack:
        frames = []
        while frame is not None and frame is not end:
            self._codes.add(frame.f_code)
            path = frame.f_code.co_filename
            if path not in LEFT_OUT and not path.startswith(OURS):
                frames.append(StackFrame(path, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return tuple(frames)


def caller_of_module(frame: FrameType | None) -> FrameType | None:
    """The frame that called the module in whose hook `frame` is."""
    while frame is not None and frame.f_code.co_filename == MODULE_CALL:
        frame = frame.f_back
    return frame
