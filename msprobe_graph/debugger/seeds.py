"""One seed for everything that draws random numbers, so that two runs can be compared."""

from __future__ import annotations

import os
import random

import torch

SEED_MAX = 2**32 - 1


def seed_all(seed: int = 1234, mode: bool = False) -> None:
    """Seed Python, NumPy (where it is installed) and torch on every device.

    With `mode`, also ask torch for deterministic algorithms, and the CUDA and communication libraries through
    environment variables, which act on what is initialised after this call. Raises ValueError for a seed outside 0 ..
    2**32 - 1.
    """
    if not 0 <= seed <= SEED_MAX:
        raise ValueError(f"seed_all: seed is {seed}; it must be from 0 to {SEED_MAX}")
    os.environ["PYTHONHASHSEED"] = str(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy
    except ImportError:
        pass
    else:
        numpy.random.seed(seed)
    if mode:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["HCCL_DETERMINISTIC"] = "true"
        os.environ["LCCL_DETERMINISTIC"] = "1"
        torch.use_deterministic_algorithms(True)
