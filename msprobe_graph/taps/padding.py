"""Rows that only fill a batch up to a size (one that a CUDA graph was captured for, or another rank's)."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import torch
from torch import nn


class Padding:
    """Takes them off each tensor of the batch.

    A batch of `rows` rows was padded to `padded`: of a tensor with `padded` rows (its length along dimension 0) the
    first `rows` are kept. Whatever of that length lies in the memory of a parameter or buffer of `models` is no batch,
    and whole. So is a tensor that holds the batch along another dimension, or several rows in one.
    """

    def __init__(self, rows: int, padded: int, models: Collection[nn.Module] = ()) -> None:
        self.rows = rows
        self.padded = padded
        self._models = models

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` without the padding, a view; the same tensor where there is none."""
        if tensor.dim() == 0 or tensor.shape[0] != self.padded or tensor.layout is not torch.strided:
            return tensor
        return tensor if tensor.untyped_storage().data_ptr() in self._owned else tensor[: self.rows]

    @cached_property
    def _owned(self) -> set[int]:
        """Addresses of the models' own memory, as it is in this step."""
        tensors = (tensor for model in self._models for own in (model.parameters(), model.buffers()) for tensor in own)
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout is torch.strided}
