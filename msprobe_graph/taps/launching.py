"""Triton's kernels, launched by the driver's function: in a tenth of the time that Triton's own way takes.

The first launch of a kernel with some kind of arguments is Triton's, which compiles it; those that follow use what it
compiled. Only for kernels whose numbers are int64s for which nothing is specialised, on the current device.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.eval_frame import set_eval_frame

from .likeness import extension


class Kernel(NamedTuple):
    """A compiled kernel, as the driver knows it; pattern.cpp reads it in this order."""

    function: int
    shared: int
    """Bytes of shared memory that it takes."""
    threads: int
    nulls: int
    """How many null pointers follow its own parameters: Triton has added them."""


class Launching:
    """
    >>> launch(finish, count, rows, headers, out, ANEW=False, num_warps=2)      # finish[(count,)](rows, ...)
    """

    def __init__(self) -> None:
        self._kernels: dict[tuple[Any, ...], Kernel | None] = {}
        """By what they are compiled for; None where the driver can't be asked."""

    def __call__(self, function: Any, grid: int, *arguments: torch.Tensor | int | None, **constants: Any) -> None:
        """Launch it on the current stream of the current device, where the tensors are."""
        key = self._key(function, arguments, constants)
        kernel = self._kernels.get(key)
        compiled = extension()
        if kernel is not None and compiled is not None:
            stream: int = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
            if compiled.launch(kernel, grid, stream, *_parameters(arguments)):
                return  # else a thread may be new to the device, which Triton sees to
        launched = _by_triton(function, grid, arguments, constants)
        if key not in self._kernels:
            count = sum(argument is not None for argument in arguments)
            self._kernels[key] = _kernel(launched, count) if _set_up() else None

    def kernel(self, function: Any, *arguments: torch.Tensor | int | None, **constants: Any) -> Kernel | None:
        """What such a launch uses; None as long as there was none, and where only Triton can launch it."""
        return self._kernels.get(self._key(function, arguments, constants))

    def _key(
        self, function: Any, arguments: tuple[torch.Tensor | int | None, ...], constants: dict[str, Any]
    ) -> tuple[Any, ...]:
        device: int = torch._C._cuda_getDevice()
        kinds = (
            (argument.dtype, argument.data_ptr() % 16 == 0)
            for argument in arguments
            if isinstance(argument, torch.Tensor)
        )
        return function, device, len(arguments), *kinds, *constants.values()


def _by_triton(function: Any, grid: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Triton's own launch. In a module that is compiled with its hooks dynamo would take Triton's frames for the
    program's, and compile them."""
    before = set_eval_frame(None)
    try:
        return function[(grid,)](*arguments, **constants)
    finally:
        set_eval_frame(before)


def _parameters(arguments: tuple[torch.Tensor | int | None, ...]) -> list[int]:
    given = (argument for argument in arguments if argument is not None)
    return [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in given]


def _kernel(compiled: Any, parameters: int) -> Kernel | None:
    """None where the kernel's parameters are not the given number and, behind them, at most two pointers of Triton's to
    memory that it doesn't use."""
    head = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
    nulls = head.count(".param") - parameters
    metadata = compiled.metadata
    scratch = getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0)
    if nulls not in (0, 1, 2) or scratch or metadata.num_ctas != 1:
        return None
    return Kernel(compiled.function, metadata.shared, metadata.num_warps * 32, nulls)


@functools.cache
def _set_up() -> bool:
    """Whether the driver can be asked."""
    compiled = extension()
    try:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    except (OSError, AttributeError):
        return False
    if compiled is None:
        return False
    compiled.set_up_gpu(
        ctypes.cast(launch, ctypes.c_void_p).value or 0,
        torch._C._cuda_getDevice,
        torch._C._cuda_isCurrentStreamCapturing,
    )
    return True


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is the current one; nothing where it is, which costs a tenth."""
    return _NOTHING if torch._C._cuda_getDevice() == device.index else torch.cuda.device(device)


def current_stream(index: int) -> torch.cuda.Stream:
    """torch's own function makes an object each time, which takes longer than a launch."""
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    if (index, handle) not in _streams:
        _streams[index, handle] = torch.cuda.current_stream(index)
    return _streams[index, handle]


def on_stream(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """The same of a stream and its device."""
    index = stream.device.index
    if torch._C._cuda_getDevice() == index and torch._C._cuda_getCurrentRawStream(index) == stream.cuda_stream:
        return _NOTHING
    return torch.cuda.stream(stream)


_NOTHING = nullcontext()
_streams: dict[tuple[int, int], torch.cuda.Stream] = {}
launch = Launching()
"""This process's: kernels are loaded once."""
