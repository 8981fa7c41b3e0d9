"""AclGraphDumper: one start, a step after each run, and runs that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msprobe_graph import AclGraphDumper
from msprobe_graph.config import ConfigError
from msprobe_graph.dump.records import Request

from .conftest import ENTRIES, Dumped, NewDebugger


class Wrapper:
    """As vLLM wraps a model that is replayed: no nn.Module, but what it wraps can be asked for."""

    def __init__(self, runnable: nn.Module) -> None:
        self._runnable = runnable

    def unwrap(self) -> nn.Module:
        return self._runnable


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(**settings: Any) -> str:
        file = tmp_path / "config.json"
        where = {"dump_path": str(tmp_path / "dump"), "level": "L0", "risk_level": "ALL"}
        file.write_text(json.dumps({**where, **settings}))
        return str(file)

    return write


@pytest.fixture
def dumpers() -> Iterator[list[AclGraphDumper]]:
    made: list[AclGraphDumper] = []
    yield made
    for dumper in made:
        dumper._debugger.stop()


def test_a_step_is_on_disk_when_step_returns(
    config: Any, model: nn.Module, dumped: Dumped, dumpers: list[AclGraphDumper]
) -> None:
    dumper = AclGraphDumper(config())
    dumpers.append(dumper)
    dumper.step()  # before it was started: nothing
    dumper.start(Wrapper(model))
    for number in range(3):
        model(torch.full((2, 4), float(number)))
        dumper.step()
        assert list(dumped()) == list(range(number + 1))
        assert dumped()[number].finished
    for number, step in dumped().items():
        assert list(step.data) == ENTRIES
        assert next(step.tensors()).record["Max"] == number


@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_a_dummy_run_is_no_step(
    config: Any, model: nn.Module, dumped: Dumped, dumpers: list[AclGraphDumper], task: str
) -> None:
    dumper = AclGraphDumper(config(task=task))
    dumpers.append(dumper)
    dumper.start(model)
    for number in range(2):
        for _ in range(3):
            model(torch.full((7, 4), 99.0))
        dumper.step(dump=False)
        assert list(dumped()) == list(range(number))
        model(torch.full((2, 4), float(number)))
        dumper.step()
    for number, step in dumped().items():
        assert list(step.data) == ENTRIES
        assert next(step.tensors()).record["Max"] == number
        assert step.data[ENTRIES[0]]["parameters"]["weight"]["Max"] == model[0].weight.max().item()
        files = {file.name for file in step.folder.glob("dump_tensor_data/*")}
        assert files == {tensor.record["data_name"] for tensor in step.tensors() if "data_name" in tensor.record}


def test_dump_enable_switches_it_on_later(
    config: Any,
    model: nn.Module,
    dumped: Dumped,
    dumpers: list[AclGraphDumper],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("msprobe_graph.config.watch.INTERVAL", 0)
    dumper = AclGraphDumper(config(dump_enable=False))
    dumpers.append(dumper)
    dumper.start(model)
    model(torch.ones(2, 4))
    dumper.step()
    config(dump_enable=True)
    dumper.step()
    model(torch.ones(2, 4))
    dumper.step()
    assert list(dumped()) == [2]


def test_a_dummy_run_in_a_ring(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(task="tensor", keep_last=2, flush_on=["rpc"])
    for rows, dump in ((3, True), (5, False), (2, True)):
        debugger.start(model)
        model(torch.ones(rows, 4))
        debugger.stop()
        debugger.step(dump=dump)
    debugger.flush_kept()
    assert {number: next(step.tensors()).record["shape"] for number, step in dumped().items()} == {0: [3, 4], 1: [2, 4]}
    for step in dumped().values():
        assert all(tensor.record.get("data_name") is None or step.load(tensor).numel() for tensor in step.tensors())


def test_a_step_that_begins_with_its_batch(
    config: Any, model: nn.Module, dumped: Dumped, dumpers: list[AclGraphDumper]
) -> None:
    """Nothing around it is captured, and its padding isn't."""
    dumper = AclGraphDumper(config())
    dumpers.append(dumper)
    dumper.awaits_batches = True
    dumper.start(Wrapper(model))
    for number in range(2):
        model(torch.full((7, 4), 99.0))  # warm-up
        dumper.step(dump=False)
        model(torch.full((7, 4), 99.0))
        dumper.begin(model, [Request("a", 0, 2)], 3)
        model(torch.tensor([[float(number)] * 4] * 2 + [[99.0] * 4]))
        dumper.step()
    assert list(dumped()) == [0, 1]
    for number, step in dumped().items():
        assert list(step.data) == ENTRIES
        first = next(step.tensors()).record
        assert (first["Max"], first["shape"]) == (number, [2, 4])
        assert step.manifest is not None
        assert [request["request"] for request in step.manifest["requests"]] == ["a"]


def test_a_wrong_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dump_path"):
        AclGraphDumper()
