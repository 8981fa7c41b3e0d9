"""The captures that are open in this process: the package's one piece of global state."""

from __future__ import annotations

import atexit
from typing import Protocol, TypeVar


class Session(Protocol):
    """A capture that has something to bring to disk."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


Kind = TypeVar("Kind", bound=Session)

_open: list[Session] = []
"""Kept alive to the end: what a debugger that went out of scope has captured is still to be written."""
_begun: dict[str, int] = {}


def register(session: Session, dump_path: str) -> int:
    """Keep `session` for flush() and the exit; the answer counts the sessions begun before on that dump_path."""
    if not _open and not _begun:
        atexit.register(_close_all)
    _open.append(session)
    nth = _begun.get(dump_path, 0)
    _begun[dump_path] = nth + 1
    return nth


def opened(kind: type[Kind]) -> list[Kind]:
    """The sessions of that kind, the one that was opened last first."""
    return [session for session in reversed(_open) if isinstance(session, kind)]


def flush() -> None:
    """Return when everything captured so far, of finished and unfinished steps, is on disk."""
    for session in list(_open):
        session.flush()


def _close_all() -> None:
    for session in list(_open):
        session.close()
