"""Modules whose class vLLM has decorated with support_torch_compile, compiled or not.

The decorator gives the class a ``__call__`` of its own. Where the module is compiled, that calls compiled code; where
it is not, it calls forward. Either way it goes past the hooks of that module (those below it run as usual).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether vLLM compiles this module and all that is inside it."""
    return getattr(module, "do_not_compile", True) is False


def compiled_modules(model: nn.Module) -> dict[str, Any]:
    """The compiled modules of `model`, the outermost ones, by qualified name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_compiled(module) and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found[name] = module
    return found


def heed_hooks(model: nn.Module) -> None:
    """Let the decorated modules of `model` run their hooks, compiled or not."""
    module: Any
    for module in model.modules():
        if hasattr(module, "do_not_compile"):
            if getattr(module, "aot_compiled_fn", None) is not None:
                heeding = _heeding(module, functools.partial(module.aot_compiled_fn, module))
                module.aot_compiled_fn = functools.partial(_of_the_module_itself, heeding)
            elif "forward" not in vars(module):
                module.forward = _heeding(module, module.forward)


def _of_the_module_itself(call: Callable[..., Any], _: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def _heeding(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, called as nn.Module calls it: with the hooks around."""

    def heeding(*args: Any, **kwargs: Any) -> Any:
        found = vars(module).get("forward")
        module.forward = forward
        try:
            return nn.Module.__call__(module, *args, **kwargs)
        finally:
            if found is None:
                del module.forward
            else:
                module.forward = found

    return heeding
