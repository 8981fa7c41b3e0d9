"""Values that graphs hand to the host when they are replayed, brought to Python: host_queue.cpp's queue, and the thread
that empties it.

A host function runs on a thread of the driver's, while its stream waits. It may call nothing of the device's, and must
not wait for Python's lock either: a thread that holds it may be waiting for that stream. So it is plain C, which only
copies the value into the queue. The thread that takes the values out must not wait for a device for the same reason.

The compiled code is optional: see `available`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msprobe_graph.dump.tensor_files import QUEUED_BYTES
from msprobe_graph.extension import shared_library

PATIENCE = 10.0
"""Seconds that a host function waits for room at most. Code of others may hold Python's lock while it waits for the
device: then nothing is taken until the stream goes on, even beyond the room there is."""


class Source(Protocol):
    """Where values come from: a place in a graph. Both are called in the queue's thread and must not wait for a
    device, nor raise."""

    def take(self, address: int | None) -> None:
        """The next value is at `address` until this returns; None where there was no memory for it."""

    def end(self) -> None:
        """No more values come, because the graph is no more."""


class HostFunctions(NamedTuple):
    """Addresses of plain C functions that take one argument, what `HostQueue.open` gives."""

    push: int
    """Hands over what the slot holds now; waits for room."""
    end: int
    """To be called once, after the last push."""


class HostQueue:
    """Takes values in the order in which they were pushed. May be used from several threads."""

    def __init__(self, queued_bytes: int = QUEUED_BYTES, patience: float = PATIENCE) -> None:
        """Values that are not taken yet have `queued_bytes`; then pushing waits, for `patience` seconds at most. A
        larger value has the queue for itself."""
        self._limit = queued_bytes
        self._patience = patience
        self.restart()

    def restart(self) -> None:
        """To be called in a forked process: it has neither thread nor graphs, and may have locks that no one opens."""
        self._lock = threading.Lock()
        self._sources: dict[int, Source] = {}
        self._numbers = itertools.count()
        self._queue: int | None = None

    def open(self, source: Source, slot: int | None, size: int) -> int:
        """What `HostFunctions` are to be called with, to hand over the `size` bytes at the address `slot`.

        OSError where there is no compiled code.
        """
        library = _library()
        if library is None:
            raise OSError("there is no compiled _host_queue")
        with self._lock:
            if self._queue is None:
                self._queue = library.msprobe_graph_queue(self._limit, round(self._patience * 1000))
                arguments = (library, self._queue, self._sources)
                threading.Thread(target=_run, args=arguments, name="msprobe_graph host queue", daemon=True).start()
        number = next(self._numbers)
        self._sources[number] = source
        opened: int = library.msprobe_graph_source(self._queue, number, slot, size)
        return opened

    def sources(self) -> list[Source]:
        """Those that have not ended."""
        return list(self._sources.values())

    def drain(self) -> None:
        """Return when all that was pushed before is taken."""
        if self._queue is not None:
            marker = _Marker()
            _function("end")(self.open(marker, None, 0))
            marker.reached.wait()

    def widen(self) -> None:
        """From now on pushing waits for nothing: at the exit, when soon there will be nobody to take."""
        library = _library()
        if library is not None and self._queue is not None:
            library.msprobe_graph_widen(self._queue)


class _Marker:
    """A source without values: its end says that all that came before is taken."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def take(self, address: int | None) -> None:
        pass

    def end(self) -> None:
        self.reached.set()


class _Value(ctypes.Structure):
    """`struct Value` in host_queue.cpp."""

    _fields_ = (
        ("source", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("bytes", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
    )


_OVER = -1
"""As a value's size: its source has ended."""


def _run(library: Any, queue: int, sources: dict[int, Source]) -> None:
    while True:
        value = library.msprobe_graph_take(queue)
        number, size = value.contents.source, value.contents.size
        if size == _OVER:
            sources.pop(number).end()
        else:
            sources[number].take(value.contents.bytes)
        library.msprobe_graph_done(queue, value)


def available() -> bool:
    """Whether there is the code that queues need."""
    return _library() is not None


def host_functions() -> HostFunctions:
    """Where there is the compiled code."""
    addresses = (ctypes.cast(_function(name), ctypes.c_void_p).value for name in HostFunctions._fields)
    return HostFunctions(*(address or 0 for address in addresses))


def _function(name: str) -> Any:
    return getattr(_library(), f"msprobe_graph_{name}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Its functions run without Python's lock, as those of any CDLL."""
    path = shared_library(Path(__file__).parent, "_host_queue")
    if path is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    try:
        library = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("queue", pointer, (size, size)),
            ("source", pointer, (pointer, size, pointer, size)),
            ("push", None, (pointer,)),
            ("end", None, (pointer,)),
            ("take", ctypes.POINTER(_Value), (pointer,)),
            ("done", None, (pointer, ctypes.POINTER(_Value))),
            ("widen", None, (pointer,)),
        ):
            function = getattr(library, f"msprobe_graph_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library
