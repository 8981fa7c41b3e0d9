"""Modules whose class vLLM has decorated with support_torch_compile, compiled or not.

The decorator gives the class a ``__call__`` of its own. Where the module is compiled, that calls compiled code; where
it is not, it calls forward. Either way it goes past the hooks of that module (those below it run as usual).
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether vLLM compiles this module and all that is inside it."""
    return getattr(module, "do_not_compile", True) is False


def eager_parts(model: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """The largest parts of `model` that have no compiled module inside, by qualified name: ``{"": model}`` if none
    has."""
    if not any(map(is_compiled, model.modules())):
        return {path: model}
    parts: dict[str, nn.Module] = {}
    if not is_compiled(model):
        for name, child in model.named_children():
            parts |= eager_parts(child, f"{path}.{name}" if path else name)
    return parts


def heed_hooks(model: nn.Module) -> None:
    """Let the decorated modules of an eager `model` run their hooks."""
    for module in model.modules():
        if getattr(module, "do_not_compile", False) and "forward" not in vars(module):
            _heed_hooks(module)


def _heed_hooks(module: nn.Module) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        del module.forward  # out of the way of nn.Module's call, which runs the hooks around the class's forward
        try:
            return nn.Module.__call__(module, *args, **kwargs)
        finally:
            module.forward = forward

    module.forward = forward
