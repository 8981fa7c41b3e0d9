"""SIGUSR1 as a trigger: it calls what is registered here, and then whatever handled it before."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger("msprobe_graph")


def watch(act: Callable[[], None]) -> Callable[[], None]:
    """Call `act`, which must not wait for anything, whenever SIGUSR1 comes. Returns what ends that.

    Where Python can't, the log says why, and nothing is watched.
    """
    if threading.current_thread() is not threading.main_thread():
        _refuse("capture began on another thread than the main one, where Python sets no handlers")
        return _nothing
    before = signal.getsignal(signal.SIGUSR1)
    if before is None:
        _refuse("it has a handler that was not set from Python")
        return _nothing

    def handle(number: int, frame: FrameType | None) -> None:
        act()
        if callable(before):
            before(number, frame)

    def end() -> None:
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGUSR1) is handle:
            signal.signal(signal.SIGUSR1, before)

    signal.signal(signal.SIGUSR1, handle)
    return end


def _refuse(why: str) -> None:
    log.warning("SIGUSR1 will not have the steps that are kept written: %s", why)


def _nothing() -> None:
    pass
