"""The device of host_device.cpp, as torch knows it once `register` was called. For a process of its own: it stays."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("host_device.cpp")
MEMORY = 1 << 26
"""Bytes that the device says it has, all of them free."""


def build(into: Path) -> Path | None:
    """The library, compiled; None without a C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    library = into / "libhost_device.so"
    home = Path(torch.__file__).parent
    include, link = home / "include", home / "lib"
    command = [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{link}", "-ltorch_cpu", "-lc10"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    subprocess.run(command, check=True)
    return library


def register(library: Path, name: str) -> None:
    """Make the device torch's PrivateUse1, and torch.<name> its module, with what such a module has as a rule."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(name)
    module = types.ModuleType(f"torch.{name}")
    for function in (is_available, device_count, current_device, is_initialized, is_current_stream_capturing):
        setattr(module, function.__name__, function)
    vars(module).update(
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        Stream=torch.Stream,
        Event=torch.Event,
        current_stream=torch.accelerator.current_stream,
        stream=lambda stream: nullcontext(),
        device=lambda device: nullcontext(),
        Graph=Graph,
        NPUGraph=Graph,  # as torch.npu has it
        graph=graph,
        graph_pool_handle=lambda: (0, 0),
        empty_cache=lambda: None,
        mem_get_info=lambda device=None: (MEMORY, MEMORY),
        _subscribe_report=lambda stream: None,
        _launch_host_func=launch_host_function,
    )
    torch._register_device_module(name, module)


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def is_initialized() -> bool:
    return True


def is_current_stream_capturing() -> bool:
    with torch._C.DisableTorchFunction():  # torch's own are no operators
        capturing: bool = torch.ops.host_device.capturing()
    return capturing


class Graph:
    """What was captured, to be replayed."""

    def __init__(self) -> None:
        self.number = -1

    @property
    def calls(self) -> int:
        """How many calls of kernels it consists of."""
        number: int = torch.ops.host_device.calls(self.number)
        return number

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():  # which an operator would come to the notice of
            torch.ops.host_device.replay(self.number)


@contextmanager
def graph(captured: Graph, pool: object = None) -> Iterator[None]:
    """What runs inside is only recorded. Each graph has a memory of its own, whatever `pool` it should share."""
    torch.ops.host_device.begin()
    try:
        yield
    finally:
        captured.number = torch.ops.host_device.end()


_functions: list[Any] = []
"""Graphs hold their addresses."""


def launch_host_function(stream: Any, function: Callable[[Any], None], data: Any) -> None:
    """As torch_npu has it: `function(data)`, called by the stream when it comes to this."""
    called = ctypes.CFUNCTYPE(None)(lambda: function(data))
    _functions.append(called)
    torch.ops.host_device.host_function(ctypes.cast(called, ctypes.c_void_p).value)


if "HOST_DEVICE_LIBRARY" in os.environ:  # as a plugin of pytest: before any test is imported
    register(Path(os.environ["HOST_DEVICE_LIBRARY"]), os.environ["HOST_DEVICE"])
