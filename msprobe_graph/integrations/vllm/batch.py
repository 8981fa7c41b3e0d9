"""Which rows of a step's batch belong to which request. Private parts of vLLM's model runners, V1 and V2, are read
here only.

A batch holds its requests one after the other, but not in the scheduler's order: V1 keeps them where they were in the
step before, V2 sorts them. The worker knows a request by the client's name for it and a random suffix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_SUFFIX = re.compile(r"-[0-9a-f]{8}")


def row_order(worker: Any, scheduler_output: Any) -> list[str]:
    """The scheduled requests in the order of their rows.

    Right from the beginning of the model's forward on; before it, V1's runner still has the order of the step before.
    """
    tokens: dict[str, int] = scheduler_output.num_scheduled_tokens
    runner = worker.model_runner
    batch = getattr(runner, "input_batch", None)  # V1 keeps one batch,
    if batch is None:  # V2 makes one in each step, which can be got at between forward and sampling
        batch = getattr(runner.execute_model_state, "input_batch", None)
    if batch is None:
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        order = sort_batch_req_ids(tokens, scheduler_output.scheduled_spec_decode_tokens, runner.decode_query_len)
    else:
        order = batch.req_ids
    return [request for request in order if request in tokens]


def rows(order: Iterable[str], tokens: Mapping[str, int]) -> dict[str, int]:
    """{request: number of rows} in the order given, under the names that the clients know."""
    names = {request: client_name(request) for request in order}
    used = Counter(names.values())
    return {name if used[name] == 1 else request: tokens[request] for request, name in names.items()}


def client_name(request: str) -> str:
    """``cmpl-1-0-5f0c1d2e`` is the worker's name for what the client knows as ``cmpl-1-0``."""
    from vllm import envs

    if getattr(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", False):
        return request
    name, suffix = request[:-9], request[-9:]
    return name if name and _SUFFIX.fullmatch(suffix) else request
