"""Private Inductor that taps need, in one place. Tested with torch 2.13."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch


def keep_order(*operators: torch._ops.OpOverload) -> None:
    """Have Inductor run the calls of `operators`, which return nothing, in the order in which the program has them.

    Left alone, its scheduler sorts calls by when their arguments are ready, and so it does with ordered effects when
    they return nothing. This takes hold once Inductor is loaded and costs nothing before: call it while tracing.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operators[0] in lowering.lowerings:
        return
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    def lower(operator: torch._ops.OpOverload, *args: Any) -> None:
        graph = V.graph
        earlier: list[Any] = [call for call in graph.operations if getattr(call, "op_overload", None) in operators]
        ir.FallbackKernel.create(operator, *args)
        if earlier:
            name = graph.operations[-1].get_operation_name()
            graph.additional_buffer_deps[name].add(earlier[-1].get_name())

    for operator in operators:
        lowering.register_lowering(operator, type_promotion_kind=None)(partial(lower, operator))
