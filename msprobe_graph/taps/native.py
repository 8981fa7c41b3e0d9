"""The one-pass C code of statistics.c, called through ctypes: found, checked and given torch's names.

It is optional. Installing the package builds it where there is a C compiler; without it portable.py does the same
work, slower.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from msprobe_graph.extension import shared_library

from .unmeasurable import Unmeasurable, address_of

ABI = 1
"""MSPROBE_GRAPH_ABI of the statistics.c that this module was written for."""

WIDE_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint64,
    torch.uint32,
    torch.uint16,
)
BYTE_DTYPES = (
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
DTYPES = WIDE_DTYPES + BYTE_DTYPES
"""Every real dtype that can be measured, in the order of the codes in statistics.c."""

CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

LARGE = 1 << 24
"""From this many elements on, other Python threads run while the C code reads. Below, the interpreter lock is kept: who
gives it to a busy writing thread waits up to 5 ms for it (sys.getswitchinterval), longer than such a reading takes."""

_Function = Callable[..., int]


class Library:
    """The compiled statistics.c. The tensors given to it lie in the CPU's memory and have at least one element."""

    def __init__(self, path: Path) -> None:
        """Load it; OSError if that can't be done or it was compiled from another version of statistics.c."""
        keeping, releasing = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        if (found := keeping.msprobe_graph_abi()) != ABI:
            raise OSError(f"its version is {found} where {ABI} is needed")
        dense = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p)
        self._dense = _declare(keeping.msprobe_graph_dense, None, *dense)
        self._dense_large = _declare(releasing.msprobe_graph_dense, None, *dense)
        # The sizes and strides are ctypes arrays, which argtypes of c_void_p take as they are.
        strided = (
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_void_p,
        )
        self._strided = _declare(keeping.msprobe_graph_strided, None, *strided)
        self._strided_large = _declare(releasing.msprobe_graph_strided, None, *strided)
        self._fingerprint = _declare(
            keeping.msprobe_graph_fingerprint, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
        )
        functions = keeping.msprobe_graph_dense, keeping.msprobe_graph_strided, keeping.msprobe_graph_fingerprint
        self.addresses = tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
        """Of the functions that measure a tensor in one piece and any tensor, and of the one for fingerprints."""
        self._xor = _declare(releasing.msprobe_graph_xor, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        for dtype in BYTE_DTYPES:
            meaning = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float64).tolist()
            keeping.msprobe_graph_bytes_mean(ctypes.c_int32(CODES[dtype]), (ctypes.c_double * 256)(*meaning))

    def measure(self, tensor: torch.Tensor, address: int, count: int, code: int, row: int) -> None:
        """Write the row of `tensor` to the 64 bytes at address `row`.

        The rest is what the caller knows of the tensor by then: `address` of its first element, `count` of elements,
        `code` of its dtype.
        """
        # Only part of a complex tensor's memory can be marked as negative: with two elements or more it is no run.
        if count > 1 and tensor.is_contiguous():
            (self._dense if count < LARGE else self._dense_large)(address, count, code, row)
            return
        if tensor.is_neg():
            tensor = tensor.detach().resolve_neg()
            address = tensor.data_ptr()
        dims = _integers(tensor.dim())
        sizes, strides = dims(*tensor.shape), dims(*tensor.stride())
        strided = self._strided if count < LARGE else self._strided_large
        strided(address, tensor.dim(), sizes, strides, code, row)

    def fingerprint(self, address: int, count: int, itemsize: int) -> int:
        """See `fingerprint`: of `count` elements of `itemsize` bytes that lie one behind the other."""
        return self._fingerprint(address, count, itemsize)

    def xor(self, address: int, size: int) -> int:
        """The exclusive or, as an int64, of `size` bytes taken eight at a time, filled up with zeros."""
        return self._xor(address, size)


def load(folder: Path) -> Library | None:
    """The library that lies in `folder`; without one a warning and None."""
    path = shared_library(folder, "_statistics")
    if path is None:
        _warn(f"there is no compiled _statistics in {folder}")
        return None
    try:
        return Library(path)
    except (OSError, AttributeError) as error:  # AttributeError: it lacks one of the functions
        _warn(f"{path} can't be used ({error})")
        return None


@functools.cache
def library() -> Library | None:
    """The library that was installed with this package, looked for (and, if missing, warned about) once."""
    return load(Path(__file__).parent)


def fingerprint(tensor: torch.Tensor) -> int | None:
    """A cheap probe that shows that a weight was rewritten, also through `.data`, whose version counter stands still.

    A 64-bit hash of 3 elements, evenly apart from the first to the last: about 1 us whatever the size. A change of any
    of them changes it; a change of others goes unnoticed. None where it can't be had: no compiled library, another
    device than the CPU, a tensor that is empty, `Unmeasurable`, or neither contiguous nor a contiguous matrix's
    transpose.
    """
    native = library()
    if native is None or not tensor.is_cpu:
        return None
    try:
        address, count = address_of(tensor), tensor.numel()
    except Unmeasurable:
        return None
    dense = tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride() == (1, tensor.shape[0]))
    return native.fingerprint(address, count, tensor.dtype.itemsize) if count and dense else None


@functools.cache
def _integers(count: int) -> type[ctypes.Array[ctypes.c_int64]]:
    return ctypes.c_int64 * count


def _declare(function: "ctypes._NamedFuncPointer", result: type | None, *arguments: type) -> _Function:
    function.restype = result
    function.argtypes = arguments
    return function


def _warn(what: str) -> None:
    logging.getLogger("msprobe_graph").warning(
        "CPU statistics are computed by plain torch operations, several times slower, because %s; for the fast way "
        "install gcc and then msprobe-graph again (pip install --force-reinstall --no-deps msprobe-graph).",
        what,
    )
