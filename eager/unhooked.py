"""Keeps module hooks out of what dynamo compiles.

Hooks lie on all modules, inside compiled regions too, where calls that break the graph run eagerly. But dynamo would
trace the hooks that it finds, and guard on them. So it finds none: they are taken away when it begins to compile and
put back when it ends. What it compiles is what it would compile without us, and calls no hook.

That a module has hooks is a reason for dynamo, from torch 2.13 on, to compile the forward of a module of torch's own
that eager code calls, which else it leaves to Python. There ours must not be found either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import FunctionType

from torch import nn

from msprobe_graph.dump.boundary import Boundary

from ._compat import around_compilations, leave_calls_to_python, leave_frames_to_python, leave_to_python
from .modules import ModuleHooks

TRACED = "in_trace"
"""The file of this package that dynamo may look into."""
TORCHS_OWN = ("torch.nn.", "torch.ao.")
"""The modules of Python that dynamo takes modules of torch's own from."""


def keep_out_of_compilations(hooks: ModuleHooks) -> None:
    """Do so with `hooks` from now on, if dynamo is in use at all. To be called again when dynamo may have been imported
    or reset since."""
    if "torch._dynamo" in sys.modules:
        _leave_hooks_to_python()
        around_compilations(hooks.take_away, hooks.put_back)


def leave_torch_modules_to_python(modules: Iterable[nn.Module]) -> None:
    """Have dynamo compile no forward of these modules for the hooks that they are about to get: see above. It keeps to
    that for all modules of a class, as it does without us once it has met one without hooks."""
    classes: dict[type[nn.Module], bool] = {}
    for module in modules:
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        classes[type(module)] = classes.get(type(module), False) or hooked
    for cls, hooked in classes.items():
        if not hooked and cls.__module__.startswith(TORCHS_OWN) and isinstance(cls.forward, FunctionType):
            leave_frames_to_python(cls.forward)


@cache
def _leave_hooks_to_python() -> None:
    """Where a hook runs in a frame that dynamo has given up on, dynamo looks at each function that it calls."""
    package = __name__.rpartition(".")[0]
    import_module(f"{package}.{TRACED}")
    files = (module.name for module in iter_modules([str(Path(__file__).parent)]))
    leave_to_python("msprobe_graph.config", "msprobe_graph.dump", "msprobe_graph.taps")
    leave_to_python(*(f"{package}.{name}" for name in files if name != TRACED))
    leave_calls_to_python(Boundary.attempt)  # taps call what isn't ours, too
