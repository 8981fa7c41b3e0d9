"""Whether taps change what they look at: a graph is compiled with and without them, run on the same inputs, compared.

Compilers that tune kernels may give other results each time they compile: so tapped and untapped program are compared
with the tuning pinned, and two untapped compiles with the tuning free tell the program's own noise.

A verdict, as it stands in the manifest::

    {"same": true,
     "sentence": "the taps changed nothing: 28 generated functions are the same, 15 of 15 results bit-equal",
     "results": {"tensors": 15, "bit_equal": 15, "largest_difference": 0.0},
     "noise": {"tensors": 15, "bit_equal": 15, "largest_difference": 0.0},
     "functions": {"untapped": 28, "tapped": 28, "changed": []}}
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch
from torch import fx

from .generated import PINNED, UNCACHED, functions_of, generated_code
from .handoff import Compiled
from .options import GraphOptions

SEED = 1234


class Variant(NamedTuple):
    """One way to compile the graph."""

    tapped: bool
    pinned: bool


FREE, FREE_AGAIN, PLAIN, TAPPED = "free", "free again", "plain", "tapped"
VARIANTS = {
    FREE: Variant(False, False),
    FREE_AGAIN: Variant(False, False),
    PLAIN: Variant(False, True),
    TAPPED: Variant(True, True),
}


class Verifier:
    """Compiles the variants at once, because dynamo's context is needed for that, and runs them at the first call."""

    def __init__(
        self,
        module: fx.GraphModule,
        compile: Callable[[fx.GraphModule, bool, GraphOptions], Compiled],
        options: GraphOptions,
    ) -> None:
        """`compile` is given a copy of `module`, whether to tap it, and options."""
        self._programs: dict[str, Callable[..., Any]] = {}
        self._code: dict[str, list[str]] = {}
        for name, variant in VARIANTS.items():
            with generated_code() as self._code[name]:
                compiled = compile(copied(module), variant.tapped, _changed(options, variant))
            self._programs[name] = compiled.call

    def verdict(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """`inputs` are those of a call of the graph; they stay as they are."""
        results = {}
        for name, program in self._programs.items():
            with generated_code() as late, _same_random_numbers():
                results[name] = _run(program, inputs)
            self._code[name] += late  # a backward pass is compiled when it first runs
        found = _differences(results[PLAIN], results[TAPPED])
        untapped, tapped = (Counter(functions_of(self._code[name])) for name in (PLAIN, TAPPED))
        changed = sorted({function.name for function in (untapped - tapped) | (tapped - untapped)})
        same = not changed and found["bit_equal"] == found["tensors"]
        count = f"{found['bit_equal']} of {found['tensors']} results bit-equal"
        functions = f"{untapped.total()} generated functions are the same"
        if changed:
            functions = f"{(untapped - tapped).total()} of {untapped.total()} generated functions are other ones"
        return {
            "same": same,
            "sentence": f"the taps changed {'nothing' if same else 'the program'}: {functions}, {count}",
            "results": found,
            "noise": _differences(results[FREE], results[FREE_AGAIN]),
            "functions": {"untapped": untapped.total(), "tapped": tapped.total(), "changed": changed},
        }


def _changed(options: GraphOptions, variant: Variant) -> GraphOptions:
    if options.inner != "inductor":
        return options
    ours = {**UNCACHED, **(PINNED if variant.pinned else {})}
    return msgspec.structs.replace(options, inner_options={**options.inner_options, **ours})


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of dynamo's graph that a compiler may take over."""
    twin = copy.copy(module)
    nodes: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph(twin)
    for node in module.graph.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
        if hasattr(node, "_dynamo_source"):
            nodes[node]._dynamo_source = node._dynamo_source
    twin.graph = graph
    return twin


def _run(program: Callable[..., Any], inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Outputs, and gradients of the inputs where the graph is differentiable."""
    given = [_private(value) for value in inputs]
    outputs = [output for output in program(*given) if isinstance(output, torch.Tensor)]
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.ones_like(output) for output in differentiable])
    gradients = [value.grad for value in given if isinstance(value, torch.Tensor) and value.is_leaf]
    return [*(output.detach() for output in outputs), *(each for each in gradients if each is not None)]


def _private(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    twin = value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
    return torch.nn.Parameter(twin, value.requires_grad) if isinstance(value, torch.nn.Parameter) else twin


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        yield


def _differences(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> dict[str, Any]:
    equal = [_bits_equal(left, right) for left, right in zip(one, other, strict=True)]
    largest = max((_largest(left, right) for left, right in zip(one, other, strict=True)), default=0.0)
    return {"tensors": len(equal), "bit_equal": sum(equal), "largest_difference": largest}


def _bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def _largest(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest absolute difference; of equal infinities it is 0."""
    if left.numel() == 0:
        return 0.0
    apart = (left.to(torch.float64) - right.to(torch.float64)).abs()
    return float(torch.where(left == right, 0.0, apart).nan_to_num(0.0).max())
