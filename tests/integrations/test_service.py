"""A compiled vLLM that goes on serving: capture switched on and off, the steps before a NaN, a thousand steps."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch._dynamo.utils import counters

from msprobe_graph.config import watch
from msprobe_graph.dump.reader import DumpError, StepDump
from msprobe_graph.graph.generated import generated_code

from .engines import LONG, PROMPTS, TOKENS, Server, dumped, engine, generate, rows, step_through, until, worker
from .planted import SITE, set_weight

pytestmark = pytest.mark.vllm
NORM = f"Module.model.{SITE}.RMSNorm.forward.0"
KEPT = 4


class Service(NamedTuple):
    llm: Any
    config: Path
    dump: Path

    @property
    def step(self) -> int:
        """The step that comes next."""
        return next_step(self.llm.collective_rpc("msprobe_start"))

    def flush(self) -> None:
        self.llm.collective_rpc("msprobe_flush")

    def written(self) -> dict[int, StepDump]:
        """The steps on disk, by number."""
        return {step_number(step): step for step in (dumped(self.dump) if any(self.dump.glob("step*")) else [])}


def enable(config: Path, on: bool, dump: Path) -> None:
    content = {"level": "L0", "dump_path": str(dump), "keep_last": KEPT, "flush_on": ["nan", "rpc"], "dump_enable": on}
    partial = config.with_suffix(".new")
    partial.write_text(json.dumps(content))
    partial.replace(config)


@pytest.fixture(scope="module")
def eager_names(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The entries of an eager step."""
    dump = tmp_path_factory.mktemp("eager") / "dump"
    with engine(tiny_model, additional_config={"dump_config": {"level": "L0", "dump_path": str(dump)}}) as llm:
        generate(llm, PROMPTS[:1], [1])
    (step,) = dumped(dump)
    return list(step.data)


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, eager_names: list[str]) -> Iterator[Service]:
    """Mode 2, with Inductor. What one test leaves in the ring the next one has written first.

    (A process has one engine at a time, so the eager one is over.)
    """
    folder = tmp_path_factory.mktemp("service")
    config, dump = folder / "config.json", folder / "dump"
    enable(config, True, dump)
    options = {"enforce_eager": False, "compilation_config": {"mode": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "INTERVAL", 0.0)  # the file is looked at in every step
        with engine(tiny_model, additional_config={"dump_config_path": str(config)}, **options) as llm:
            yield Service(llm, config, dump)


@pytest.fixture
def _nothing_is_compiled(service: Service) -> Iterator[None]:
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    with generated_code() as code:
        yield
    assert counters["stats"]["unique_graphs"] == before
    assert code == []


def by_rpc(service: Service) -> dict[int, Callable[[], object]]:
    rpc = service.llm.collective_rpc
    return {2: lambda: rpc("msprobe_stop"), 4: lambda: rpc("msprobe_start")}


def by_the_file(service: Service) -> dict[int, Callable[[], object]]:
    _, config, dump = service
    return {2: lambda: enable(config, False, dump), 4: lambda: enable(config, True, dump)}


@pytest.mark.usefixtures("_nothing_is_compiled")
@pytest.mark.parametrize("switch", [by_rpc, by_the_file])
def test_switching_compiles_nothing(
    service: Service, eager_names: list[str], untouched: dict[str, Any], switch: Callable[[Service], Any]
) -> None:
    service.flush()
    first, before = service.step, set(service.written())
    hooked = step_through(service.llm, switch(service))
    assert list(hooked.values()) == [True, True, False, False, True, True]
    assert set(service.written()) == before
    service.flush()
    captured = {number: step for number, step in service.written().items() if number not in before}
    assert sorted(captured) == [first + number for number in (0, 1, 4, 5)]
    for number, step in captured.items():
        assert list(step.data) == eager_names
        assert step.manifest is not None
        (request,) = step.manifest["requests"]
        made = number - first  # of the prompt's tokens, all but the last came before the first one that was made
        assert made == 0 or request["positions"][0] == length_of(captured[first]) + made - 1
    assert generate(service.llm) == untouched["tokens"]
    service.llm.collective_rpc("msprobe_stop")
    assert generate(service.llm) == untouched["tokens"]
    service.llm.collective_rpc("msprobe_start")


def length_of(step: StepDump) -> int:
    (length,) = (each.stop - each.start for each in rows(step).values())
    return length


@pytest.mark.usefixtures("_nothing_is_compiled")
def test_a_nan_planted_in_a_compiled_layer(
    service: Service, eager_names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    service.flush()
    first, before = service.step, set(service.written())
    model = worker(service.llm).get_model()
    try:
        step_through(service.llm, {7: lambda: set_weight(model, float("nan"))}, steps=10)
    finally:
        set_weight(model, 1.0)
    steps = {number: step for number, step in service.written().items() if number not in before}
    assert sorted(steps) == [first + number for number in (4, 5, 6, 7)]
    assert_named_as_the_first(list(steps.values()), first + 7)
    assert all(list(step.data) == eager_names for step in steps.values())
    (said,) = (record.getMessage() for record in caplog.records if "has a NaN" in record.getMessage())
    assert said.startswith(f"step {first + 7} has a NaN, first in {NORM} output.0 (requests: ")


def assert_named_as_the_first(steps: list[StepDump], number: int) -> None:
    """In each of these steps, the last of which has the NaN."""
    for step in steps:
        assert step.finished
        assert step.manifest is not None
        told = step.manifest["flushed"]
        assert (told["on"], told["step"], told["entry"], told["position"]) == ("nan", number, NORM, "output.0")
        assert told["requests"] == list(rows(steps[-1]))
    bad = [[each.entry for each in step.tensors() if each.record.get("nan_count")] for step in steps]
    assert not any(bad[:-1])
    assert bad[-1][0] == NORM


@pytest.mark.slow
def test_a_thousand_steps(service: Service) -> None:
    """Memory and the time of a step stay what they are, and each step is counted."""
    from vllm import SamplingParams

    serving, count = service.llm.llm_engine, 1000
    service.flush()
    first, before = service.step, set(service.written())
    lengths = itertools.cycle([30, 170, 90, 240, 55])
    running, times, memory = 0, [], []
    for number in range(count):
        while serving.get_num_unfinished_requests() < 4:
            params = SamplingParams(temperature=0, max_tokens=next(lengths), ignore_eos=True)
            serving.add_request(f"soak{number}-{running}", PROMPTS[running % len(PROMPTS)][:8], params)
            running += 1
        begin = time.perf_counter()
        serving.step()
        times.append(time.perf_counter() - begin)
        if number == 100:  # what compilation has left unused could hide what grows
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        if number >= 100:
            memory.append(resident())
    serving.abort_request(list(serving.output_processor.request_states))
    service.flush()
    assert sorted(set(service.written()) - before) == [first + number for number in range(count - KEPT, count)]
    assert max(memory) - memory[0] < 50 * 2**20
    early, late = (statistics.quantiles(part, n=10)[0] for part in (times[100:300], times[-200:]))  # less what disturbs
    assert late < 1.5 * early


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_two_compiled_workers_of_their_own(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    untouched: dict[str, Any],
    eager_names: list[str],
) -> None:
    """`vllm serve`, half of each layer in each worker; all that has kept steps written, one after another."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    config, dump = tmp_path / "config.json", tmp_path / "dump"
    content = {"level": "L0", "dump_path": str(dump), "keep_last": 3, "statistics": {"request_id": "cmpl-mine"}}
    config.write_text(json.dumps({**content, "flush_on": ["nan", "request", "signal", "rpc"]}))
    options = ["--additional-config", json.dumps({"dump_config_path": str(config)}), "--tensor-parallel-size", "2"]
    options += ["--worker-extension-cls", "planted.Planted"]
    variables = {"PYTHONPATH": str(Path(__file__).parent), "VLLM_SERVER_DEV_MODE": "1"}
    server = Server(tiny_model, tmp_path / "log", *options, eager=False, **variables)
    answers: list[list[int]] = []
    long = threading.Thread(target=lambda: answers.append(server.complete(PROMPTS[0], LONG, "mine")))

    def go_on() -> None:
        """Until the ring has been filled anew."""
        following = next_step(server.rpc("msprobe_start"))
        until(lambda: next_step(server.rpc("msprobe_start")) > following + 5)

    try:
        assert server.wait(300), server.log.read_text()[-3000:]
        first = 0
        for prompt, count, expected in zip(PROMPTS, TOKENS, untouched["tokens"], strict=True):
            assert server.complete(prompt, count, "mine") == expected
            first += count
            until(lambda: all(max(numbers, default=-1) == first - 1 for numbers in by_rank(dump)), 10)  # noqa: B023
        assert [list(numbers) for numbers in by_rank(dump)] == [[0, 1, 4, 5, 6, 9, 10, 11]] * 2
        server.rpc("rest_in_steps")
        long.start()
        go_on()
        for process in server.rpc("process"):
            os.kill(int(process), signal.SIGUSR1)
        go_on()
        server.rpc("msprobe_flush")
        go_on()
        server.rpc("plant_nan")
        long.join()
        until(lambda: all(max(numbers) == first + LONG - 1 for numbers in by_rank(dump)), 10)
    finally:
        server.kill()
    assert [len(answer) for answer in answers] == [LONG]
    for found in by_rank(dump):
        assert all(list(step.data) == eager_names for step in found.values())
        assert {step.manifest["mode"] for step in found.values() if step.manifest} == {"graph"}
        written = {on: dict(each) for on, each in itertools.groupby(list(found.items())[8:], key=fired)}
        assert list(written) == ["signal", "rpc", "nan", "request"]
        for on, steps in written.items():
            assert list(steps) == list(range(min(steps), max(steps) + 1))
            assert len(steps) in ((3, 4) if on == "signal" else (3,))  # with the step that ran, if one did
        assert_named_as_the_first(list(written["nan"].values()), max(written["nan"]))
        assert rows(written["nan"][max(written["nan"])]).keys() == {"cmpl-mine-0"}


def next_step(told: list[str]) -> int:
    """Of what msprobe_start has answered."""
    return int(told[0].rpartition("step ")[2].split()[0])


def by_rank(dump: Path) -> list[dict[int, StepDump]]:
    """The finished steps of rank 0 and of rank 1, by number."""
    found: list[dict[int, StepDump]] = [{}, {}]
    try:
        there = dumped(dump)
    except DumpError:  # none yet
        there = []
    for step in there:
        if step.finished:
            found[int(step.folder.name.removeprefix("rank"))][step_number(step)] = step
    return found


def fired(numbered: tuple[int, StepDump]) -> str:
    """What has had the step written."""
    manifest = numbered[1].manifest
    assert manifest is not None
    on: str = manifest["flushed"]["on"]
    return on


def step_number(step: StepDump) -> int:
    return int(step.folder.parent.name.removeprefix("step"))
