"""Handing a graph on to the inner backend, with taps at the latest place that this backend offers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import fx

from msprobe_graph.config import ConfigError
from msprobe_graph.dump.boundary import Boundary

from ._compat import registered_backend
from .exact import Report
from .full import FullPass
from .options import GraphOptions
from .plan import node_of
from .stamps import Wanted
from .tap_op import TAP, TAP_STANDING
from .writes import Writes

AT_DYNAMO_LEVEL = (
    "the inner backend {} offers no place behind AOTAutograd, so taps are in the graph that it was given; they can "
    "change what it fuses, saves and recomputes, and with that the results"
)


NO_BACKWARD = "backward passes of this graph are not captured: the inner backend {} has none that taps could lie in"


class Taps(NamedTuple):
    """What to tap in a graph. As it comes from `Taps()`: nothing."""

    wanted: Mapping[int, Wanted] = {}
    """By value id."""
    in_full: Collection[int] = ()
    """Those to tap whatever it takes; the others where the compiled program holds them in memory anyway."""
    digest: str = ""
    """Tells this choice from others in the compiler's caches."""
    boundary: Boundary | None = None
    """Where it ends if something goes wrong with the taps."""


class Compiled(NamedTuple):
    """What an inner backend made of a graph."""

    call: Callable[..., Any]
    remarks: Sequence[str] = ()
    """For the manifest."""
    reports: Sequence[Report] = ()
    """What the taps did to each program that this process has compiled of it; a backward pass comes later."""


@runtime_checkable
class Tappable(Protocol):
    """An inner backend that puts the taps in itself."""

    def compile_with_taps(self, module: fx.GraphModule, inputs: Sequence[Any], taps: Taps) -> Compiled: ...


def hand_on(module: fx.GraphModule, inputs: Sequence[Any], taps: Taps, options: GraphOptions) -> Compiled:
    """Compile dynamo's graph with `taps`. Raises ConfigError for an inner backend that does not exist."""
    inner = options.inner
    if inner == "inductor":
        from .inductor import compile_with_taps

        return compile_with_taps(module, inputs, taps, options)
    if inner in ("npugraph_ex", "torchair"):
        from . import ascend

        return ascend.compile_with_taps(module, inputs, taps, options)
    if isinstance(inner, Tappable):
        return inner.compile_with_taps(module, inputs, taps)
    backend = registered_backend(inner) if isinstance(inner, str) else inner
    if backend is None:
        raise ConfigError(
            f"backend msprobe: the option inner is {inner!r}, which is not in torch.compiler.list_backends()"
        )
    arguments = dict(options.inner_options)
    if options.mode is not None:
        arguments["mode"] = options.mode
    if inner == "aot_eager":
        tapped = _tapped_by(FullPass(taps.wanted, taps.digest, boundary=taps.boundary))
        return Compiled(backend(module, inputs, fw_compiler=tapped, bw_compiler=tapped, **arguments))
    name = inner if isinstance(inner, str) else getattr(inner, "__name__", str(inner))
    remarks = tap_in_front(module, taps, name)
    return Compiled(backend(module, inputs, **arguments), remarks)


def tap_in_front(module: fx.GraphModule, taps: Taps, inner: str) -> list[str]:
    """Put taps into dynamo's own graph, for an inner backend that has no better place; what is to be said of that."""
    tap_dynamo_graph(module, taps.wanted)
    remarks = [] if inner == "eager" else [AT_DYNAMO_LEVEL.format(inner)]
    if any(ref % 2 for ref in taps.wanted):
        remarks.append(NO_BACKWARD.format(inner))
    return remarks


def _tapped_by(tap: FullPass) -> Callable[..., Any]:
    def compile_aten(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._dynamo.backends.debugging import boxed_nop

        tap(module.graph)
        module.recompile()
        return boxed_nop(module, list(inputs))

    return compile_aten


def tap_dynamo_graph(module: fx.GraphModule, wanted: Mapping[int, Wanted], writes: Writes | None = None) -> None:
    """Taps on forward values, each right behind its node. `writes`: those of the graph, if nothing else writes into
    the memory of these values; then what an operator was given to write into, and nothing writes into after it, is told
    to be standing. What it returns is not: it may return the same memory each time."""
    nodes = list(module.graph.nodes)
    for ref in wanted:
        node = nodes[node_of(ref)]
        if ref % 2 == 0 and node.op != "placeholder":
            read = _written(node, wanted[ref])
            stands = writes is not None and read is not node and writes.stands(read, since=node)
            with module.graph.inserting_after(node):
                module.graph.call_function(TAP_STANDING if stands else TAP, ([read], [ref], ""))
    module.recompile()


def _written(node: fx.Node, value: Wanted) -> fx.Node:
    """What to read once `node` has run: its result, or the argument that it has written."""
    if value.written is None:
        return node
    from .arguments import written_arguments

    return dict(written_arguments(node))[value.written]
