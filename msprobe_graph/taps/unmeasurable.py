"""Which tensors have no values that could be read, and why. Here torch's private APIs are asked."""

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from .device import of as device_of

PLAIN = (torch.Tensor, torch.nn.Parameter)

MAPPED = 1 << 40
"""Memory lies above this address in position-independent programs on 64-bit Linux; in others, such as the Python of
Debian and Ubuntu, the heap begins far below. There lie the "addresses" of tensors without memory, too: 0, or the offset
into a storage that was freed. Only what is below is looked at more closely."""


class Unmeasurable(ValueError):
    """A tensor has no values to read; the message is the reason, to be written down in their place."""


def refuse_unmeasurable(tensor: torch.Tensor) -> None:
    """Raise `Unmeasurable` unless `tensor` has values of its own in plain strided memory. Reads no value.

    Tested with torch 2.13; the two private names used have been the same since torch 2.1.
    """
    if isinstance(tensor, FakeTensor):
        raise Unmeasurable("a fake tensor has a shape but no values")
    if is_functorch_wrapped_tensor(tensor):
        raise Unmeasurable("a tensor inside a torch.func transform (vmap, grad, jvp) stands for others")
    if tensor.is_nested:
        raise Unmeasurable("a nested tensor has no single shape")
    if tensor.layout is not torch.strided:
        raise Unmeasurable(f"a tensor of layout {tensor.layout} is not strided")
    if hasattr(tensor, "__tensor_flatten__"):
        raise Unmeasurable(f"a {type(tensor).__name__} keeps its values in other tensors")
    if tensor.is_quantized:
        raise Unmeasurable(f"a quantized tensor ({tensor.dtype}) means its values only together with its scales")
    if tensor.is_meta:
        raise Unmeasurable("a meta tensor has a shape but no values")
    if tensor.numel() and (tensor._is_zerotensor() or not tensor.untyped_storage().nbytes()):
        raise Unmeasurable("the tensor has no memory, or it has been freed")
    if tensor.is_cpu and tensor.numel() and not tensor.untyped_storage().data_ptr():
        raise Unmeasurable(f"a {type(tensor).__name__} has no memory of its own")


def refuse_captured(tensor: torch.Tensor) -> None:
    """Refuse to read what only becomes part of a graph (CUDA's, ACL's) now: it has no values yet, and to ask for them
    would end the capture."""
    if not tensor.is_cpu and device_of(tensor.device).capturing():
        kind = tensor.device.type.upper()
        raise Unmeasurable(f"it is computed while a {kind} graph is captured, which computes nothing")


def address_of(tensor: torch.Tensor) -> int:
    """Where the first element of a CPU tensor lies. Refuses what `refuse_unmeasurable` refuses, but in 0.3 us."""
    if type(tensor) in PLAIN and not tensor.is_nested:
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # sparse, or inside a torch.func transform
            address = 0
        if address >= MAPPED or (address and address != tensor.storage_offset() * tensor.itemsize):
            return address
    refuse_unmeasurable(tensor)
    return tensor.data_ptr()
