"""Checksums of a tensor's bytes, as msProbe's summary modes "md5" and "xor" write them."""

import ctypes
import zlib

import torch

from . import native
from .unmeasurable import refuse_unmeasurable


def crc32(tensor: torch.Tensor) -> str:
    """CRC-32 (zlib's) of the contiguous bytes of `tensor` in its own dtype, as 8 hex digits: "3d3b1e1c".

    What msProbe 26.2 writes as "md5" in summary_mode "md5". Waits for the tensor's device. `Unmeasurable` as from
    `Rows.add`.
    """
    refuse_unmeasurable(tensor)
    values = _contiguous(tensor).cpu()
    size = values.numel() * values.dtype.itemsize
    return f"{zlib.crc32((ctypes.c_char * size).from_address(values.data_ptr())) if size else 0:08x}"


def xor_checksum(tensor: torch.Tensor) -> int | float:
    """The exclusive or of the contiguous bytes of `tensor`, taken eight at a time as int64 and filled up with zeros.

    What msProbe 26.2 writes as "md5" in summary_mode "xor"; as there, the checksum of a real 0-d tensor is its value,
    and that of an empty one 0. Waits for the tensor's device. `Unmeasurable` as from `Rows.add`.
    """
    refuse_unmeasurable(tensor)
    if tensor.dim() == 0 and not tensor.dtype.is_complex:
        value: int | float = tensor.item()
        return value
    values = _contiguous(tensor)
    size = values.numel() * values.dtype.itemsize
    if not size:
        return 0
    library = native.library()
    if library is not None and values.is_cpu:
        return library.xor(values.data_ptr(), size)
    plain = values.reshape(-1).clone(memory_format=torch.contiguous_format)  # a single element may have any stride
    return _fold(torch.nn.functional.pad(plain.view(torch.uint8), (0, -size % 8)).view(torch.int64))


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def _fold(words: torch.Tensor) -> int:
    """The exclusive or of a vector of int64, by halving it: torch has no such reduction."""
    while words.numel() > 1:
        if words.numel() % 2:
            words = torch.nn.functional.pad(words, (0, 1))
        first, second = words.chunk(2)
        words = first ^ second
    return int(words.sum())
