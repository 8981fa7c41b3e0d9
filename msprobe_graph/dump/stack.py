"""stack.json: entries grouped by the call stack they came from."""

from __future__ import annotations

import linecache
from collections.abc import Iterable

from .encode import tree
from .records import Entry, StackFrame


class Stacks:
    """Encodes the stacks of one step after the other; those that equal the last step's are not encoded again."""

    def __init__(self) -> None:
        self._groups: list[tuple[list[str], tuple[StackFrame, ...]]] | None = None
        """Of the last step: entry names, and the stack that they came from."""
        self._text = b""

    def encode(self, entries: Iterable[Entry]) -> bytes:
        """``{"0": [[entry names...], [frames...]], ...}``, innermost frame first; entries without a stack are left out.

        A frame reads ``File /path/x.py, line 22, in forward, \\n y = self.linear(x)``.
        """
        groups: dict[int, tuple[list[str], tuple[StackFrame, ...]]] = {}
        for entry in entries:
            if entry.stack is not None:  # by identity: a capture shares one tuple between entries of one stack
                groups.setdefault(id(entry.stack), ([], entry.stack))[0].append(entry.name)
        found = list(groups.values())
        if found != self._groups:
            lines = ((names, [_line(frame) for frame in stack]) for names, stack in found)
            self._text = tree({str(number): group for number, group in enumerate(lines)})
            self._groups = found
        return self._text


def _line(frame: StackFrame) -> str:
    source = linecache.getline(frame.path, frame.line).strip()
    return f"File {frame.path}, line {frame.line}, in {frame.function}, \n {source}"
