"""Copies of values on a GPU: of those that a table describes, as for the kernels that measure, and of a few that lie
plainly."""

import triton
import triton.language as tl

from .triton_kernels import read
from .triton_listed import FIELDS, counted


@triton.jit(do_not_specialize=["first"])
def copy_listed(
    table, owners, control, first: tl.int64,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Copy values that `table` describes, all with elements of one size, to where it says, in row-major order; of a
    batch the rows that count. Grid and the rest as for `measure_listed`."""
    number = first + tl.program_id(0)
    owner = tl.load(owners + number)
    if tl.load(control) != 0:
        entry = table + owner * FIELDS
        part = number - tl.load(entry + 15)
        to = tl.load(entry + 14)
        if to != 0:
            pointer = tl.load(entry).to(tl.pointer_type(ELEMENT))
            copy = tl.multiple_of(to.to(tl.pointer_type(ELEMENT)), 16)
            each = tl.load(entry + 3)
            zeroth, last = counted(entry, control)
            begin = tl.minimum(zeroth + part * each, last)
            end = tl.minimum(begin + each, last)
            if ALIGNED:  # or nothing is read
                pointer = tl.multiple_of(pointer, 16)
                begin = tl.multiple_of(begin, 16)
            s1 = tl.load(entry + 7)
            s2 = tl.load(entry + 8)
            s3 = tl.load(entry + 9)
            t0 = tl.load(entry + 10)
            t1 = tl.load(entry + 11)
            t2 = tl.load(entry + 12)
            t3 = tl.load(entry + 13)
            lanes = tl.arange(0, BLOCK)
            whole = begin + (end - begin) // BLOCK * BLOCK
            for start in range(begin, whole, BLOCK):
                found = read(pointer, None, start + lanes, None, s1, s2, s3, t0, t1, t2, t3, STRIDED, False)
                tl.store(copy + start + lanes, found)
            if whole < end:
                inside = whole + lanes < end
                found = read(pointer, None, whole + lanes, inside, s1, s2, s3, t0, t1, t2, t3, STRIDED, False)
                tl.store(copy + whole + lanes, found, mask=inside)


AT_ONCE = 4
"""So many values `copy_plain` copies in one launch. A copy of torch's costs as much for each."""
WORDS_PER_PROGRAM = tl.constexpr(512)


@triton.jit(do_not_specialize=[f"{what}{which}" for which in "abcd" for what in ("", "to_", "words_")])
def copy_plain(
    a: tl.int64, to_a: tl.int64, words_a: tl.int64, b: tl.int64, to_b: tl.int64, words_b: tl.int64,
    c: tl.int64, to_c: tl.int64, words_c: tl.int64, d: tl.int64, to_d: tl.int64, words_d: tl.int64,
):  # fmt: skip
    """Copy so many words of 8 bytes, an even number, from one address to another, four times: both are multiples of 16.
    Grid: (programs for the largest, how many there are)."""
    which = tl.program_id(1)
    source = tl.where(which == 0, a, tl.where(which == 1, b, tl.where(which == 2, c, d)))
    to = tl.where(which == 0, to_a, tl.where(which == 1, to_b, tl.where(which == 2, to_c, to_d)))
    words = tl.where(which == 0, words_a, tl.where(which == 1, words_b, tl.where(which == 2, words_c, words_d)))
    source = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
    to = tl.multiple_of(to.to(tl.pointer_type(tl.int64)), 16)
    lanes = tl.program_id(0) * WORDS_PER_PROGRAM + tl.arange(0, WORDS_PER_PROGRAM)
    inside = lanes < tl.multiple_of(words, 2)
    tl.store(to + lanes, tl.load(source + lanes, mask=inside), mask=inside)
