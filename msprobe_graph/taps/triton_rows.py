"""Rows on a GPU: where the kernels put what they measure, and how it comes to the host."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from . import triton_kernels as kernels
from .arrival import WORDS
from .launching import launch
from .native import BYTE_DTYPES
from .row_memory import RowMemory
from .statistics import ROW
from .triton_finish import finish

MOST_PARTS = 528
"""Of one value: four programs for each multiprocessor of an H200, as many as it has registers for."""
FEW_PARTS = 32
"""As many parts a value has before any is larger than a block: alone, it is then read as fast as can be. More of them
have eight blocks: a program takes a microsecond before it reads anything, and that is to be worth it."""
WARPS = 8
FINISHING_WARPS = 2


class Kind(NamedTuple):
    """How a dtype is read."""

    element: Any
    """What is in memory, in Triton's terms."""
    view: torch.dtype | None
    """The dtype under which Triton takes it, None for its own."""
    kind: int
    sums: Any
    block: int
    """Elements that a program reads at once."""
    tiny: float
    """Where the largest magnitude is below this, squares may leave the range of `sums`."""
    bytes: bool
    """Its values are looked up, by their bytes."""

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {"KIND": self.kind, "SUM": self.sums, "TINY": self.tiny, "BLOCK": self.block, "BYTES": self.bytes}


def _float(element: Any, block: int, view: torch.dtype | None = None, bytes: bool = False) -> Kind:
    return Kind(element, view, kernels.FLOAT.value, tl.float32, block, 2.0**-60, bytes)


def _integer(element: Any, view: torch.dtype | None = None) -> Kind:
    return Kind(element, view, kernels.INTEGER.value, tl.float64, 2048, 0.0, False)


KINDS = {
    torch.float64: Kind(tl.float64, None, kernels.FLOAT.value, tl.float64, 2048, 2.0**-500, False),
    torch.float32: _float(tl.float32, 2048),
    torch.float16: _float(tl.float16, 2048),
    torch.bfloat16: _float(tl.bfloat16, 2048),
    torch.int64: _integer(tl.int64),
    torch.int32: _integer(tl.int32),
    torch.int16: _integer(tl.int16),
    torch.uint64: Kind(tl.uint64, None, kernels.UINT64.value, tl.float64, 2048, 0.0, False),
    torch.uint32: _integer(tl.uint32),
    torch.uint16: _integer(tl.uint16),
    torch.int8: _integer(tl.int8),
    torch.uint8: _integer(tl.uint8),
    torch.bool: _integer(tl.uint8, torch.uint8),
    **{dtype: _float(tl.uint8, 2048, torch.uint8, True) for dtype in BYTE_DTYPES if dtype.is_floating_point},
}


class Layout(NamedTuple):
    """How the elements of a tensor lie in memory."""

    strided: int
    s1: int = 1
    s2: int = 1
    s3: int = 1
    t0: int = 0
    t1: int = 0
    t2: int = 0
    t3: int = 0


DENSE = Layout(kernels.DENSE.value)


def layout(tensor: torch.Tensor) -> Layout | None:
    """None if the tensor has more than four dimensions that can't be taken together."""
    if tensor.is_contiguous():
        return DENSE
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 4:
        return None
    runs = len(sizes) == 2 and sizes[1] % kernels.RUN.value == 0 and strides[1] == 1
    missing = 4 - len(sizes)
    sizes, strides = [1] * missing + sizes, [0] * missing + strides
    if tensor.numel() >= 2**31 - 2**16:  # a block reaches past the end
        strided = kernels.WIDE
    elif runs and strides[2] % kernels.ALIGNED_ROWS.value == 0:
        strided = kernels.ROWS
    else:
        strided = kernels.NARROW
    return Layout(strided.value, *sizes[1:], *strides)


def parts(count: int, block: int) -> tuple[int, int]:
    """Into how many parts `count` elements are cut, and how many elements each has: a multiple of `block`."""
    blocks = -(-count // block)
    most = min(max(blocks // 8, FEW_PARTS), MOST_PARTS)
    each = block * max(1, -(-blocks // most))
    return max(1, -(-count // each)), each


@functools.cache
def meaning(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What the 256 bytes of a one-byte float mean, as float32."""
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float32)
    return values.pin_memory().to(device, non_blocking=True)  # waits for nothing, whenever it is needed first


def measuring(
    tensor: torch.Tensor,
    kind: Kind,
    table: torch.Tensor | None,
    rows: torch.Tensor,
    each: int,
    number_of_parts: int,
    header: int,
    lies: Layout,
) -> tuple[torch.Tensor | int | None, ...]:
    """The arguments of `kernels.measure_one`."""
    if kind.view is not None:
        tensor = tensor.view(kind.view)
    return tensor, table, rows, tensor.numel(), each, number_of_parts, header, 0, *lies[1:]


def compiled_for(tensor: torch.Tensor, kind: Kind, lies: Layout) -> dict[str, Any]:
    """Its constants."""
    return {"STRIDED": lies.strided, "EVEN": tensor.numel() % 16 == 0, **kind.constants, "num_warps": WARPS}


class TritonRows:
    """The rows of one step that one stream of a GPU writes: the one that is current where they are made. Nothing here
    waits for it but `fetch`."""

    def __init__(self, device: torch.device, memory: RowMemory | None = None) -> None:
        self.device = device
        self._stream = torch.cuda.current_stream(device)
        self._memory = memory or RowMemory()
        self._chunks: list[torch.Tensor] = []
        self._used = 0
        """Rows of the last chunk that are taken."""
        self._headers: list[tuple[int, int]] = []
        """Of each value: its chunk, and its header's row there."""
        self._sealed: tuple[torch.Tensor, torch.Event, int] | None = None

    def add(self, tensor: torch.Tensor) -> int:
        """Measure a tensor of this device, of a dtype in KINDS and with at least one element; its number."""
        kind = KINDS[tensor.dtype]
        table = meaning(tensor.dtype, self.device) if kind.bytes else None
        lies = layout(tensor)
        if lies is None:
            tensor, lies = tensor.contiguous(), DENSE
        with torch.cuda.stream(self._stream):  # and with that on its device, whichever is the current one
            self._measure(tensor, table, kind, lies)
        return len(self._headers) - 1

    def _measure(self, tensor: torch.Tensor, table: torch.Tensor | None, kind: Kind, lies: Layout) -> None:
        count = tensor.numel()
        number_of_parts, each = parts(count, kind.block)
        chunk, header = self._take(number_of_parts + 1)
        arguments = measuring(tensor, kind, table, chunk, each, number_of_parts, header, lies)
        launch(kernels.measure_one, number_of_parts, *arguments, **compiled_for(tensor, kind, lies))
        self._headers.append((len(self._chunks) - 1, header))

    def seal(self, finished: bool = False) -> None:
        """Have what was measured so far brought to the host, behind the work that measures it. In any thread. When it
        is `finished` nothing is added any more."""
        count = len(self._headers)
        with torch.cuda.stream(self._stream):
            if count and (self._sealed is None or self._sealed[2] != count):
                self._seal(count)
            if finished:
                for at, chunk in enumerate(self._chunks, 1):
                    used = self._used if at == len(self._chunks) else len(chunk)
                    chunk[:used, 0] = 0
                    self._memory.give_back(chunk, self._stream)
                self._chunks.clear()

    def _seal(self, count: int) -> None:
        out = torch.empty((count, WORDS), dtype=torch.int64, device=self.device)
        headers = torch.tensor([header for _, header in self._headers], dtype=torch.int64, pin_memory=True)
        headers = headers.to(self.device, non_blocking=True)
        begin = 0
        for at, chunk in enumerate(self._chunks):
            end = begin
            while end < count and self._headers[end][0] == at:
                end += 1
            if end > begin:
                arguments = chunk, headers[begin:end], out[begin:end]
                launch(finish, end - begin, *arguments, ANEW=False, num_warps=FINISHING_WARPS)
            begin = end
        host = torch.empty(out.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        host.copy_(out, non_blocking=True)
        event = torch.Event(self.device)
        event.record()
        self._sealed = host, event, count

    def fetch(self) -> list[bytes]:
        """The rows of all values, by number, as `statistics.ROW` has them. Waits for the GPU."""
        self.seal()
        if self._sealed is None:
            return []
        host, event, _ = self._sealed
        event.synchronize()
        words = ctypes.string_at(host.data_ptr(), host.nbytes)
        return [words[at : at + ROW.size] for at in range(0, len(words), 8 * WORDS)]

    def _take(self, rows: int) -> tuple[torch.Tensor, int]:
        if not self._chunks or self._used + rows > len(self._chunks[-1]):
            self._chunks.append(self._memory.take(rows, self._stream))
            self._used = 0
        header, self._used = self._used, self._used + rows
        return self._chunks[-1], header
