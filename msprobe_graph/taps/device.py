"""What differs between devices: waiting, host copies, and graphs that are captured to be replayed.

CUDA and Ascend's NPU have the same interface in torch, ``torch.cuda`` and ``torch.npu``; so has any device that is
registered as PrivateUse1. `of` gives the adapter of a device; nothing else of ours asks which kind it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from msprobe_graph.dump.tensor_files import Host

HostFunction = Callable[[Callable[[], None]], None]
"""Has a function called when the current stream comes to this point, at each replay where that is captured."""


class Device:
    """The host itself: nothing is asynchronous, and nothing captured."""

    captures = False
    """Whether it has graphs that are captured and replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_function: HostFunction | None = _call
        """None where torch has no such thing."""

    def capturing(self) -> bool:
        """Whether what runs now in the current stream only becomes part of a graph."""
        return False

    def synchronize(self) -> None:
        """Wait until all that was begun is done."""

    def to_host(self, tensor: torch.Tensor) -> Host:
        """A contiguous copy that holds nothing but the values of `tensor`, as they are at this point of its stream."""
        with torch.no_grad():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor), _arrived


class Accelerator(Device):
    """A device with streams, whose copies to pinned memory wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._module: Any = torch.get_device_module(device)
        self.captures = hasattr(self._module, "is_current_stream_capturing")
        self.host_function = None  # CUDA takes functions of C alone

    def capturing(self) -> bool:
        return self.captures and bool(self._module.is_current_stream_capturing())

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.device)

    def free_memory(self) -> int | None:
        """Bytes of the device's memory that nothing has taken; None where it doesn't tell."""
        ask = getattr(self._module, "mem_get_info", None)
        return None if ask is None else int(ask(self.device)[0])

    def record(self) -> torch.Event:
        """An event at this point of the current stream."""
        event = torch.Event(self.device)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def to_host(self, tensor: torch.Tensor) -> Host:
        with torch.no_grad():
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
        return copy, self.record().synchronize


class Npu(Accelerator):
    """Ascend's: torch_npu calls functions of Python from a stream, in a thread of its own that has subscribed to it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.host_function = self._launch if hasattr(self._module, "_launch_host_func") else None
        self._subscribed: set[Any] = set()
        self._functions: list[Callable[[Any], None]] = []
        """Kept alive: a graph may call them as long as it lives."""

    def _launch(self, function: Callable[[], None]) -> None:
        stream = self._module.current_stream()
        if stream not in self._subscribed:
            self._subscribed.add(stream)
            self._module._subscribe_report(stream)

        def called(_: Any) -> None:
            function()

        self._functions.append(called)
        self._module._launch_host_func(stream, called, None)


_KINDS: dict[str, type[Device]] = {"cpu": Device, "meta": Device, "npu": Npu}


@functools.cache
def of(device: torch.device) -> Device:
    """The adapter of `device`."""
    return _KINDS.get(device.type, Accelerator)(device)


def _call(function: Callable[[], None]) -> None:
    """On the host itself nothing is waited for."""
    function()


def _arrived() -> None:
    """Values in host memory need no waiting for."""
