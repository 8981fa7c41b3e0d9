"""seed_all: the same numbers again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from msprobe_graph import seed_all

VARIABLES = ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "HCCL_DETERMINISTIC", "LCCL_DETERMINISTIC")


@pytest.fixture(autouse=True)
def _undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    yield
    torch.use_deterministic_algorithms(False)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_the_same_seed_gives_the_same_numbers() -> None:
    seed_all(7)
    first = draw()
    assert draw() != first
    seed_all(7)
    assert draw() == first
    seed_all(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    assert os.environ["PYTHONHASHSEED"] == "8"


def test_mode_asks_for_deterministic_algorithms() -> None:
    seed_all(0)
    assert not torch.are_deterministic_algorithms_enabled()
    seed_all(0, mode=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["HCCL_DETERMINISTIC"] == "true"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_wrong_seed_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}; it must be from 0 to 4294967295"):
        seed_all(seed)
