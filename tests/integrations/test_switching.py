"""Capture switched on and off while vLLM serves: by collective_rpc, and by dump_enable in the config file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msprobe_graph.config import watch

from .engines import LONG, PROMPTS, TOKENS, Server, dumped, engine, generate, rows, step_through, until, worker

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, Path]]:
    """An engine whose config file may be edited: the engine, the file, and where it dumps."""
    folder = tmp_path_factory.mktemp("switching")
    config, dump = folder / "config.json", folder / "dump"
    enable(config, True, dump)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "INTERVAL", 0.0)  # the file is looked at in every step
        with engine(tiny_model, additional_config={"dump_config_path": str(config)}) as llm:
            generate(llm)  # so that there is a dump, whichever test comes first
            yield llm, config, dump


def enable(config: Path, on: bool, dump: Path) -> None:
    content = {"task": "statistics", "level": "mix", "dump_path": str(dump), "dump_enable": on}
    partial = config.with_suffix(".new")
    partial.write_text(json.dumps(content))
    partial.replace(config)


def test_by_rpc(served: tuple[Any, Path, Path], untouched: dict[str, Any]) -> None:
    llm, _, dump = served
    first = worker(llm).msprobe_start.__self__._debugger.session.step
    told: list[list[str]] = []
    switch = {
        2: lambda: told.append(llm.collective_rpc("msprobe_stop")),
        4: lambda: told.append(llm.collective_rpc("msprobe_start")),
    }
    hooked = step_through(llm, switch)
    assert hooked == {0: True, 1: True, 2: False, 3: False, 4: True, 5: True}
    assert told == [
        [f"rank 0: capture is off; step {first + 2} comes next"],
        [f"rank 0: capture is on; step {first + 4} comes next"],
    ]
    captured = {int(step.folder.parent.name[4:]): step for step in dumped(dump)}
    assert sorted(number - first for number in captured if number >= first) == [0, 1, 4, 5]
    assert all(step.finished and len(step.data) > 20 for step in captured.values())
    positions = [step.manifest["requests"][0]["positions"] for step in captured.values() if step.manifest][-4:]
    assert positions[2][0] == positions[1][1] + 2, "the steps between were served"
    assert generate(llm) == untouched["tokens"]


def test_by_the_config_file(served: tuple[Any, Path, Path]) -> None:
    llm, config, dump = served
    before = {step.folder for step in dumped(dump)}
    hooked = step_through(llm, {1: lambda: enable(config, False, dump), 5: lambda: enable(config, True, dump)})
    assert hooked == {0: True, 1: False, 2: False, 3: False, 4: False, 5: True}
    new = [step for step in dumped(dump) if step.folder not in before]
    numbers = [int(step.folder.parent.name[4:]) for step in new]
    assert [number - numbers[0] for number in numbers] == [0, 5]
    assert {frozenset(step.data) for step in new[1:]} == {frozenset(new[0].data)}


def test_both_must_be_on(served: tuple[Any, Path, Path]) -> None:
    llm, config, dump = served
    rpc = llm.collective_rpc
    told = []
    hooked = step_through(
        llm,
        {
            1: lambda: (rpc("msprobe_stop"), enable(config, False, dump)),
            2: lambda: told.extend(rpc("msprobe_start")),
            3: lambda: (rpc("msprobe_stop"), enable(config, True, dump)),
            4: lambda: rpc("msprobe_start"),
        },
    )
    assert [number for number, on in hooked.items() if on] == [0, 4, 5]
    assert "capture is on, but by the config (dump_enable, step, rank or a limit) not of step" in told[0]


def test_what_is_edited_within_a_step_counts_from_the_next(served: tuple[Any, Path, Path]) -> None:
    """The last step is at level mix like the first, and has all of its entries."""
    llm, config, dump = served
    before = {step.folder for step in dumped(dump)}
    handle = worker(llm).get_model().model.layers[0].register_forward_pre_hook(lambda *_: enable(config, False, dump))
    try:
        step_through(llm, {}, steps=2)
    finally:
        handle.remove()
    enable(config, True, dump)
    step_through(llm, {}, steps=1)
    whole, then = (step for step in dumped(dump) if step.folder not in before)
    assert int(then.folder.parent.name[4:]) - int(whole.folder.parent.name[4:]) == 2
    assert set(whole.data) == set(then.data)


def test_flush(served: tuple[Any, Path, Path]) -> None:
    llm, _, dump = served
    (told,) = llm.collective_rpc("msprobe_flush")
    assert told.startswith("rank 0: capture is on; step ")
    assert told.endswith(f"what was captured before is in {dump}")
    assert all(step.finished for step in dumped(dump))


def test_flush_of_the_steps_that_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    kept = {"keep_last": 2, "flush_on": ["rpc"]}
    config = {"task": "statistics", "level": "L0", "dump_path": str(tmp_path / "dump"), **kept}
    with engine(tiny_model, additional_config={"dump_config": config}) as llm:
        step_through(llm, {})
        assert not list(tmp_path.glob("dump/step*"))
        (told,) = llm.collective_rpc("msprobe_flush")
        assert told.endswith(f"what was captured before is in {tmp_path / 'dump'}")
        assert [step.folder.parent.name for step in dumped(tmp_path / "dump")] == ["step4", "step5"]


@pytest.mark.slow
def test_while_a_server_answers(tiny_model: Path, tmp_path: Path, untouched: dict[str, Any]) -> None:
    """Over HTTP: vLLM's development mode has an endpoint for collective_rpc."""
    config, dump = tmp_path / "config.json", tmp_path / "dump"
    enable(config, True, dump)
    additional = json.dumps({"dump_config_path": str(config)})
    options = ["--additional-config", additional, "--worker-extension-cls", "planted.Planted"]
    variables = {"PYTHONPATH": str(Path(__file__).parent), "VLLM_SERVER_DEV_MODE": "1"}
    server = Server(tiny_model, tmp_path / "log", *options, **variables)
    try:
        assert server.wait(), server.log.read_text()[-3000:]
        assert [server.complete(*each, "off-none") for each in zip(PROMPTS, TOKENS, strict=True)] == untouched["tokens"]
        long: list[list[int]] = []
        asking = threading.Thread(target=lambda: long.append(server.complete(PROMPTS[0], LONG, "long")))
        server.rpc("rest_in_steps")
        asking.start()
        until(lambda: count(dump, "cmpl-long-0") > 5)
        (stopped,) = server.rpc("msprobe_stop")
        asking.join()
        at_stop = count(dump, "cmpl-long-0")
        assert 5 < at_stop < LONG
        (started,) = server.rpc("msprobe_start")
        assert server.complete(PROMPTS[0], 3, "again") == long[0][:3]
        enable(config, False, dump)
        time.sleep(1.5)  # the server looks at the file once a second
        server.complete(PROMPTS[0], 3, "disabled")
        assert "; what was captured before is in" in server.rpc("msprobe_flush")[0]
    finally:
        server.kill()
    steps = {int(step.folder.parent.name[4:]): list(rows(step)) for step in dumped(dump) if step.finished}
    answered = sum(TOKENS)
    assert f"capture is off; step {answered + at_stop} comes next" in stopped
    assert f"capture is on; step {answered + LONG} comes next" in started
    expected = [*range(answered + at_stop), *range(answered + LONG, answered + LONG + 3)]
    assert sorted(steps) == expected
    assert [steps[number] for number in expected[-3:]] == [["cmpl-again-0"]] * 3


def count(dump: Path, request: str) -> int:
    """Steps of that request on disk."""
    manifests = (json.loads(file.read_bytes()) for file in dump.glob("step*/rank0/manifest.json"))
    return sum(request in {each["request"] for each in manifest["requests"]} for manifest in manifests)
