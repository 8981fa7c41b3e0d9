"""Handing a graph on to Ascend's compilers: npugraph_ex or, older, torchair in its mode "reduce-overhead".

Both come with torch_npu, run the operators of an aten graph one by one (into an ACL graph that is replayed), and offer
slots for custom passes before and after their own: so every value is in memory, and taps take nothing away. Written to
the sources in torch_npu 2.10; what of it was run where is in docs/ascend.md.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx

from msprobe_graph.config import ConfigError

from .full import FullPass, PinPass
from .handoff import Compiled, Taps, tap_in_front
from .options import GraphOptions

COMPILERS = ("npugraph_ex", "torchair")
"""By preference."""
MODE = "reduce-overhead"
"""torchair's, which makes ACL graphs; its others make GE graphs, in which no operator of ours can run."""
PIN, FULL = "post_grad_custom_pre_pass", "post_grad_custom_post_pass"
"""The slots, in the order in which they are come to."""

GraphPass = Callable[[fx.Graph], None]


def preferred(inputs: Sequence[Any]) -> str | None:
    """The compiler for a graph with these inputs, where they are on an NPU and it is installed; None elsewhere."""
    if not any(isinstance(each, torch.Tensor) and each.device.type == "npu" for each in inputs):
        return None
    return next((name for name in COMPILERS if _found(name) is not None), None)


def compile_with_taps(module: fx.GraphModule, inputs: Sequence[Any], taps: Taps, options: GraphOptions) -> Compiled:
    """See `handoff.hand_on`. The inner options are the compiler's own, and ``compiler_config`` its configuration.

    ConfigError, one sentence, where it is not installed or torch_npu is too old for it.
    """
    compiler = _imported(str(options.inner))
    own = dict(options.inner_options)
    # A copy, which keeps our passes: the backward pass is compiled later.
    config = copy.deepcopy(own.pop("compiler_config", None)) or compiler.CompilerConfig()
    if options.inner == "torchair":
        config.mode = _mode(options.mode)
    backend = compiler.get_npu_backend(compiler_config=config)
    if not all(hasattr(config, slot) for slot in (PIN, FULL)):
        remarks = tap_in_front(module, taps, str(options.inner))
        return Compiled(_compiled(backend, module, inputs, own), remarks)
    theirs = {slot: own.pop(slot, None) or getattr(config, slot).value for slot in (PIN, FULL)}
    passes: dict[str, GraphPass] = {
        PIN: PinPass(taps.wanted, taps.digest, boundary=taps.boundary),
        FULL: FullPass(taps.wanted, taps.digest, boundary=taps.boundary),
    }
    for slot, ours in passes.items():
        setattr(config, slot, _behind(theirs[slot], ours))
    return Compiled(_compiled(backend, module, inputs, own))


def _compiled(
    backend: Callable[..., Any], module: fx.GraphModule, inputs: Sequence[Any], own: dict[str, Any]
) -> Callable[..., Any]:
    compiled: Callable[..., Any] = backend(module, inputs, options=own) if own else backend(module, inputs)
    return compiled


def _behind(theirs: Callable[..., None] | None, ours: GraphPass) -> Callable[..., None]:
    """One pass of these compilers: the user's, and ours on what it leaves."""

    def both(module: fx.GraphModule, inputs: Sequence[Any] | None = None, config: Any = None) -> None:
        if theirs is not None:
            theirs(module, inputs, config)
        ours(module.graph)
        module.recompile()

    return both


def _mode(mode: str | None) -> str:
    if mode not in (None, MODE):
        raise ConfigError(f"backend msprobe: the option mode is {mode!r}; inner torchair captures in {MODE!r} only")
    return MODE


def _found(name: str) -> ModuleType | None:
    """The compiler, imported late: it puts up signal handlers, and it is there only once torch_npu is."""
    try:
        importlib.import_module("torch_npu")
        return importlib.import_module(name)
    except ImportError:
        return None


def _imported(name: str) -> ModuleType:
    found = _found(name)
    if found is None:
        why = "torch_npu is not installed"
        if importlib.util.find_spec("torch_npu") is not None:
            why = f"the torch_npu that is installed has none that can be imported; {name} is in torch_npu from 2.10 on"
        raise ConfigError(f"backend msprobe: the option inner is {name!r}, but {why}")
    return found
