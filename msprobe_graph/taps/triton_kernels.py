"""A tensor's row on a GPU, by Triton kernels: each value is read once, and the same values give the same bits.

A value is cut into parts. A program reads one part and writes its row (`statistics.ROW`) behind a *header*; `finish`
makes one row of a header's parts. The header counts how often the value was measured since it last was, which is
how a replayed CUDA graph tells which of its taps ran::

    header      fired, tag, parts, kind, -, -, -, -
    part 0      max, min, mean, norm, NaN, +Inf, -Inf, finite        of elements 0 to n-1
    part 1      ...                                                  of elements n to 2n-1

All of it is int64; float64 fields are there as their bits. Sums are kept in float32 for each lane of a program, which
adds a few dozen elements, and in float64 from there on. What can't be summed like that (a NaN, an infinity, squares
that leave the range of float32) is read a second time, in float64 throughout.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LEAST = tl.constexpr(-(2**63))
GREATEST = tl.constexpr(2**63 - 1)
# Kinds, as a header names them.
FLOAT, INTEGER, UINT64 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# How elements lie: one behind the other, or with strides, and then whether their numbers fit into an int32. Of these in
# ROWS: s2 rows of s3 elements, which lie one behind the other; s3 is a multiple of RUN, and t2 one of ALIGNED_ROWS. A
# thread reads 16 bytes at once, so a run need be no longer for it to divide but once.
DENSE, NARROW, WIDE, ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RUN = tl.constexpr(16)
ALIGNED_ROWS = tl.constexpr(16)
WIDE_BLOCK = tl.constexpr(512)
"""Elements that are read at once the second time: few, as the registers for them are taken the first time, too."""


@triton.jit
def read(pointer, meaning, at, inside, s1, s2, s3, t0, t1, t2, t3, STRIDED: tl.constexpr, BYTES: tl.constexpr):
    """Elements by their numbers in row-major order; anything where not `inside` (None: all are). Of a float of one byte
    `meaning` has the 256 values."""
    if STRIDED:
        if STRIDED != WIDE:
            at = at.to(tl.int32)
        rest = at // s3.to(at.dtype)
        i3 = at - rest * s3.to(at.dtype)
        at = rest
        rest = at // s2.to(at.dtype)
        i2 = at - rest * s2.to(at.dtype)
        i0 = rest // s1.to(at.dtype)
        i1 = rest - i0 * s1.to(at.dtype)
        at = i0.to(tl.int64) * t0 + i1.to(tl.int64) * t1 + i2.to(tl.int64) * t2 + i3.to(tl.int64) * t3
    found = tl.load(pointer + at, mask=inside)
    if BYTES:
        found = tl.load(meaning + found.to(tl.int32), mask=inside)
    return found


@triton.jit
def read_runs(pointer, meaning, at, s3, t2, BYTES: tl.constexpr):
    """Runs of elements that lie in ROWS, by the numbers of their first elements: a division for each run, and not for
    each element."""
    at = at.to(tl.int32)
    row = at // s3.to(tl.int32)
    first = tl.multiple_of(row.to(tl.int64) * t2 + (at - row * s3.to(tl.int32)), (ALIGNED_ROWS, ALIGNED_ROWS))
    found = tl.load(pointer + (first + tl.arange(0, RUN)[None, :]))
    if BYTES:
        found = tl.load(meaning + found.to(tl.int32))
    return found


@triton.jit
def merge(high, low, total, square, other_high, other_low, other_total, other_square):
    return tl.maximum(high, other_high), tl.minimum(low, other_low), total + other_total, square + other_square


@triton.jit
def _floats(
    pointer, meaning, begin, end, row, s1, s2, s3, t0, t1, t2, t3,
    SUM: tl.constexpr, TINY: tl.constexpr, STRIDED: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if STRIDED == ROWS:
        runs = tl.arange(0, BLOCK // RUN)[:, None] * RUN
        lanes = runs + tl.arange(0, RUN)[None, :]
    else:
        lanes = tl.arange(0, BLOCK)
    highs = tl.full(lanes.shape, -INFINITY, SUM)
    lows = tl.full(lanes.shape, INFINITY, SUM)
    sums = tl.zeros(lanes.shape, SUM)
    squares = tl.zeros(lanes.shape, SUM)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in tl.range(begin, whole, BLOCK, loop_unroll_factor=4):
        if STRIDED == ROWS:
            x = read_runs(pointer, meaning, start + runs, s3, t2, BYTES).to(SUM)
        else:
            x = read(pointer, meaning, start + lanes, None, s1, s2, s3, t0, t1, t2, t3, STRIDED, BYTES).to(SUM)
        highs = tl.maximum(highs, x)
        lows = tl.minimum(lows, x)
        sums += x
        squares += x * x
    if whole < end:
        inside = whole + lanes < end
        x = read(pointer, meaning, whole + lanes, inside, s1, s2, s3, t0, t1, t2, t3, STRIDED, BYTES).to(SUM)
        highs = tl.maximum(highs, tl.where(inside, x, -INFINITY))
        lows = tl.minimum(lows, tl.where(inside, x, INFINITY))
        x = tl.where(inside, x, 0.0)
        sums += x
        squares += x * x
    found = (highs, lows, sums.to(tl.float64), squares.to(tl.float64))
    if STRIDED == ROWS:
        found = tl.reduce(found, 1, merge)
    high, low, total, square = tl.reduce(found, 0, merge)
    high = high.to(tl.float64)
    low = low.to(tl.float64)
    count = (end - begin).to(tl.int64)
    mean = total / tl.maximum(count, 1).to(tl.float64)
    norm = tl.sqrt(square)
    nans = tl.zeros([], tl.int64)
    positive = tl.zeros([], tl.int64)
    negative = tl.zeros([], tl.int64)
    largest = tl.maximum(tl.abs(high), tl.abs(low))
    plain = (square < INFINITY) & ((largest > TINY) | (largest == 0))
    if (count > 0) & (plain == 0):
        high, low, mean, norm, nans, positive, negative = _wide(
            pointer, meaning, begin, end, s1, s2, s3, t0, t1, t2, t3, STRIDED, BYTES
        )  # fmt: skip
        count = count - nans - positive - negative
    tl.store(row, high.to(tl.int64, bitcast=True))
    tl.store(row + 1, low.to(tl.int64, bitcast=True))
    tl.store(row + 2, mean.to(tl.int64, bitcast=True))
    tl.store(row + 3, norm.to(tl.int64, bitcast=True))
    tl.store(row + 4, nans)
    tl.store(row + 5, positive)
    tl.store(row + 6, negative)
    tl.store(row + 7, count)


@triton.jit
def _wide(pointer, meaning, begin, end, s1, s2, s3, t0, t1, t2, t3, STRIDED: tl.constexpr, BYTES: tl.constexpr):
    """The same of what float32 can't sum."""
    lanes = tl.arange(0, WIDE_BLOCK)
    highs = tl.full(lanes.shape, -INFINITY, tl.float64)
    lows = tl.full(lanes.shape, INFINITY, tl.float64)
    nan_counts = tl.zeros(lanes.shape, tl.int64)
    positive_counts = tl.zeros(lanes.shape, tl.int64)
    negative_counts = tl.zeros(lanes.shape, tl.int64)
    for start in range(begin, end, WIDE_BLOCK):
        inside = start + lanes < end
        x = read(pointer, meaning, start + lanes, inside, s1, s2, s3, t0, t1, t2, t3, STRIDED, BYTES).to(tl.float64)
        finite = inside & (tl.abs(x) < INFINITY)
        highs = tl.maximum(highs, tl.where(finite, x, -INFINITY))
        lows = tl.minimum(lows, tl.where(finite, x, INFINITY))
        nan_counts += (inside & (x != x)).to(tl.int64)
        positive_counts += (inside & (x == INFINITY)).to(tl.int64)
        negative_counts += (inside & (x == -INFINITY)).to(tl.int64)
    high = tl.max(highs)
    low = tl.min(lows)
    nans = tl.sum(nan_counts)
    positive = tl.sum(positive_counts)
    negative = tl.sum(negative_counts)
    count = end - begin - nans - positive - negative
    largest = tl.maximum(tl.abs(high), tl.abs(low))
    scale = tl.where((count > 0) & (largest > 0), largest, 1.0)
    sums = tl.zeros(lanes.shape, tl.float64)
    squares = tl.zeros(lanes.shape, tl.float64)
    for start in range(begin, end, WIDE_BLOCK):
        inside = start + lanes < end
        x = read(pointer, meaning, start + lanes, inside, s1, s2, s3, t0, t1, t2, t3, STRIDED, BYTES).to(tl.float64)
        x = tl.where(inside & (tl.abs(x) < INFINITY), x / scale, 0.0)
        sums += x
        squares += x * x
    mean = tl.sum(sums) / tl.maximum(count, 1).to(tl.float64) * scale
    return high, low, mean, tl.sqrt(tl.sum(squares)) * scale, nans, positive, negative


@triton.jit
def _integers(
    pointer, meaning, begin, end, row, s1, s2, s3, t0, t1, t2, t3,
    KIND: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    highs = tl.full([BLOCK], LEAST, tl.int64)
    lows = tl.full([BLOCK], GREATEST, tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        found = read(pointer, meaning, start + lanes, inside, s1, s2, s3, t0, t1, t2, t3, STRIDED, False)
        exact = found.to(tl.int64)
        if KIND == UINT64:  # with the highest bit flipped their order is that of an int64
            exact = exact ^ LEAST
        highs = tl.maximum(highs, tl.where(inside, exact, LEAST))
        lows = tl.minimum(lows, tl.where(inside, exact, GREATEST))
        x = tl.where(inside, found.to(tl.float64), 0.0)
        sums += x
        squares += x * x
    high = tl.max(highs)
    low = tl.min(lows)
    if KIND == UINT64:
        high = high ^ LEAST
        low = low ^ LEAST
    count = (end - begin).to(tl.int64)
    mean = tl.sum(sums) / tl.maximum(count, 1).to(tl.float64)
    norm = tl.sqrt(tl.sum(squares))
    tl.store(row, tl.zeros([], tl.int64))
    tl.store(row + 1, tl.zeros([], tl.int64))
    tl.store(row + 2, mean.to(tl.int64, bitcast=True))
    tl.store(row + 3, norm.to(tl.int64, bitcast=True))
    tl.store(row + 4, high)
    tl.store(row + 5, low)
    tl.store(row + 6, tl.zeros([], tl.int64))
    tl.store(row + 7, count)


@triton.jit
def part_of(
    pointer, meaning, first, last, part, each, parts, header, tag, s1, s2, s3, t0, t1, t2, t3,
    KIND: tl.constexpr, SUM: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
    BYTES: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """BEGIN, END: `first` and `last` are multiples of 16."""
    begin = tl.minimum(first + part * each, last)
    end = tl.minimum(begin + each, last)
    if BEGIN:  # or nothing is read
        begin = tl.multiple_of(begin, 16)
    if END:  # then what is left of a block is read as fast as a whole one
        end = tl.multiple_of(end, 16)
    row = header + (part + 1) * 8
    if KIND == FLOAT:
        _floats(
            pointer, meaning, begin, end, row, s1, s2, s3, t0, t1, t2, t3, SUM, TINY, STRIDED, BYTES, BLOCK
        )  # fmt: skip
    else:
        _integers(pointer, meaning, begin, end, row, s1, s2, s3, t0, t1, t2, t3, KIND, STRIDED, BLOCK)
    if part == 0:
        tl.store(header, tl.load(header) + 1)
        tl.store(header + 1, tag)
        tl.store(header + 2, parts)
        tl.store(header + 3, KIND)


SCALARS = ["count", "each", "parts", "header", "tag", "s1", "s2", "s3", "t0", "t1", "t2", "t3"]


@triton.jit(do_not_specialize=SCALARS)
def measure_one(
    tensor, meaning, rows, count: tl.int64, each: tl.int64, parts: tl.int64, header: tl.int64, tag: tl.int64,
    s1: tl.int64, s2: tl.int64, s3: tl.int64, t0: tl.int64, t1: tl.int64, t2: tl.int64, t3: tl.int64,
    KIND: tl.constexpr, SUM: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
    BYTES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Measure `count` elements of `tensor`, `each` (a multiple of BLOCK) to a program, into the header and parts that
    begin at row `header`. EVEN: it is a multiple of 16. Grid: (parts,)."""
    part_of(
        tensor, meaning, 0, count, tl.program_id(0).to(tl.int64), each, parts, rows + header * 8, tag,
        s1, s2, s3, t0, t1, t2, t3,
        KIND, SUM, TINY, BLOCK, STRIDED, BYTES, True, EVEN,
    )  # fmt: skip
