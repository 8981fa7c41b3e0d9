"""Modules of torch's that take a fused path in inference, unless somebody looks.

With hooks anywhere below it, or with a function mode on, nn.TransformerEncoderLayer computes step by step (44 aten
operators instead of one), and so does nn.MultiheadAttention under a function mode. The results agree to rounding.
"""

from __future__ import annotations

from torch import nn


def has_fused_path(module: nn.Module) -> bool:
    """Whether `module` would take its fused path now, hooks and modes aside."""
    return isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)) and not module.training
