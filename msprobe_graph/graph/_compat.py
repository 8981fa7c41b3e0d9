"""Private dynamo that graph mode needs, in one place. Tested with torch 2.13."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._dynamo.backends import registry
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import InvalidBackend, TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch._dynamo.symbolic_convert import tls
from torch.autograd.graph import Node
from torch.nn.modules import module


class Retrace(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):
    """Raised by a backend: dynamo forgets what it has traced of this frame and traces it anew.

    Of the restarts that dynamo knows, the second base is the one that it lets a backend ask for, the first the one
    after which it expects nothing to be as it was.
    """

    def __init__(self) -> None:
        super().__init__(restart_reason="msprobe_graph looks at the frame's module calls")


def on_compile_end(callback: Callable[[], None]) -> None:
    """Have `callback` called, from now on, whenever dynamo has ended compiling, in whatever way."""
    callback_handler.register_end_callback(lambda _: callback())


def source(placeholder: fx.Node) -> str:
    """Where an input of dynamo's graph comes from: ``L['self']._modules['fc']._parameters['weight']``."""
    found = getattr(placeholder, "_dynamo_source", None)
    if found is None:
        return str(placeholder.target)
    return str(found.name if isinstance(found.name, str) else found.name())


def example_value(node: fx.Node) -> Any:
    """What dynamo found a node's value to be: a fake tensor, a symbolic number, a tuple of those."""
    value = node.meta.get("example_value")
    if value is None and node.op == "placeholder" and (argument := node.meta.get("grapharg")) is not None:
        return argument.fake_tensor if argument.fake_tensor is not None else argument.example
    return value


def example(placeholder: fx.Node) -> Any:
    """The object that an input of dynamo's graph was when it was traced; None when that can't be told."""
    argument = placeholder.meta.get("grapharg")
    return None if argument is None else argument.example


def memory(tensor: torch.Tensor) -> int | None:
    """Tells a tensor's memory from that of others; None for one that has none of its own: sparse, or inside a
    torch.func transform."""
    if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return int(tensor.untyped_storage()._cdata)


def module_calls() -> list[nn.Module]:
    """The modules whose calls are running on this thread, innermost first."""
    found = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


class Code(NamedTuple):
    """A function, by what its code has in common with the code that dynamo makes of it."""

    file: str
    line: int
    name: str

    @classmethod
    def of(cls, code: CodeType) -> Code:
        return cls(code.co_filename, code.co_firstlineno, code.co_name)


class Traced(NamedTuple):
    """What dynamo is tracing as a frame of its own."""

    code: Code
    module: nn.Module | None
    """The one whose method it is, forward or another; None for a function."""

    @classmethod
    def now(cls) -> Traced | None:
        """On this thread. None: nothing."""
        tracing = getattr(tls, "current_tx", None)
        if tracing is None:
            return None
        variables = tracing.f_locals
        # Around the forward of torch's own containers dynamo has put a function of its own, which gets that method.
        selves = (variables.get("self"), getattr(variables.get("fn"), "__self__", None))
        return cls(Code.of(tracing.f_code), next((each for each in selves if isinstance(each, nn.Module)), None))


def running_frame(code: Code) -> FrameType | None:
    """The frame of the innermost running call of a function on this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and Code.of(frame.f_code) != code:
        frame = frame.f_back
    return frame


def hook_all_modules(begin: Callable[..., None], end: Callable[..., None]) -> Callable[[], None]:
    """Call ``begin(module, args)`` before and ``end(module, args, kwargs, output)`` after every module's forward; what
    is returned takes both away."""
    hooks = [module.register_module_forward_pre_hook(begin), module.register_module_forward_hook(end, with_kwargs=True)]

    def remove() -> None:
        for hook in hooks:
            hook.remove()
            # remove() leaves this entry behind, and every OptimizedModule would warn of hooks that are gone.
            module._global_forward_hooks_with_kwargs.pop(hook.id, None)

    return remove


def registered_backend(name: str) -> Callable[..., Any] | None:
    """The dynamo backend of that name; None if there is none."""
    try:
        return registry.lookup_backend(name)
    except InvalidBackend:
        return None


def compiled_node(output: Any) -> Node | None:
    """The autograd node that runs the backward pass of the compiled graph that returned `output`; None for an output
    that needs no gradient."""
    node = output.grad_fn if isinstance(output, torch.Tensor) else None
    while node is not None and node.name() != "CompiledFunctionBackward":
        # An output that is a view of another one hangs on it by nodes of its own.
        node = next((before for before, _ in node.next_functions if before is not None), None)
    return node
