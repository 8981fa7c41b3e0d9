"""msprobe-graph doctor: what is installed, what works here, what would and why not."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from msprobe_graph.config import ConfigError
from msprobe_graph.version import __version__

from .command import Commands, Outcome

if TYPE_CHECKING:
    import torch

    from .checks import Finding

PACKAGES = {
    "torch": "everything",
    "torch_npu": "Ascend NPUs",
    "triton": "statistics on NVIDIA GPUs by one kernel, and inside CUDA graphs",
    "vllm": "capture of vLLM",
    "vllm-ascend": "capture of vLLM on Ascend: it calls the debugger by itself",
    "sglang": "capture of SGLang: --msprobe-dump-config",
    "mindstudio-probe": "msProbe; where it is installed, msprobe.pytorch is its name",
}
"""What each is there for."""
WORKS = {True: "works", False: "FAILS", None: "-"}


def add_parser(commands: Commands) -> None:
    """Tell the command line of this command."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed and what works here",
        description="Says what is installed, and tries each way of capturing on a small model, on the CPU and on the "
        "accelerator that torch finds. Exit code 1 where one fails.",
    )
    parser.add_argument(
        "--npu", action="store_true", help="only the NPU: a page to send to whoever has none and wants to know"
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> Outcome:
    """The command, with the options of its parser."""
    import torch

    devices = [_npu()] if options.npu else [torch.device("cpu"), *_accelerator()]
    lines = [f"msprobe_graph {__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += tabulate(_installed(), ["package", "version", "for"], "simple").splitlines()
    failed = False
    for device in devices:
        found = list(_findings(device))
        failed |= any(finding.works is False for finding in found)
        lines += ["", *_table(device, found).splitlines()]
    return Outcome(lines, int(failed))


def _npu() -> torch.device:
    """The NPU; ConfigError, one sentence, where there is none."""
    import torch

    why = "torch has no torch.npu"
    try:
        import torch_npu  # noqa: F401, which makes it
    except ImportError as error:
        why = str(error)
    module: Any = getattr(torch, "npu", None)
    if module is None:
        raise ConfigError(f"doctor --npu needs torch_npu, which can't be imported: {why}")
    if not module.is_available():
        raise ConfigError("doctor --npu finds torch_npu, but torch.npu.is_available() says that there is no NPU")
    return torch.device("npu", module.current_device())


def _accelerator() -> list[torch.device]:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return [] if found is None else [torch.device(found.type, torch.accelerator.current_device_index())]


def _findings(device: torch.device) -> Iterator[Finding]:
    from .checks import findings

    with tempfile.TemporaryDirectory() as folder:
        yield from findings(device, Path(folder))


def _installed() -> Iterator[tuple[str, str, str]]:
    from msprobe_graph.taps import native

    for package, use in PACKAGES.items():
        try:
            yield package, importlib.metadata.version(package), use
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed", use
    yield "native statistics", "there" if native.library() else "not built", "statistics on the CPU in one pass"


def _table(device: torch.device, found: list[Finding]) -> str:
    rows = [(finding.way, WORKS[finding.works], finding.remark) for finding in found]
    return tabulate(rows, [f"on {_named(device)}", "", ""], "simple")


def _named(device: torch.device) -> str:
    """``npu:0 (Ascend910B2)``, where the device has a name."""
    import torch

    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(device) if name is None or device.type == "cpu" else f"{device} ({name(device)})"
