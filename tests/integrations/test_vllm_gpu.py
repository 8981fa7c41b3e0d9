"""vLLM on a GPU: the same tokens, and in CUDA graphs the values that are there without them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from msprobe_graph.analysis.compare import compare
from msprobe_graph.dump.names import parse
from msprobe_graph.dump.reader import StepDump

from .engines import dumped

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

STEPS = 6


class Run(NamedTuple):
    tokens: list[list[int]]
    cudagraphs: str
    """The mode that vLLM used."""
    steps: list[StepDump]
    log: str


Runs = Callable[..., list[Run]]
Asked = tuple[str | None, dict[str, Any] | None]
"""A mode of CUDA graphs (None: eager), and a config (None: without us)."""


@pytest.fixture
def run(tmp_path: Path) -> Runs:
    """run(asked, ..., ranks=1): engines in processes of their own, at once."""

    def run(*asked: Asked, ranks: int = 1) -> list[Run]:
        started = []
        for number, (cudagraphs, config) in enumerate(asked):
            folder = tmp_path / f"engine{number}"
            folder.mkdir()
            given = None if config is None else {"risk_level": "ALL", **config, "dump_path": str(folder / "dump")}
            told = {"cudagraphs": cudagraphs, "config": given, "cache": str(folder), "ranks": ranks}
            command = [sys.executable, str(Path(__file__).with_name("run_on_gpu.py")), json.dumps(told)]
            with (folder / "log").open("w") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        try:
            return [_finished(process, tmp_path / f"engine{number}") for number, process in enumerate(started)]
        finally:
            for process in started:
                process.kill()

    return run


def _finished(process: subprocess.Popen[bytes], folder: Path) -> Run:
    code = process.wait(400)
    log = (folder / "log").read_text(errors="replace")
    assert code == 0, log[-5000:]
    (line,) = (line for line in log.splitlines() if line.startswith("RESULT "))
    dump = folder / "dump"
    assert "; the model goes on" not in log, log[-20000:]  # which is what we say when capture fails
    return Run(**json.loads(line.removeprefix("RESULT ")), steps=dumped(dump) if dump.exists() else [], log=log)


def measured(step: StepDump) -> dict[tuple[str, str], Any]:
    """By entry and position. Of modules alone, as graphs' functions are counted otherwise than eager ones."""
    return {
        (tensor.entry, tensor.position): tensor.record
        for tensor in step.tensors()
        if parse(tensor.entry).kind == "module" and tensor.record["Max"] is not None
    }


@pytest.mark.parametrize(("mode", "level"), [("PIECEWISE", "mix"), ("FULL", "L0"), ("FULL_AND_PIECEWISE", "mix")])
def test_replays_hold_what_is_computed_without_graphs(run: Runs, mode: str, level: str) -> None:
    config = {"task": "statistics", "level": level}
    untapped, plain, replayed = run((mode, None), ("NONE", config), (mode, config))
    assert (plain.cudagraphs, replayed.cudagraphs) == ("NONE", mode)
    assert replayed.tokens == untapped.tokens
    assert len(replayed.steps) == len(plain.steps) == STEPS
    for one, other in zip(plain.steps, replayed.steps, strict=True):
        assert one.manifest is not None
        assert other.manifest is not None
        assert other.manifest["requests"] == one.manifest["requests"]
        # Of functions some are given, or view, memory that nothing was written to yet.
        assert [part.entry for part in compare(one, other, 0.02).parting if parse(part.entry).kind == "module"] == []
        before, after = measured(one), measured(other)
        # In a whole graph nobody calls the root and what is compiled in one.
        assert len(before.keys() & after.keys()) >= 0.9 * len(before)


def test_tensors_that_replays_save(run: Runs) -> None:
    mode, config = "FULL_AND_PIECEWISE", {"task": "tensor", "level": "L0"}
    untapped, plain, replayed = run((mode, None), ("NONE", config), (mode, config))
    assert replayed.tokens == untapped.tokens
    assert len(plain.steps) == STEPS, plain.log[-20000:]
    assert len(replayed.steps) == STEPS, replayed.log[-20000:]
    compared = 0
    for one, other in zip(plain.steps, replayed.steps, strict=True):
        before, after = measured(one), measured(other)
        for key in before.keys() & after.keys():
            names = [record[key].get("data_name") for record in (before, after)]
            if all(names):
                left, right = (
                    torch.load(step.folder / "dump_tensor_data" / str(name), weights_only=True, map_location="cpu")
                    for step, name in zip((one, other), names, strict=True)
                )
                torch.testing.assert_close(right, left, rtol=0.05, atol=0.05)
                compared += 1
    assert compared > 10 * STEPS


def test_an_eager_engine(run: Runs) -> None:
    levels = [{"task": "statistics", "level": level} for level in ("L0", "L1")]
    untapped, *tapped = run((None, None), *((None, config) for config in levels))
    for each in tapped:
        assert each.tokens == untapped.tokens
        assert len(each.steps) == STEPS
        for step in each.steps:
            values = [tensor.record for tensor in step.tensors()]
            assert len(values) > 30
            assert all(record["Max"] is not None or 0 in record["shape"] for record in values)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.parametrize("mode", [None, "FULL_AND_PIECEWISE"])
def test_two_gpus_have_a_directory_each(run: Runs, mode: str | None) -> None:
    config = {"task": "statistics", "level": "L0"}
    untapped, tapped = run((mode, None), (mode, config), ranks=2)
    assert tapped.tokens == untapped.tokens
    both = [step.folder.relative_to(step.folder.parents[1]) for step in tapped.steps]
    assert both == [Path(f"step{number}", rank) for number in range(STEPS) for rank in ("rank0", "rank1")]
    for step in tapped.steps:
        assert step.manifest is not None
        split = {path.rpartition(".")[2] for path in step.manifest["sharding"]}
        assert {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} <= split
        assert len(measured(step)) > 20
