"""Tensors that a CUDA graph saves at each of its replays, by the driver's API, which torch doesn't expose.

While a graph is captured it gets a copy into pinned memory of the call's own, a slot, and behind it a host function,
which hands the slot's bytes to a `HostQueue`; from there they go to their file. A graph runs never more than once at a
time, so a replay finds its slots handed over. What a slot and a host function need lives as long as a graph holds them:
a user object of the graph's tells of its end, which CUDA sees to when no replay is under way any more.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize

import torch

from msprobe_graph.dump.tensor_files import QUEUED_BYTES

from .host_queue import HostFunctions, HostQueue, Source, available, host_functions

log = logging.getLogger("msprobe_graph")

Write = Callable[[Callable[[], torch.Tensor]], None]
"""Writes the tensor that it is given a function for; the tensor's memory is only lent until this returns."""


class CudaGraphs:
    """Takes what replays save, and has it written in a thread of its own, which waits for the disk alone.

    Eager saves may be waiting for a stream, in the thread that writes them, and that stream for room in here: so what
    comes from replays is not written behind them.
    """

    def __init__(self, queued_bytes: int = QUEUED_BYTES) -> None:
        """Values that wait to be written may take `queued_bytes`; then the streams of replays wait."""
        self._queue = HostQueue(queued_bytes)
        self.restart()

    def restart(self) -> None:
        """To be called in a forked process, which can't replay its parent's graphs."""
        self._queue.restart()
        self._spare: dict[int, list[int]] = {}
        """Slots of graphs that are no more, by their size. They stay pinned, as torch keeps its pinned memory."""
        self._begun = False

    def save(self, x: torch.Tensor, write: Write) -> None:
        """Have the graph that the current stream of x's device is being captured into call `write` at each replay.

        x: on a CUDA device, dense, of any dtype and strides. What `write` gets is contiguous. Saves of one stream are
        written in the order of the replays and, within one, of the calls. OSError where `saves_in_graphs` is False, and
        for what the driver refuses.
        """
        driver = _driver()
        if driver is None:
            raise OSError("there is no libcuda.so.1 with user objects, of CUDA 11.3 and newer")
        if not self._begun:
            self._begun = True
            # As TensorFiles has it, and before it, which says in the end how many files are missing.
            Finalize(None, self.close, exitpriority=1)
        with torch.cuda.device(x.device), torch.no_grad():
            values = x.resolve_conj().resolve_neg().contiguous()
            stream = torch.cuda.current_stream().cuda_stream
            graph = driver.capturing(stream)
            room = _room(values.nbytes)
            slot = self._slot(driver, room)
            saved = _Saved(self, values, slot, room, write)
            opened = self._queue.open(saved, slot, values.nbytes)
            host = host_functions()
            driver.keep(graph, opened, host)
            if values.nbytes:
                driver.copy(slot, values.data_ptr(), values.nbytes, stream)
            driver.call_host(stream, host.push, opened)

    def _slot(self, driver: Driver, room: int) -> int:
        try:
            return self._spare[room].pop()
        except (KeyError, IndexError):
            return driver.pinned(room)

    def give_back(self, slot: int, room: int) -> None:
        """No graph writes into the slot any more."""
        self._spare.setdefault(room, []).append(slot)

    def flush(self) -> None:
        """Return when the values of all replays launched before are written.

        Waits for the devices that have such graphs, as torch.cuda.synchronize does: not to be called while another
        thread captures. Called from inside a capture it leaves out what the devices have not done yet.
        """
        devices = {source.device for source in self._queue.sources() if isinstance(source, _Saved)}
        if devices and not torch.cuda.is_current_stream_capturing():
            for device in devices:
                try:
                    torch.cuda.synchronize(device)
                except RuntimeError as error:
                    log.error("acl_save: what graphs on %s have not saved yet is lost (%s)", device, error)
        self._queue.drain()

    def close(self) -> None:
        """The end: everything is on disk, and no stream waits for room again."""
        self.flush()
        self._queue.widen()


class _Saved(Source):
    """One call of acl_save in a graph."""

    def __init__(self, graphs: CudaGraphs, values: torch.Tensor, slot: int, room: int, write: Write) -> None:
        self.device = values.device
        self._graphs = graphs
        self._dtype, self._shape, self._size = values.dtype, values.shape, values.nbytes
        self._slot, self._room = slot, room
        self._write = write

    def take(self, address: int | None) -> None:
        self._write(lambda: self._tensor(address))

    def _tensor(self, address: int | None) -> torch.Tensor:
        """Over the bytes at that address."""
        if self._size == 0:
            return torch.empty(self._shape, dtype=self._dtype)
        if address is None:
            raise RuntimeError(f"no memory for {self._size} bytes")
        memory = (ctypes.c_uint8 * self._size).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(self._dtype).view(self._shape)

    def end(self) -> None:
        self._graphs.give_back(self._slot, self._room)


class Driver:
    """The few functions of libcuda that are needed here. Streams, graphs and addresses are numbers."""

    def __init__(self) -> None:
        """OSError without the library, AttributeError where one of the functions is missing."""
        library = ctypes.CDLL("libcuda.so.1")
        self._functions = {}
        for name, arguments in _FUNCTIONS.items():
            self._functions[name] = function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_int, arguments

    def _call(self, name: str, *arguments: object) -> None:
        if code := self._functions[name](*arguments):
            raise OSError(f"{name} returned the CUDA error {code}")

    def capturing(self, stream: int) -> int:
        """The graph that the stream is being captured into."""
        status, graph = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuStreamGetCaptureInfo_v2", stream, ctypes.byref(status), None, ctypes.byref(graph), None, None)
        if status.value != _CAPTURE_STATUS_ACTIVE or graph.value is None:
            raise OSError("the tensor's device is not the one whose graph is being captured")
        return graph.value

    def pinned(self, size: int) -> int:
        """The address of `size` new bytes. While a graph is captured, too: nothing in it depends on this call."""
        address = ctypes.c_void_p()
        with self._relaxed():
            self._call("cuMemHostAlloc", ctypes.byref(address), size, _MEMHOSTALLOC_PORTABLE)
        return address.value or 0

    @contextmanager
    def _relaxed(self) -> Iterator[None]:
        """Whatever mode a capture was begun with, this thread may make calls that are not part of it."""
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def keep(self, graph: int, opened: int, host: HostFunctions) -> None:
        """Have `host.end` called when `graph`, and all that is made of it, is no more; at once where this fails."""
        made = ctypes.c_void_p()
        try:
            self._call("cuUserObjectCreate", ctypes.byref(made), opened, host.end, 1, _USER_OBJECT_NO_DESTRUCTOR_SYNC)
        except OSError:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(host.end)(opened)
            raise
        try:
            self._call("cuGraphRetainUserObject", graph, made, 1, 0)
        finally:
            self._call("cuUserObjectRelease", made, 1)

    def copy(self, to: int, tensor: int, size: int, stream: int) -> None:
        """From a device to pinned memory."""
        self._call("cuMemcpyDtoHAsync_v2", to, tensor, size, stream)

    def call_host(self, stream: int, function: int, argument: int) -> None:
        """A plain C function, when the stream comes to this."""
        self._call("cuLaunchHostFunc", stream, function, argument)


_pointer, _unsigned = ctypes.c_void_p, ctypes.c_uint
_FUNCTIONS: dict[str, tuple[type, ...]] = {
    "cuStreamGetCaptureInfo_v2": (
        *(_pointer, ctypes.POINTER(ctypes.c_int), _pointer, ctypes.POINTER(_pointer), _pointer, _pointer),
    ),
    "cuThreadExchangeStreamCaptureMode": (ctypes.POINTER(ctypes.c_int),),
    "cuMemHostAlloc": (ctypes.POINTER(_pointer), ctypes.c_size_t, _unsigned),
    "cuUserObjectCreate": (ctypes.POINTER(_pointer), _pointer, _pointer, _unsigned, _unsigned),
    "cuUserObjectRelease": (_pointer, _unsigned),
    "cuGraphRetainUserObject": (_pointer, _pointer, _unsigned, _unsigned),
    "cuMemcpyDtoHAsync_v2": (_pointer, ctypes.c_uint64, ctypes.c_size_t, _pointer),
    "cuLaunchHostFunc": (_pointer, _pointer, _pointer),
}
"""As cuda.h declares them, with the types of their arguments; they return 0 or what went wrong."""
_CAPTURE_STATUS_ACTIVE = 1
_CAPTURE_MODE_RELAXED = 2
_MEMHOSTALLOC_PORTABLE = 1
_USER_OBJECT_NO_DESTRUCTOR_SYNC = 1


@functools.cache
def _driver() -> Driver | None:
    try:
        return Driver()
    except (OSError, AttributeError):
        return None


def saves_in_graphs() -> bool:
    """Whether there is what it takes: the driver of NVIDIA's, and the compiled queue."""
    return _driver() is not None and available()


def _room(size: int) -> int:
    """Slots have few sizes, so that one can take another's place."""
    return 1 << max(size - 1, 0).bit_length()


saves = CudaGraphs()
"""This process's."""
os.register_at_fork(after_in_child=saves.restart)
