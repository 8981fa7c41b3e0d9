"""Which of a model's sites hold a part of their value only, because tensor parallel ranks share it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

PARTIAL_SUM = "partial sum"
"""The ranks' values add up to the whole one."""

Split = dict[str, Any]
"""``{"dim": -1, "sizes": [64, 16, 16]}``: along a dimension the value consists of parts that lie one behind the other.
The rank holds a piece of each, of so many elements: rank r the r-th, unless there are fewer key-value heads than ranks,
which then share pieces."""


def sharding(model: nn.Module) -> dict[str, dict[str, Split | str]]:
    """By module path and then by position in its entries (``output.0``, ``parameters.weight``): how a parallel layer
    shares it. What lies between two such layers follows from them and is not told. Empty where nothing is shared::

        {"model.layers.0.self_attn.qkv_proj": {"output.0": {"dim": -1, "sizes": [64, 16, 16]},
                                               "parameters.weight": {"dim": 0, "sizes": [64, 16, 16]}},
         "model.layers.0.self_attn.o_proj": {"input_args.0": {"dim": -1, "sizes": [64]},
                                             "parameters.weight": {"dim": 1, "sizes": [64]}}}
    """
    found = ((path, dict(_shared(module))) for path, module in model.named_modules())
    return {path: shared for path, shared in found if shared}


def _shared(module: nn.Module) -> Iterator[tuple[str, Split | str]]:
    if getattr(module, "tp_size", 1) == 1:
        return
    if isinstance(module, ColumnParallelLinear):
        sizes = list(module.output_partition_sizes)
        if not module.gather_output:
            yield "output.0", {"dim": -1, "sizes": sizes}
        yield from _parameters(module, "output_dim", sizes)
    elif isinstance(module, RowParallelLinear):
        sizes = [module.input_size_per_partition]
        if module.input_is_parallel:
            yield "input_args.0", {"dim": -1, "sizes": sizes}
        if not module.reduce_results:
            yield "output.0", PARTIAL_SUM
        yield from _parameters(module, "input_dim", sizes)
    elif isinstance(module, VocabParallelEmbedding):
        yield from _parameters(module, "output_dim", [module.num_embeddings_per_partition])


def _parameters(module: nn.Module, along: str, sizes: list[int]) -> Iterator[tuple[str, Split]]:
    """Those that vLLM loads in pieces; packed ones (quantized weights) have sizes of their own and are left out."""
    for name, parameter in module.named_parameters(recurse=False):
        dim = getattr(parameter, along, None)
        if dim is not None and dim < parameter.dim() and parameter.shape[dim] == sum(sizes):
            yield f"parameters.{name}", {"dim": dim, "sizes": sizes}
