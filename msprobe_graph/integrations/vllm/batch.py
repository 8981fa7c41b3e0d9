"""What a step's batch consists of: which rows belong to which request, and which to none. Private parts of vLLM's model
runners, V1 and V2, are read here only.

A batch holds its requests one after the other, but not in the scheduler's order: V1 keeps them where they were in the
step before, V2 sorts them. The worker knows a request by the client's name for it and a random suffix.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

from vllm.forward_context import get_forward_context, is_forward_context_available

from msprobe_graph.dump.records import Request

_SUFFIX = re.compile(r"-[0-9a-f]{8}")


Progress = tuple[int, int, int]
"""How far a request is when a step begins, in tokens: how many, from the first on, need not be computed, as an earlier
step has, or another request that begins alike; how many the prompt has; and how many are known, the prompt and what has
been made since, a token that another step is just making included."""


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


def requests(worker: Any, scheduler_output: Any, order: Iterable[str]) -> list[Request]:
    """The scheduled requests, their rows in the order given, under the names that the clients know."""
    names = {request: client_name(request) for request in order}
    used = Counter(names.values()) if len(set(names.values())) < len(names) else None
    progress = _progress(worker.model_runner, scheduler_output)
    tokens, drafts = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_spec_decode_tokens
    found, begin = [], 0
    for request, name in names.items():
        first, prompt, known = progress[request]
        count = tokens[request]
        end, last = begin + count, first + count
        phase: Literal["prefill", "decode"] = "prefill"
        if known > prompt and first == known - 1 and count == 1 + (len(drafts[request]) if request in drafts else 0):
            phase = "decode"
        shown = request if used is not None and used[name] > 1 else name
        found.append(Request(shown, begin, end, phase, (first, last)))
        begin = end
    return found


def encodes(worker: Any) -> bool:
    """Whether the model may compute something before its forward: what a runner doesn't tell is assumed."""
    return bool(getattr(worker.model_runner, "supports_mm_inputs", True))


def padded_rows(worker: Any) -> int | None:
    """How many rows the model runs, or ran, with in this step; None where that can't be told."""
    if is_forward_context_available():
        descriptor = get_forward_context().batch_descriptor
        return None if descriptor is None else int(descriptor.num_tokens)
    batch = getattr(getattr(worker.model_runner, "execute_model_state", None), "input_batch", None)  # V2's
    return None if batch is None else int(batch.num_tokens_after_padding)


@functools.lru_cache(maxsize=1 << 12)  # vLLM looks at the environment anew each time that it is asked
def client_name(request: str) -> str:
    """``cmpl-1-0-5f0c1d2e`` is the worker's name for what the client knows as ``cmpl-1-0``."""
    from vllm import envs

    if getattr(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", False):
        return request
    name, suffix = request[:-9], request[-9:]
    return name if name and _SUFFIX.fullmatch(suffix) else request


def _progress(runner: Any, scheduler_output: Any) -> dict[str, Progress]:
    """By scheduled request."""
    found = {}
    for new in scheduler_output.scheduled_new_reqs:  # V2 gets those that resume after a preemption here, too
        prompt = len(new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids)
        known = len(new.prefill_token_ids or ()) or prompt
        found[new.req_id] = (new.num_computed_tokens, prompt, known)
    cached = scheduler_output.scheduled_cached_reqs
    prompt_length = _prompt_lengths(runner)
    for request, computed, made in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
    ):
        prompt = prompt_length(request)
        found[request] = (computed, prompt, prompt + made)
    return found


def _prompt_lengths(runner: Any) -> Callable[[str], int]:
    """Gives those of requests that the runner has met before."""
    states = getattr(runner, "req_states", None)  # V2's
    if states is None:
        met = runner.requests
        return lambda request: met[request].num_prompt_tokens
    lengths, index = states.prompt_len.np, states.req_id_to_index
    return lambda request: int(lengths[index[request]])
