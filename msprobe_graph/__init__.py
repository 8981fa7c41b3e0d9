"""Captures what a PyTorch model computes while it runs, so that two runs can be compared.

::

    from msprobe_graph import PrecisionDebugger, seed_all

    seed_all(1234)
    debugger = PrecisionDebugger("config.json")
    with debugger.start(model):
        model(batch)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msprobe_graph.version import __version__

if TYPE_CHECKING:
    from msprobe_graph.debugger.acl_graph_dumper import AclGraphDumper
    from msprobe_graph.debugger.graph_backend import msprobe_backend
    from msprobe_graph.debugger.precision_debugger import PrecisionDebugger
    from msprobe_graph.debugger.save_tensor import acl_save, save_tensor
    from msprobe_graph.debugger.seeds import seed_all
    from msprobe_graph.debugger.sessions import flush
    from msprobe_graph.integrations.msprobe import install_as_msprobe

__all__ = [
    "AclGraphDumper",
    "PrecisionDebugger",
    "__version__",
    "acl_save",
    "flush",
    "install_as_msprobe",
    "msprobe_backend",
    "save_tensor",
    "seed_all",
]

_HOMES = {
    "AclGraphDumper": "debugger.acl_graph_dumper",
    "PrecisionDebugger": "debugger.precision_debugger",
    "acl_save": "debugger.save_tensor",
    "flush": "debugger.sessions",
    "install_as_msprobe": "integrations.msprobe",
    "msprobe_backend": "debugger.graph_backend",
    "save_tensor": "debugger.save_tensor",
    "seed_all": "debugger.seeds",
}


def __getattr__(name: str) -> Any:
    """What users import, loaded when it is first asked for: a vLLM plugin that isn't asked to capture stays small."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
