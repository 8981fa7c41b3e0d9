"""What several tests of the configuration need: settings and their errors, an operator table, two custom operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msprobe_graph.config import ConfigError, Settings, load_settings
from msprobe_graph.config.operators import OperatorTable

ALL = frozenset({"forward", "backward", "input", "output"})


def load(**given: Any) -> Settings:
    return load_settings({"dump_path": "dump", **given})


def error(source: Any, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(source, **arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def written(folder: Path, text: str, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def table() -> OperatorTable:
    return OperatorTable()


@torch.library.custom_op("msprobe_graph_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("msprobe_graph_test::double_", mutates_args=("x",))
def double_(x: torch.Tensor) -> None:
    x.mul_(2)
