"""Hides module hooks from dynamo, so that they may lie inside compiled regions: a trace finds nothing in them.

What dynamo compiles has no trace of a hook, whether it was put there before or after the compilation, and nothing is
compiled anew when hooks come and go. What runs eagerly inside a compiled region (a call that breaks the graph, a frame
that dynamo gives up on) runs its hooks as ever.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from torch import nn

from ._compat import leave_to_python
from .modules import ModuleTap


def hide_hooks() -> None:
    """Do so, if dynamo is in use."""
    if "torch._dynamo" in sys.modules:
        _hide()


@cache
def _hide() -> None:
    import torch

    @torch.compiler.substitute_in_graph(ModuleTap.enter)  # type: ignore[arg-type]
    def enter(self: ModuleTap, module: nn.Module, args: Any, kwargs: Any) -> None:
        return None

    @torch.compiler.substitute_in_graph(ModuleTap.leave)  # type: ignore[arg-type]
    def leave(self: ModuleTap, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        return None

    # All code of ours that may run at a hook; but not this file, whose two functions dynamo traces.
    package, _, this = __name__.rpartition(".")
    mine = (module.name for module in iter_modules([str(Path(__file__).parent)]) if module.name != this)
    rooms = ("msprobe_graph.config", "msprobe_graph.dump", "msprobe_graph.taps")
    leave_to_python(*rooms, *(f"{package}.{name}" for name in mine))
