"""What tests have vLLM's workers do: --worker-extension-cls planted.Planted."""

from __future__ import annotations

import os
import time
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

    def rest_in_steps(self: Any) -> None:
        """From now on, so that the server has time for other calls, too, while a request is running."""
        execute = self.execute_model

        def resting(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.04)
            return execute(*args, **kwargs)

        self.execute_model = resting
