"""What PrecisionDebugger and its start() take, and the one sentence for what they don't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.config import ConfigError

from .conftest import Dumped, NewDebugger, forward


def test_list_of_models(new_debugger: NewDebugger, dumped: Dumped) -> None:
    models = [nn.Linear(4, 4), nn.Sequential(nn.ReLU())]
    debugger = new_debugger()
    debugger.start(models)
    models[1](models[0](torch.ones(1, 4)))
    debugger.stop()
    debugger.step()
    debugger.flush()
    assert list(dumped()[0].data) == [
        "Module.0.Linear.forward.0",
        "Module.1.0.ReLU.forward.0",
        "Module.1.Sequential.forward.0",
    ]


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({}, r"start\(\) needs the model at level L0: start\(model\) or start\(\[model, ...\]\)"),
        ({"model": []}, r"start\(\) needs the model at level L0"),
        ({"model": 3}, r"start\(\) got a int as model; it takes an nn.Module or a list of them"),
        ({"model": "model"}, r"start\(\) got a str as model"),
        ({"model": [nn.ReLU(), None]}, r"start\(\) got a NoneType as model"),
        ({"model": nn.ReLU(), "token_range": [1]}, r"token_range \[1\]; it takes two numbers, \[first, last\]"),
        ({"model": nn.ReLU(), "token_range": [3, 1]}, r"token_range \[3, 1\]; it takes"),
        ({"model": nn.ReLU(), "token_range": 3}, r"token_range 3; it takes"),
        ({"model": nn.ReLU(), "token_range": ["a", "b"]}, r"token_range \['a', 'b'\]; it takes"),
    ],
)
def test_wrong_arguments_of_start(new_debugger: NewDebugger, dumped: Dumped, start: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said) as raised:
        new_debugger().start(**start)
    assert "\n" not in str(raised.value)
    assert dumped() == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "dump_path is missing"),
        (
            {"config_path": {"dump_path": "d", "levle": "L0"}},
            'unknown key "levle" in the top level, did you mean level',
        ),
        ({"config_path": "nowhere.json"}, "nowhere.json: the config file cannot be read"),
        ({"config_path": {"dump_path": "d"}, "level": "L9"}, 'level is "L9"; it must be one of'),
        ({"dump_path": "d", "step": ["x"]}, r"step is \[\"x\"\]; it must be"),
        ({"config_path": {"dump_path": "d", "operators": {"remove": ["Tensor.mull"]}}}, "did you mean 'Tensor.mul'"),
    ],
)
def test_wrong_arguments_of_the_constructor(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        PrecisionDebugger(**arguments)
    assert "\n" not in str(raised.value)


def test_arguments_override_the_file(tmp_path: Path, model: nn.Module, dumped: Dumped) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"dump_path": str(tmp_path / "other"), "level": "L1", "task": "statistics"}))
    debugger = PrecisionDebugger(config, task="tensor", dump_path=str(tmp_path / "dump"), level="L0", step=[0])
    forward(debugger, model)
    debugger.flush()
    assert (dumped()[0].task, dumped()[0].level) == ("tensor", "L0")
    assert not (tmp_path / "other").exists()
