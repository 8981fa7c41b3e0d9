"""The rows that calls like earlier ones have on a GPU: pattern.cpp launches the kernel that measures them itself.

A launch by Triton's own means takes ten times as long as one by the driver's function. So the kernel is compiled by
Triton once for each way in which tensors lie in memory, and launched by its handle from then on.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import triton_kernels as kernels
from .arrival import WORDS
from .triton_rows import KINDS, WARPS, layout, meaning, parts

if TYPE_CHECKING:
    from .likeness import Table
    from .row_memory import RowMemory

PARAMETERS = 14
"""Of `measure_one`, without `meaning`."""


class Launch(NamedTuple):
    """How one tensor is measured; pattern.cpp has the same order."""

    device: int
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


class Handle(NamedTuple):
    """A compiled kernel, as the driver knows it."""

    function: int
    shared: int
    threads: int
    nulls: int


def launch_of(tensor: torch.Tensor) -> Launch | None:
    """How tensors that lie on a GPU like this one are measured; None where only Triton can launch what does it."""
    kind = KINDS.get(tensor.dtype)
    if kind is None or not tensor.numel() or tensor.is_neg() or not _set_up():
        return None
    lies = layout(tensor)
    if lies is None:
        return None
    alignment = 16 if tensor.data_ptr() % 16 == 0 else tensor.itemsize
    handle = _compiled(tensor.device, tensor.dtype, lies.strided, alignment == 16)
    if handle is None:
        return None
    address = meaning(tensor.dtype, tensor.device).data_ptr() if kind.bytes else 0
    return Launch(tensor.device.index, *handle, address, *parts(tensor.numel(), kind.block), alignment, lies[1:])


@functools.cache
def _compiled(device: torch.device, dtype: torch.dtype, strided: int, aligned: bool) -> Handle | None:
    kind = KINDS[dtype]
    sample = torch.empty(64, dtype=kind.view or dtype, device=device)[0 if aligned else 1 :]
    table = meaning(dtype, device) if kind.bytes else None
    rows = torch.empty((1, 8), dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        compiled = kernels.measure_one.warmup(
            sample, table, rows, *(0,) * (PARAMETERS - 2), STRIDED=strided, **kind.constants, num_warps=WARPS,
            grid=(1,),
        )  # fmt: skip
        return _handle(compiled, PARAMETERS + (table is not None))


def _handle(compiled: Any, parameters: int) -> Handle | None:
    """None where the kernel's parameters are not the given number and null pointers behind them."""
    compiled._init_handles()
    head = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
    nulls = head.count(".param") - parameters
    if nulls not in (0, 1, 2) or compiled.metadata.num_ctas != 1:
        return None
    return Handle(compiled.function, compiled.metadata.shared, compiled.metadata.num_warps * 32, nulls)


@functools.cache
def _set_up() -> bool:
    from .likeness import extension

    compiled = extension()
    try:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    except (OSError, AttributeError):
        return False
    if compiled is None:
        return False
    compiled.set_up_gpu(
        ctypes.cast(launch, ctypes.c_void_p).value or 0,
        torch._C._cuda_getCurrentRawStream,
        torch._C._cuda_getDevice,
        torch._C._cuda_isCurrentStreamCapturing,
    )
    return True


class LaunchedRows:
    """One step's rows of that kind, of the device and the stream that are current when it is made."""

    def __init__(self, table: Table, memory: RowMemory) -> None:
        self._stream = torch.cuda.current_stream()
        self._table = table
        self._memory = memory
        self._chunk = memory.take(1, self._stream)
        self._arrival: tuple[torch.Tensor, torch.Event] | None = None
        device = self._stream.device
        table.attach(device.index, self._stream.cuda_stream, self._chunk.data_ptr(), len(self._chunk))

    def seal(self, finished: bool) -> None:
        """Have what was measured brought to the host, without waiting for it. When it is `finished` nothing is added
        any more."""
        headers = self._table.headers()
        with torch.cuda.stream(self._stream):
            if headers:
                self._arrival = self._bring(headers)
            if finished:
                self._memory.give_back(self._chunk, self._table.used(), self._stream)

    def _bring(self, headers: bytes) -> tuple[torch.Tensor, torch.Event]:
        device = self._stream.device
        where = self._memory.headers(headers, device)
        out = torch.empty((len(where), WORDS), dtype=torch.int64, device=device)
        kernels.finish[(len(where),)](self._chunk, where, out, None, num_warps=2)
        host = torch.empty(out.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        host.copy_(out, non_blocking=True)
        event = torch.Event(device)
        event.record()
        return host, event

    def words(self) -> bytes:
        """The rows, WORDS int64s each, in the order in which they were measured. Waits for the GPU."""
        if self._arrival is None:
            return b""
        host, event = self._arrival
        event.synchronize()
        return ctypes.string_at(host.data_ptr(), host.nbytes)
