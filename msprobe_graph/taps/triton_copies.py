"""Copies of values on a GPU, by a Triton kernel that reads the same table as those that measure."""

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
