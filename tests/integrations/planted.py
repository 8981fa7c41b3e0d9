"""What the tests of keep_last have vLLM's workers do: --worker-extension-cls planted.Planted."""

from __future__ import annotations

import os
from typing import Any

import torch

SITE = "layers.1.post_attention_layernorm"


def set_weight(model: torch.nn.Module, value: float) -> None:
    """One element of one layer's weight."""
    with torch.inference_mode():
        model.get_submodule(f"model.{SITE}").weight[3] = value


class Planted:
    """More methods of a worker, for collective_rpc."""

    def plant_nan(self: Any) -> None:
        set_weight(self.get_model(), float("nan"))

    def heal(self: Any) -> None:
        set_weight(self.get_model(), 1.0)

    def process(self) -> int:
        return os.getpid()
