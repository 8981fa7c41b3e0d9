"""Which part of a step's tensors counts, where a batch has requests."""

from __future__ import annotations

from collections.abc import Sequence

from msprobe_graph.config import Settings, Slice
from msprobe_graph.dump.records import Request


def slices(settings: Settings, requests: Sequence[Request]) -> Sequence[Slice] | None:
    """Those that apply to every tensor; None when the request that is asked for has no rows in this step.

    A tensor with a row for each token of the batch is cut to the request's tokens, one with a row for each request
    (logits, sampled tokens) to its one row. They are told by their length.
    """
    wanted = settings.request_id
    if wanted is None or not requests:
        return settings.slice
    names = [request.request for request in requests]
    meant = [name for name in names if name == wanted] or [name for name in names if name.startswith(f"{wanted}-")]
    if not meant:
        return None
    index = names.index(meant[0])
    rows = requests[index]
    return (
        *settings.slice,
        Slice(dim=0, begin=index, end=index + 1, size=len(requests)),
        Slice(dim=0, begin=rows.begin, end=rows.end, size=requests[-1].end),
    )


def rows_that_count(requests: Sequence[Request], cut: Sequence[Slice]) -> tuple[int, int]:
    """Of the batch, under these slices: from the first up to but without the second (-1: all)."""
    if not requests:
        return 0, -1
    rows = requests[-1].end
    own = next((part for part in cut if part.dim == 0 and part.size == rows and part.end is not None), None)
    return (0, rows) if own is None else (own.begin, own.end or rows)
