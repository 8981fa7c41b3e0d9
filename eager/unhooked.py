"""Keeps module hooks out of what dynamo compiles.

Hooks lie on all modules, inside compiled regions too, where calls that break the graph run eagerly. But dynamo would
trace the hooks that it finds, and guard on them. So it finds none: they are taken away when it begins to compile and
put back when it ends. What it compiles is what it would compile without us, and calls no hook.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from pkgutil import iter_modules

from ._compat import around_compilations, leave_to_python
from .modules import ModuleHooks


def keep_out_of_compilations(hooks: ModuleHooks) -> bool:
    """Do so with `hooks` from now on, if dynamo is in use at all; False if it isn't."""
    if "torch._dynamo" not in sys.modules:
        return False
    _leave_hooks_to_python()
    around_compilations(hooks.take_away, hooks.put_back)
    return True


@cache
def _leave_hooks_to_python() -> None:
    """Where a hook runs in a frame that dynamo has given up on, dynamo looks at each function that it calls."""
    package = __name__.rpartition(".")[0]
    mine = (f"{package}.{module.name}" for module in iter_modules([str(Path(__file__).parent)]))
    leave_to_python("msprobe_graph.config", "msprobe_graph.dump", "msprobe_graph.taps", *mine)
