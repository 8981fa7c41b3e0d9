"""Private PyTorch that eager capture needs, in one place. Tested with torch 2.13."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_NOTHING_TO_HIDE_FROM: AbstractContextManager[None] = nullcontext()


def unseen() -> AbstractContextManager[None]:
    """A context inside which no function mode, the program's own neither, sees what taps do on this thread."""
    if torch._C._len_torch_function_stack():
        return torch._C.DisableTorchFunction()
    return _NOTHING_TO_HIDE_FROM


def compiler_at_work() -> bool:
    """Whether what runs on this thread now is a compilation, not the program."""
    return getattr(torch._guards._TLS, "tracing_context", None) is not None


def top_mode(kind: TorchFunctionMode | TorchDispatchMode) -> object | None:
    """The mode on top of this thread's stack of modes of that kind."""
    if isinstance(kind, TorchFunctionMode):
        return cast(object | None, _get_current_function_mode())  # type: ignore[no-untyped-call]
    return _get_current_dispatch_mode()


def compiled_inside(module: torch.nn.Module) -> torch.nn.Module | None:
    """The module that a torch.compile wrapper (`torch.compile(module)`) holds; None when `module` is no such
    wrapper."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # not imported: then nothing was compiled either
    if eval_frame is None or not isinstance(module, eval_frame.OptimizedModule):
        return None
    inside: torch.nn.Module = module._orig_mod
    return inside


def compiled_call(module: torch.nn.Module) -> Any | None:
    """What `module.compile()` left in place of the module's call; None when it was not compiled in place."""
    return getattr(module, "_compiled_call_impl", None)


def replace_compiled_call(module: torch.nn.Module, call: Any) -> None:
    module._compiled_call_impl = call


def sequence_number() -> int:
    """The number that the next autograd node of this thread will bear; later nodes bear larger ones."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def leave_to_python(*modules: str) -> None:
    """Keep dynamo from compiling the functions of these modules and packages, when it meets them as frames."""
    from torch._dynamo import trace_rules

    for module in modules:
        trace_rules.add(module)


def around_compilations(begin: Callable[[], None], end: Callable[[], None]) -> None:
    """From now on, call `begin` before dynamo traces the first of the frames that it compiles in one go, and `end` when
    it is done with them, in whatever way. Asked for again, it is done once."""
    from torch._dynamo.callback import callback_handler

    if all(known.__wrapped__ != begin for known in callback_handler.start_callbacks if hasattr(known, "__wrapped__")):
        callback_handler.register_start_callback(_without_arguments(begin))
        callback_handler.register_end_callback(_without_arguments(end))


def _without_arguments(call: Callable[[], None]) -> Callable[[object], None]:
    @wraps(call)
    def ignoring(_: object) -> None:
        call()

    return ignoring
