"""stack.json: entries grouped by the call stack they came from."""

from __future__ import annotations

import linecache
from collections.abc import Iterable

from .records import Entry, Frame


def grouped(entries: Iterable[Entry]) -> dict[str, tuple[list[str], list[str]]]:
    """``{"0": [[entry names...], [frames...]], ...}``, innermost frame first; entries without a stack are left out.

    A frame reads ``File /path/x.py, line 22, in forward, \\n y = self.linear(x)``.
    """
    groups: dict[int, tuple[list[str], tuple[Frame, ...]]] = {}
    for entry in entries:
        if entry.stack is not None:  # by identity: a capture shares one tuple between entries of one stack
            groups.setdefault(id(entry.stack), ([], entry.stack))[0].append(entry.name)
    return {
        str(number): (names, [_line(frame) for frame in stack]) for number, (names, stack) in enumerate(groups.values())
    }


def _line(frame: Frame) -> str:
    source = linecache.getline(frame.path, frame.line).strip()
    return f"File {frame.path}, line {frame.line}, in {frame.function}, \n {source}"
