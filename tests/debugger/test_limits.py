"""What a PrecisionDebugger leaves out: other steps, ranks, tokens, requests and rows, and all beyond a maximum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from msprobe_graph import PrecisionDebugger
from msprobe_graph.config import watch

from .conftest import ENTRIES, Dumped, NewDebugger, forward, hooks


def test_step_list(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(step=[1, "3-4"])
    hooked = []
    for _ in range(7):
        debugger.start(model)
        hooked.append(hooks(model) > 0)
        model(torch.ones(1, 4))
        debugger.stop()
        debugger.step()
    debugger.flush()
    assert list(dumped()) == [1, 3, 4]
    assert hooked == [False, True, False, True, True, False, False]  # disabled means gone


@pytest.mark.parametrize(("rank_id", "captured"), [(0, False), (2, True), (None, False)])
def test_rank_list(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, rank_id: int | None, captured: bool
) -> None:
    debugger = new_debugger(rank=["2-3"])
    forward(debugger, model, rank_id=rank_id)
    debugger.flush()
    found = dumped()
    assert bool(found) is captured
    if captured:
        assert found[0].folder.name == "rank2"


@pytest.mark.parametrize("level", ["L0", "L1"])
def test_token_range(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, level: str) -> None:
    debugger = new_debugger(level=level)
    for _ in range(2):
        debugger.start(model, token_range=[1, 2])
        torch.ones(3).exp()  # outside any forward
        for token in range(5):
            model(torch.full((1, 4), float(token)))
        debugger.stop()
        debugger.step()
    forward(debugger, model)  # and without it all is captured again
    debugger.flush()
    for step in (0, 1):
        seen = [
            t.record["Max"] for t in dumped()[step].tensors() if "inear" in t.entry and t.position == "input_args.0"
        ]
        assert seen == [1.0, 2.0]
        assert not any("exp" in entry for entry in dumped()[step].data)
    assert len(dumped()[2].data) == (3 if level == "L0" else 2)


def test_requests_are_named_with_their_rows(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger()
    forward(debugger, model, torch.ones(5, 4), scheduled_tokens={"a": 2, "b": 3})
    forward(debugger, model, torch.ones(1, 4), scheduled_tokens={"b": 1})
    debugger.flush()
    told = [dumped()[step].manifest for step in (0, 1)]
    assert told[0] is not None
    assert told[1] is not None
    assert told[0]["requests"] == [
        {"request": "a", "begin": 0, "end": 2},
        {"request": "b", "begin": 2, "end": 5},
    ]
    assert told[1]["requests"] == [{"request": "b", "begin": 0, "end": 1}]


def test_request_id_keeps_one_requests_rows(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(task="tensor", tensor={"request_id": "b"})
    rows = torch.arange(5.0)[:, None].expand(5, 4).contiguous()
    forward(debugger, model, rows, scheduled_tokens={"a": 2, "b-7f": 2, "c": 1})
    forward(debugger, model, rows, scheduled_tokens={"a": 5})  # not in the batch
    forward(debugger, model, rows, scheduled_tokens={"c": 1, "b": 4})
    debugger.flush()
    found = dumped()
    assert list(found) == [0, 2]
    for step, expected in ((0, rows[2:4]), (2, rows[1:5])):
        first = next(found[step].tensors())
        assert first.record["shape"] == list(expected.shape)
        assert torch.equal(found[step].load(first), expected)
        weight = next(tensor for tensor in found[step].tensors() if tensor.position == "parameters.weight")
        assert weight.record["shape"] == [4, 4]  # no batch: whole


def test_slice(new_debugger: NewDebugger, model: nn.Module, dumped: Dumped) -> None:
    debugger = new_debugger(statistics={"slice": [{"dim": 0, "begin": 1, "end": 3, "size": 8}]})
    forward(debugger, model, torch.arange(8.0)[:, None].expand(8, 4))
    debugger.flush()
    first, *_, last = dumped()[0].tensors()
    assert (first.record["shape"], first.record["Min"], first.record["Max"]) == ([2, 4], 1.0, 2.0)
    assert last.record["shape"] == [2, 4]


def test_max_steps(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, caplog: pytest.LogCaptureFixture
) -> None:
    debugger = new_debugger(max_steps=2, step=["1-9"])
    for _ in range(5):
        forward(debugger, model)
    debugger.flush()
    assert list(dumped()) == [1, 2]
    assert hooks(model) == 0
    assert sum("max_steps (2) is reached" in record.getMessage() for record in caplog.records) == 1
    told = {number: step.manifest for number, step in dumped().items()}
    assert told[1] is not None
    assert told[2] is not None
    assert told[1]["holes"] == []
    assert told[2]["holes"] == [{"site": "later steps", "reason": "max_steps (2) is reached"}]


@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_max_bytes(
    new_debugger: NewDebugger, model: nn.Module, dumped: Dumped, caplog: pytest.LogCaptureFixture, task: str
) -> None:
    debugger = new_debugger(max_bytes="20kB", task=task)
    for _ in range(50):
        forward(debugger, model)
        debugger.flush()
    found = dumped()
    assert 1 <= len(found) < 20
    assert all(step.finished for step in found.values())
    assert sum("max_bytes (20000) is reached" in record.getMessage() for record in caplog.records) == 1
    ended = {"site": "later steps", "reason": "max_bytes (20000) is reached"}
    saying = [number for number, step in found.items() if step.manifest is not None and ended in step.manifest["holes"]]
    assert saying == [max(found)]
    # A tensor that is not on disk has no data_name, and a hole.
    names = [tensor.record["data_name"] for tensor in found[max(found)].tensors() if "data_name" in tensor.record]
    assert all((found[max(found)].folder / "dump_tensor_data" / name).exists() for name in names)


def test_dump_enable_switches_a_running_program(
    tmp_path: Path, model: nn.Module, dumped: Dumped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0)
    config = tmp_path / "config.json"
    settings = {"dump_path": str(tmp_path / "dump"), "level": "L0"}

    def switch(on: bool) -> None:
        config.write_text(json.dumps({**settings, "dump_enable": on}) + " " * on)

    switch(False)
    debugger = PrecisionDebugger(config)
    for on in (False, True, True, False, True):
        switch(on)
        forward(debugger, model)
        assert bool(hooks(model)) is on
    debugger.flush()
    assert list(dumped()) == [1, 2, 4]
    assert all(list(step.data) == ENTRIES for step in dumped().values())
