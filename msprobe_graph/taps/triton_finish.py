"""One row of all parts of a value, by a Triton kernel: what triton_kernels.py has measured."""

import triton
import triton.language as tl

from .triton_kernels import FLOAT, GREATEST, INFINITY, LEAST, UINT64

PARTS = tl.constexpr(64)
"""So many are read at once."""


@triton.jit
def finish(rows, headers, out, ANEW: tl.constexpr):
    """Make one row of each value's parts: out[i] is the row of the value whose header is row headers[i], how often it
    was measured, and the tag of the last time (`arrival.SLOT`). Grid: (values,). ANEW: it counts anew from here, and
    the first words of all its rows are 0 again. `out` may be in pinned memory of the host."""
    header = rows + tl.load(headers + tl.program_id(0)) * 8
    out = out + tl.program_id(0).to(tl.int64) * 10
    fired = tl.load(header)
    tl.store(out + 8, fired)
    tl.store(out + 9, tl.load(header + 1))
    if fired > 0:
        parts = tl.load(header + 2)
        kind = tl.load(header + 3)
        flip = tl.where(kind == UINT64, LEAST, 0)
        lanes = tl.arange(0, PARTS)
        highs = tl.full([PARTS], -INFINITY, tl.float64)
        lows = tl.full([PARTS], INFINITY, tl.float64)
        norms = tl.zeros([PARTS], tl.float64)
        exact_highs = tl.full([PARTS], LEAST, tl.int64)
        exact_lows = tl.full([PARTS], GREATEST, tl.int64)
        nan_counts = tl.zeros([PARTS], tl.int64)
        positive_counts = tl.zeros([PARTS], tl.int64)
        negative_counts = tl.zeros([PARTS], tl.int64)
        counts = tl.zeros([PARTS], tl.int64)
        for start in range(0, parts, PARTS):
            inside = start + lanes < parts
            row = header + (start + lanes + 1) * 8
            count = tl.load(row + 7, mask=inside, other=0)
            some = count > 0
            high = tl.load(row, mask=some, other=0).to(tl.float64, bitcast=True)
            low = tl.load(row + 1, mask=some, other=0).to(tl.float64, bitcast=True)
            highs = tl.maximum(highs, tl.where(some, high, -INFINITY))
            lows = tl.minimum(lows, tl.where(some, low, INFINITY))
            norms = tl.maximum(norms, tl.load(row + 3, mask=some, other=0).to(tl.float64, bitcast=True))
            nan = tl.load(row + 4, mask=inside, other=0)
            positive = tl.load(row + 5, mask=inside, other=0)
            exact_highs = tl.maximum(exact_highs, tl.where(some, nan ^ flip, LEAST))
            exact_lows = tl.minimum(exact_lows, tl.where(some, positive ^ flip, GREATEST))
            nan_counts += nan
            positive_counts += positive
            negative_counts += tl.load(row + 6, mask=inside, other=0)
            counts += count
        count = tl.sum(counts)
        total = tl.maximum(count, 1).to(tl.float64)
        largest = tl.max(norms)
        scale = tl.where((largest > 0) & (largest < INFINITY), largest, 1.0)
        means = tl.zeros([PARTS], tl.float64)
        squares = tl.zeros([PARTS], tl.float64)
        for start in range(0, parts, PARTS):
            inside = start + lanes < parts
            row = header + (start + lanes + 1) * 8
            count_here = tl.load(row + 7, mask=inside, other=0)
            some = count_here > 0
            means += tl.load(row + 2, mask=some, other=0).to(tl.float64, bitcast=True) * (count_here / total)
            norm = tl.load(row + 3, mask=some, other=0).to(tl.float64, bitcast=True) / scale
            squares += norm * norm
            if ANEW:  # what is a part's row now may be a header's in the next step
                tl.store(row, 0, mask=inside)
        tl.store(out, tl.max(highs).to(tl.int64, bitcast=True))
        tl.store(out + 1, tl.min(lows).to(tl.int64, bitcast=True))
        tl.store(out + 2, tl.sum(means).to(tl.int64, bitcast=True))
        tl.store(out + 3, (tl.sqrt(tl.sum(squares)) * scale).to(tl.int64, bitcast=True))
        if kind == FLOAT:
            tl.store(out + 4, tl.sum(nan_counts))
            tl.store(out + 5, tl.sum(positive_counts))
        else:
            tl.store(out + 4, tl.max(exact_highs) ^ flip)
            tl.store(out + 5, tl.min(exact_lows) ^ flip)
        tl.store(out + 6, tl.sum(negative_counts))
        tl.store(out + 7, count)
        if ANEW:
            tl.store(header, 0)
