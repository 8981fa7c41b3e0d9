"""The rows that calls like earlier ones have on a GPU: rows.h launches the kernel that measures them itself."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import triton_kernels as kernels
from .arrival import WORDS
from .launching import current_stream, launch, on_stream
from .triton_rows import KINDS, compiled_for, layout, meaning, measuring, parts

if TYPE_CHECKING:
    from .landing import Landing
    from .likeness import Table
    from .row_memory import RowMemory


class Launch(NamedTuple):
    """How one tensor is measured; likeness.h has the same order."""

    function: int
    """The driver's handle of the compiled kernel."""
    shared: int
    """Bytes of shared memory that it takes."""
    threads: int
    nulls: int
    """How many null pointers follow its own parameters: Triton has added them."""
    meaning: int
    """The address of the table of what bytes mean; 0 of dtypes that need none."""
    parts: int
    each: int
    alignment: int
    """The address of the tensor is a multiple of this."""
    layout: tuple[int, ...]


def launch_of(tensor: torch.Tensor) -> Launch | None:
    """How tensors that lie on a GPU like this one, which was measured just now, are measured; None where only Triton
    can launch what does it."""
    kind, lies = KINDS.get(tensor.dtype), layout(tensor)
    if kind is None or lies is None or not tensor.numel() or tensor.is_neg():
        return None
    table = meaning(tensor.dtype, tensor.device) if kind.bytes else None
    number_of_parts, each = parts(tensor.numel(), kind.block)
    with torch.cuda.device(tensor.device):
        arguments = measuring(tensor, kind, table, _any_rows(tensor.device), each, number_of_parts, 0, lies)
        kernel = launch.kernel(kernels.measure_one, *arguments, **compiled_for(tensor, kind, lies))
    if kernel is None:
        return None
    alignment = 16 if tensor.data_ptr() % 16 == 0 else tensor.itemsize
    address = 0 if table is None else table.data_ptr()
    return Launch(*kernel, address, number_of_parts, each, alignment, lies[1:])


@functools.cache
def _any_rows(device: torch.device) -> torch.Tensor:
    return torch.empty((1, 8), dtype=torch.int64, device=device)


class LaunchedRows:
    """The rows of that kind of one step after the other, on the device and the stream that are current when this is
    made. To have them anew in each step takes longer than to measure."""

    def __init__(self, memory: RowMemory) -> None:
        self._device: int = torch._C._cuda_getDevice()
        self._stream = current_stream(self._device)
        self._memory = memory
        self._chunk: torch.Tensor | None = None
        """None where the next step takes another one."""
        self._place = 0, 0
        """Its address, and how many rows it has."""
        self._open = False
        """A step has begun that was not sealed as finished."""

    def here(self) -> bool:
        """Whether that stream of that device is the current one."""
        device: int = torch._C._cuda_getDevice()
        stream: int = torch._C._cuda_getCurrentRawStream(device)
        return (device, stream) == (self._device, self._stream.cuda_stream)

    def begin(self, table: Table) -> None:
        """A step, whose calls are measured by `table`."""
        if self._chunk is None or self._open:  # the rows of what was dropped begin with zeros no more
            self._chunk = self._memory.take(self._memory.room, self._stream)
            self._place = self._chunk.data_ptr(), len(self._chunk)
        self._open = True
        self._table = table
        self._arriving = LaunchedTable(None, 0)
        table.attach(self._device, self._stream.cuda_stream, *self._place)

    def leave(self) -> None:
        """No step follows."""
        if self._chunk is not None and not self._open:
            self._memory.give_back(self._chunk, self._stream)
        self._chunk = None

    def seal(self, finished: bool) -> None:
        """Have what was measured brought to the host, without waiting for it. When it is `finished` nothing is added
        any more."""
        assert self._chunk is not None
        headers = self._table.headers()
        count = len(headers) // 8
        self._arriving = LaunchedTable(None, count)
        if headers:
            with on_stream(self._stream):
                where = self._memory.headers(headers, self._stream)
                landing = self._memory.landings.bring(self._chunk, where, count, self._stream, finished)
                landing.expect(self._stream)
                self._arriving = LaunchedTable(landing, count)
        if finished:
            self._open = False
            if self._table.ran_out():
                self._memory.make_room()
                self.leave()

    def table(self) -> LaunchedTable:
        """What was sealed last."""
        return self._arriving


class LaunchedTable:
    """Rows of that kind, WORDS int64s each, in the order in which they were measured: a `dump.records.Arriving`."""

    kind = None

    def __init__(self, landing: Landing | None, count: int) -> None:
        """`landing`: None where none were measured, or where it has failed to bring them."""
        self._landing = landing
        self._count = count

    @property
    def address(self) -> int:
        """Waits for the GPU. RuntimeError where rows have not been brought."""
        if self._landing is None:
            if self._count:
                raise RuntimeError(f"{self._count} rows of a GPU were not brought to the host")
            return 0
        self._landing.synchronize()
        return self._landing.address

    def lies_at(self) -> tuple[int, int, int, int] | None:
        """See `dump.records.Arriving`."""
        if self._landing is None:
            return None if self._count else (0, 0, 0, 0)
        event = self._landing.native
        return None if event is None else (self._landing.address, 0, *event)

    def words(self) -> bytes:
        """The same as bytes."""
        return ctypes.string_at(self.address, self._count * WORDS * 8) if self._count else b""
