"""HostQueue, whose host functions are called from threads of Python here: ctypes lets go of the lock for them."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable

import pytest

from msprobe_graph.taps.host_queue import HostFunctions, HostQueue, available, host_functions

pytestmark = pytest.mark.skipif(not available(), reason="msprobe_graph.taps._host_queue is not compiled")


def called(name: str) -> Callable[[int], None]:
    """A host function, as a thread without Python's lock calls it."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(getattr(host_functions(), name))


def push(opened: int) -> None:
    called("push")(opened)


def end(opened: int) -> None:
    called("end")(opened)


class Taken:
    """A source that keeps what it is handed, once `go` is set."""

    def __init__(self, size: int, slow: float = 0.0) -> None:
        self.size = size
        self.values: list[bytes | None] = []
        self.go = threading.Event()
        self.go.set()
        self.ended = threading.Event()
        self._slow = slow

    def take(self, address: int | None) -> None:
        assert self.go.wait(30)
        time.sleep(self._slow)
        assert not self.ended.is_set()
        self.values.append(None if address is None else ctypes.string_at(address, self.size))

    def end(self) -> None:
        self.ended.set()


class Slot:
    """Memory that replays write anew."""

    def __init__(self, queue: HostQueue, taken: Taken) -> None:
        self.memory = ctypes.create_string_buffer(taken.size)
        self.opened = queue.open(taken, ctypes.addressof(self.memory), taken.size)

    def push(self, value: bytes) -> None:
        self.memory.raw = value
        push(self.opened)
        self.memory.raw = b"!" * len(value)


def numbered(thread: int, number: int, size: int) -> bytes:
    return (b"%02d.%06d." % (thread, number)).ljust(size, b"%d" % (number % 10))


def waits(work: Callable[[], None], seconds: float = 0.3) -> threading.Thread | None:
    """The thread that is still at it; None where it was done."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread if thread.is_alive() else None


def waiting_in(work: Callable[[], None]) -> threading.Thread:
    """The thread that waits in it."""
    thread = waits(work)
    assert thread is not None
    return thread


def test_host_functions_have_addresses() -> None:
    assert len(set(host_functions())) == len(HostFunctions._fields)
    assert all(host_functions())


@pytest.mark.parametrize(("room", "each", "spinning"), [(1, 500, 0), (1000, 500, 0), (1 << 30, 500, 0), (1, 50, 1)])
def test_several_threads_back_to_back(room: int, each: int, spinning: int) -> None:
    """Each of them has its values taken whole and in order, whatever the room and even if a thread of Python spins."""
    queue, threads = HostQueue(room), 4
    sources = [Taken(100 + thread, slow=1e-5) for thread in range(threads)]
    spins = threading.Event()

    def spin() -> None:
        while not spins.is_set():
            pass

    def replay(thread: int) -> None:
        slot = Slot(queue, sources[thread])
        for number in range(each):
            slot.push(numbered(thread, number, 100 + thread))
        end(slot.opened)

    workers = [threading.Thread(target=replay, args=(thread,)) for thread in range(threads)]
    spinners = [threading.Thread(target=spin, daemon=True) for _ in range(spinning)]
    for worker in (*workers, *spinners):
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    queue.drain()
    spins.set()
    for thread, source in enumerate(sources):
        assert source.values == [numbered(thread, number, 100 + thread) for number in range(each)]
        assert source.ended.is_set()
    assert queue.sources() == []


def test_a_full_queue_waits_for_room() -> None:
    """The value that is being taken counts until it is done: two of three fit."""
    queue, taken = HostQueue(200), Taken(100)
    slot = Slot(queue, taken)
    taken.go.clear()
    slot.push(b"a" * 100)
    slot.push(b"b" * 100)
    waiting = waiting_in(lambda: slot.push(b"c" * 100))
    taken.go.set()
    waiting.join(30)
    assert not waiting.is_alive()
    queue.drain()
    assert taken.values == [b"a" * 100, b"b" * 100, b"c" * 100]


def test_a_value_larger_than_the_queue_has_it_for_itself() -> None:
    queue, taken = HostQueue(10), Taken(1000)
    slot = Slot(queue, taken)
    taken.go.clear()
    slot.push(b"a" * 1000)
    waiting = waiting_in(lambda: slot.push(b"b" * 1000))
    taken.go.set()
    waiting.join(30)
    queue.drain()
    assert [value and value[:1] for value in taken.values] == [b"a", b"b"]


def test_patience_ends() -> None:
    """A thread that keeps Python's lock can't keep the stream from going on."""
    queue, taken = HostQueue(10, patience=0.2), Taken(10)
    slot = Slot(queue, taken)

    def replay() -> None:
        for number in range(3):
            slot.push(b"%010d" % number)

    with_the_lock = ctypes.PyDLL(None).usleep
    worker = threading.Thread(target=replay)
    worker.start()
    with_the_lock(1_500_000)
    worker.join(30)
    assert not worker.is_alive()
    queue.drain()
    assert taken.values == [b"%010d" % number for number in range(3)]


def test_widening_frees_who_waits() -> None:
    queue, taken = HostQueue(10), Taken(10)
    slot = Slot(queue, taken)
    taken.go.clear()
    slot.push(b"a" * 10)
    waiting = waiting_in(lambda: slot.push(b"b" * 10))
    queue.widen()
    waiting.join(30)
    assert not waiting.is_alive()
    assert waits(lambda: slot.push(b"c" * 10)) is None
    taken.go.set()
    queue.drain()
    assert taken.values == [b"a" * 10, b"b" * 10, b"c" * 10]


def test_a_source_ends_behind_its_values() -> None:
    queue, taken = HostQueue(), Taken(10)
    slot = Slot(queue, taken)
    taken.go.clear()
    for number in range(5):
        slot.push(b"%010d" % number)
    end(slot.opened)
    del slot
    assert queue.sources() == [taken]
    taken.go.set()
    queue.drain()
    assert taken.ended.is_set()
    assert len(taken.values) == 5


def test_empty_values_are_values() -> None:
    queue, taken = HostQueue(), Taken(0)
    opened = queue.open(taken, None, 0)
    for _ in range(3):
        push(opened)
    queue.drain()
    assert taken.values == [b""] * 3


def test_no_memory() -> None:
    queue, taken = HostQueue(1 << 62), Taken(1 << 60)
    opened = queue.open(taken, None, 1 << 60)
    push(opened)
    queue.drain()
    assert taken.values == [None]


def test_draining_what_was_never_used() -> None:
    HostQueue().drain()
    HostQueue().widen()


def test_in_a_forked_process() -> None:
    """It has no use of its parent's sources, and a queue of its own, whatever the parent's was doing."""
    queue, taken = HostQueue(10), Taken(10)
    slot = Slot(queue, taken)
    taken.go.clear()
    slot.push(b"a" * 10)
    waiting = waiting_in(lambda: slot.push(b"b" * 10))
    child = os.fork()
    if child == 0:
        queue.restart()
        queue.drain()
        own = Taken(10)
        Slot(queue, own).push(b"c" * 10)
        queue.drain()
        queue.widen()
        os._exit(0 if own.values == [b"c" * 10] and queue.sources() == [own] else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == (child, 0)
    taken.go.set()
    waiting.join(30)
    queue.drain()
    assert taken.values == [b"a" * 10, b"b" * 10]
