"""Private PyTorch that eager capture needs, in one place. Tested with torch 2.13."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
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


def on_stack(mode: object) -> bool:
    """Whether `mode` is on this thread's stack of function modes."""
    height = torch._C._len_torch_function_stack()
    at = torch._C._get_function_stack_at
    return height > 0 and (at(height - 1) is mode or any(at(each) is mode for each in range(height)))


def others_on_stack(mode: object) -> bool:
    """Whether there are function modes on this thread's stack beside `mode`, default devices left out."""
    stack = (torch._C._get_function_stack_at(at) for at in range(torch._C._len_torch_function_stack()))
    return any(each is not mode and not isinstance(each, DeviceContext) for each in stack)


def put_on_stack(mode: TorchFunctionMode | TorchDispatchMode) -> None:
    """A function mode goes below those of the program, which can leave it only from the top; default devices insist on
    the bottom."""
    if isinstance(mode, TorchDispatchMode):
        mode.__enter__()  # type: ignore[no-untyped-call]
        return
    height = torch._C._len_torch_function_stack()
    default_device = height and isinstance(torch._C._get_function_stack_at(0), DeviceContext)
    above = [torch._C._pop_torch_function_stack() for _ in range(height - bool(default_device))]
    for each in (mode, *reversed(above)):
        torch._C._push_on_torch_function_stack(each)


def take_off_stack(mode: TorchFunctionMode | TorchDispatchMode) -> bool:
    """Whether that was possible: a dispatch mode must be on top, and a mode is not there while it handles a call."""
    if isinstance(mode, TorchDispatchMode):
        if _get_current_dispatch_mode() is not mode:
            return False
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return True
    if not on_stack(mode):
        return False
    above = []
    while (top := torch._C._pop_torch_function_stack()) is not mode:
        above.append(top)
    for each in reversed(above):
        torch._C._push_on_torch_function_stack(each)
    return True


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


def kwargs_of_call() -> dict[str, Any]:
    """What the module call that is running the hook that asks was given by name: a variable of torch's."""
    given: dict[str, Any] = sys._getframe(2).f_locals["kwargs"]
    return given


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

    for known in callback_handler.start_callbacks:
        if getattr(known, "__wrapped__", None) == begin:
            return
    callback_handler.register_start_callback(_without_arguments(begin))
    callback_handler.register_end_callback(_without_arguments(end))


def replace_frame_callback(callback: Any) -> Any:
    """Set what dynamo asks on this thread about each Python frame that begins; what it was before is returned. None: it
    is off; False: it runs code that it has compiled before, and compiles none."""
    return torch._C._dynamo.eval_frame.set_eval_frame(callback)


def frame_callback() -> Any:
    """What dynamo asks on this thread: see `replace_frame_callback`."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback()


class FrameCallback:
    """Takes the place of dynamo's `callback` on a thread, and does the same.

    Dynamo compiles and finds the same code under it: code belongs to a backend, and for that dynamo asks a callback
    which one it wraps. It asks before it looks for code that fits a frame: then `look` is called. `given_up` is called
    with the answer when dynamo has not compiled a frame, which will now run as it is.
    """

    def __init__(self, callback: Any, look: Callable[[], None], given_up: Callable[[Any], None]) -> None:
        self.callback = callback
        self.look = look
        self._given_up = given_up
        _skip(vars(type(self))["_torchdynamo_orig_backend"].fget, with_what_it_calls=True)
        _skip(_around_graphs(), with_what_it_calls=False)

    @property
    def _torchdynamo_orig_backend(self) -> Any:
        self.look()
        return self.callback

    def __call__(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        result = self.callback(frame, cache_entry, frame_state)
        if result.guarded_code is None:
            self._given_up(result)
        return result


def leave_frames_to_python(function: Any) -> None:
    """Have dynamo compile no frame of `function` on its own. What it inlines, and what the function calls, it compiles
    as ever."""
    _skip(function, with_what_it_calls=False)


def leave_calls_to_python(function: Any) -> None:
    """Have dynamo compile no frame of `function`, nor of anything that it calls."""
    _skip(function, with_what_it_calls=True)


def _skip(function: Any, with_what_it_calls: bool) -> None:
    """Have dynamo not even ask about frames of `function`, and of what it calls."""
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    calls = _FrameAction.SKIP if with_what_it_calls else _FrameAction.DEFAULT
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, calls))


@cache
def _around_graphs() -> Any:
    """The function that dynamo puts around each compiled graph; its code is always the same."""
    return torch.compiler.disable(lambda: None)  # type: ignore[no-untyped-call]


def runs_what_fits(result: Any) -> bool:
    """Whether what dynamo's callback has answered is: from now on, run this frame and what it calls by code that was
    compiled before and fits, and as it is where none does."""
    from torch._C._dynamo.eval_frame import _FrameAction

    return bool(result.frame_exec_strategy.recursive_action == _FrameAction.RUN_ONLY)


def _without_arguments(call: Callable[[], None]) -> Callable[[object], None]:
    @wraps(call)
    def ignoring(_: object) -> None:
        call()

    return ignoring


def plainly() -> AbstractContextManager[None]:
    """A context in which a subclass of Tensor has no say in what is asked of its tensors."""
    return torch._C.DisableTorchFunctionSubclass()
