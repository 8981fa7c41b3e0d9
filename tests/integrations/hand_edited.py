"""vLLM's model runner for the CPU, edited as msProbe's guide for vLLM says, but for the import."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from msprobe_graph import PrecisionDebugger


class HandEditedRunner(CPUModelRunner):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.debugger = PrecisionDebugger(os.environ["HAND_EDITED_CONFIG"])

    @torch.inference_mode()
    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        self.debugger.start(model=self.model)
        try:
            return super().execute_model(*args, **kwargs)
        finally:
            self.debugger.stop()
            self.debugger.step()


class HandEditedWorker(CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        self.model_runner = HandEditedRunner(self.vllm_config, torch.device("cpu"))
