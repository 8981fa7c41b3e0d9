"""What differs between devices: waiting, host copies, and graphs that are captured to be replayed.

CUDA and Ascend's NPU have the same interface in torch, ``torch.cuda`` and ``torch.npu``; so has any device that is
registered as PrivateUse1. `of` gives the adapter of a device; nothing else of ours asks which kind it is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from msprobe_graph.dump.tensor_files import Host, TensorFiles

from . import cuda_graphs

SaveInGraph = Callable[[torch.Tensor, str, TensorFiles], None]
"""Has the graph that is being captured save a tensor under a path at each replay."""

_captured = itertools.count()


class Device:
    """The host itself: nothing is asynchronous, and nothing captured."""

    captures = False
    """Whether it has graphs that are captured and replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def save_in_graph(self) -> SaveInGraph | None:
        """None where there are no means for it."""
        return None

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


class Cuda(Accelerator):
    """NVIDIA's, whose streams call functions of C alone."""

    @property
    def save_in_graph(self) -> SaveInGraph | None:
        return self._save if cuda_graphs.saves_in_graphs() else None

    def _save(self, x: torch.Tensor, path: str, files: TensorFiles) -> None:
        cuda_graphs.saves.save(x, functools.partial(files.write, path))


class Npu(Accelerator):
    """Ascend's: torch_npu calls functions of Python from a stream, in a thread of its own that has subscribed to it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._subscribed: set[Any] = set()
        self._functions: list[Callable[[Any], None]] = []
        """Kept alive: a graph may call them as long as it lives."""

    @property
    def save_in_graph(self) -> SaveInGraph | None:
        return self._save if self._has_operator() or hasattr(self._module, "_launch_host_func") else None

    def _has_operator(self) -> bool:
        return hasattr(torch.ops.npu, "save_npugraph_tensor")

    def _save(self, x: torch.Tensor, path: str, files: TensorFiles) -> None:
        """torch_npu's own operator is preferred, because no Python runs for it; the files are called as it has it,
        after ``<path>.graph<N>.pt`` for the N-th that was captured. Else the values go into memory of this call's own,
        and from there into the next file of `path`.
        """
        if self._has_operator():
            torch.ops.npu.save_npugraph_tensor(x, save_path=f"{path.removesuffix('.pt')}.graph{next(_captured)}.pt")
            return
        slot = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        with torch.no_grad():
            slot.copy_(x, non_blocking=True)
        self._launch(lambda: files.save(path, slot.nbytes, lambda: of(slot.device).to_host(slot)))

    def _launch(self, function: Callable[[], None]) -> None:
        stream = self._module.current_stream()
        if stream not in self._subscribed:
            self._subscribed.add(stream)
            self._module._subscribe_report(stream)

        def called(_: Any) -> None:
            function()

        self._functions.append(called)
        self._module._launch_host_func(stream, called, None)


_KINDS: dict[str, type[Device]] = {"cpu": Device, "meta": Device, "cuda": Cuda, "npu": Npu}


@functools.cache
def of(device: torch.device) -> Device:
    """The adapter of `device`."""
    return _KINDS.get(device.type, Accelerator)(device)


def _arrived() -> None:
    """Values in host memory need no waiting for."""
