"""Values that a CUDA graph measures, by Triton kernels that find them described in a table.

Which values, and where they are, is settled when the graph is captured; whether they are measured, when it is replayed.
"""

import triton
import triton.language as tl

from .triton_kernels import SCALARS, part_of

FIELDS = tl.constexpr(16)
"""int64s that describe one value: see `describe`."""
LANES = tl.constexpr(64)
"""Parts whose owner `describe` writes at once."""


@triton.jit
def counted(entry, control):
    """The elements that count of a listed value: from the first up to but without the last."""
    first = tl.zeros([], tl.int64)
    last = tl.load(entry + 1)
    inner = tl.load(entry + 2)
    end = tl.load(control + 2)
    if (inner > 0) & (end >= 0):
        first = tl.minimum(tl.load(control + 1) * inner, last)
        last = tl.minimum(end * inner, last)
    return first, last


@triton.jit(do_not_specialize=["first"])
def measure_listed(
    table, owners, meaning, rows, control, first: tl.int64,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, SUM: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
    STRIDED: tl.constexpr, BYTES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Measure values that `table` describes, all of one dtype: the parts whose numbers begin with `first`. Grid:
    (parts,).

    `control`: see `set_control`. ALIGNED: the values, and the rows of a batch, begin and end at multiples of 16 bytes
    and of 16 elements.
    """
    number = first + tl.program_id(0)
    owner = tl.load(owners + number)  # asked for together with the next, which most often is what there is to wait for
    if tl.load(control) != 0:
        entry = table + owner * FIELDS
        part = number - tl.load(entry + 15)
        pointer = tl.load(entry).to(tl.pointer_type(ELEMENT))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        begin, end = counted(entry, control)
        part_of(
            pointer, meaning, begin, end, part, tl.load(entry + 3), tl.load(entry + 4), rows + tl.load(entry + 5) * 8,
            tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9),
            tl.load(entry + 10), tl.load(entry + 11), tl.load(entry + 12), tl.load(entry + 13),
            KIND, SUM, TINY, BLOCK, STRIDED, BYTES, ALIGNED, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["index", "address", "inner", "copy", "first", *SCALARS])
def describe(
    table, owners, index: tl.int64, address: tl.int64, count: tl.int64, inner: tl.int64, each: tl.int64,
    parts: tl.int64, header: tl.int64, tag: tl.int64,
    s1: tl.int64, s2: tl.int64, s3: tl.int64, t0: tl.int64, t1: tl.int64, t2: tl.int64, t3: tl.int64, copy: tl.int64,
    first: tl.int64,
):  # fmt: skip
    """Write entry `index` of the table: `inner` elements to a row of the batch (0: it is no batch), `copy` the address
    that it is copied to (0: it is not), `first` the number of its first part, the rest as in `measure_one`; and write
    to which entry its parts belong, by number. A kernel, because nothing can be copied from the host while a CUDA graph
    is captured. Grid: (1,)."""
    entry = table + index * FIELDS
    tl.store(entry, address)
    tl.store(entry + 1, count)
    tl.store(entry + 2, inner)
    tl.store(entry + 3, each)
    tl.store(entry + 4, parts)
    tl.store(entry + 5, header)
    tl.store(entry + 6, tag)
    tl.store(entry + 7, s1)
    tl.store(entry + 8, s2)
    tl.store(entry + 9, s3)
    tl.store(entry + 10, t0)
    tl.store(entry + 11, t1)
    tl.store(entry + 12, t2)
    tl.store(entry + 13, t3)
    tl.store(entry + 14, copy)
    tl.store(entry + 15, first)
    lanes = tl.arange(0, LANES)
    for start in range(0, parts, LANES):
        tl.store(owners + (first + start + lanes), index.to(tl.int32), mask=start + lanes < parts)


@triton.jit(do_not_specialize=["index", "value"])
def put(words, index: tl.int64, value: tl.int64):
    """words[index] = value, for what `describe` says. Grid: (1,)."""
    tl.store(words + index, value)


@triton.jit(do_not_specialize=["on", "begin", "end"])
def set_control(control, on: tl.int64, begin: tl.int64, end: tl.int64):
    """Whether listed values are measured at all, and which rows of a batch: from `begin` up to but without `end`; all
    if `end` is -1. Grid: (1,)."""
    tl.store(control, on)
    tl.store(control + 1, begin)
    tl.store(control + 2, end)
