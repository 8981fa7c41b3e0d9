"""Keeps module hooks out of what dynamo compiles.

Hooks lie on all modules, inside compiled regions too, where calls that break the graph run eagerly. But dynamo would
trace the hooks that it finds, and guard on them. So it finds none: they are taken away when it begins to compile and
put back when it ends. What it compiles is what it would compile without us, and calls no hook.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ._compat import around_compilations, leave_to_python
from .modules import ModuleHooks

TRACED = "in_trace"
"""The file of this package that dynamo may look into."""


def keep_out_of_compilations(hooks: ModuleHooks) -> None:
    """Do so with `hooks` from now on, if dynamo is in use at all. To be called again when dynamo may have been imported
    or reset since."""
    if "torch._dynamo" in sys.modules:
        _leave_hooks_to_python()
        around_compilations(hooks.take_away, hooks.put_back)


@cache
def _leave_hooks_to_python() -> None:
    """Where a hook runs in a frame that dynamo has given up on, dynamo looks at each function that it calls."""
    package = __name__.rpartition(".")[0]
    import_module(f"{package}.{TRACED}")
    files = (module.name for module in iter_modules([str(Path(__file__).parent)]))
    leave_to_python("msprobe_graph.config", "msprobe_graph.dump", "msprobe_graph.taps")
    leave_to_python(*(f"{package}.{name}" for name in files if name != TRACED))
