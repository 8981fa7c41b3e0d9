"""vLLM in graph mode: the same tokens, the same compiled code, and the dump of an eager capture."""

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

pytestmark = pytest.mark.vllm


class Run(NamedTuple):
    tokens: list[list[int]]
    functions: dict[str, int]
    """The functions that Inductor has generated: how often each, by a hash of its source."""
    loaded: bool
    """Whether vLLM took the compiled model from its cache."""
    steps: list[StepDump]


Runner = Callable[..., Run]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run(mode, {config} or None, cache=folder): an engine in a process of its own; each is run once."""
    known: dict[str, Run] = {}

    def run(
        mode: str, config: dict[str, Any] | None, cache: Path | None = None, model: Path = tiny_model, ranks: int = 1
    ) -> Run:
        key = json.dumps([mode, config, str(model), ranks])
        if key in known and cache is None:
            return known[key]
        dump = tmp_path_factory.mktemp("dump") / "dump"
        cache = cache or tmp_path_factory.mktemp("cache")
        given = None if config is None else {"risk_level": "ALL", **config, "dump_path": str(dump)}
        asked = json.dumps({"model": str(model), "mode": mode, "cache": str(cache), "config": given, "ranks": ranks})
        command = [sys.executable, str(Path(__file__).with_name("run_compiled.py")), asked]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
        (line,) = (line for line in output.splitlines() if line.startswith("RESULT "))
        result = json.loads(line.removeprefix("RESULT "))
        known[key] = Run(**result, steps=dumped(dump) if config is not None else [])
        return known[key]

    return run


STATISTICS = {"task": "statistics", "level": "mix"}
MODULES = {"task": "statistics", "level": "L0"}


def modules(step: StepDump) -> list[str]:
    return [entry for entry in step.data if parse(entry).kind == "module"]


def values(step: StepDump) -> dict[tuple[str, str], Any]:
    return {(tensor.entry, tensor.position): tensor.record for tensor in step.tensors()}


@pytest.mark.parametrize("mode", ["2", "3", "2-eager", "3-eager"])
def test_a_compiled_run_has_the_modules_of_an_eager_one(run: Runner, mode: str) -> None:
    eager, compiled = run("eager", STATISTICS), run(mode, STATISTICS)
    assert compiled.tokens == eager.tokens
    assert len(compiled.steps) == len(eager.steps) == 5
    for one, other in zip(eager.steps, compiled.steps, strict=True):
        assert modules(other) == modules(one)
        assert one.manifest is not None
        assert other.manifest is not None
        assert other.manifest["requests"] == one.manifest["requests"]
        assert other.manifest["mode"] == "graph"


@pytest.mark.parametrize("mode", ["2", "3", "2-eager", "3-eager"])
def test_what_a_compiled_run_holds_is_what_an_eager_one_does(run: Runner, mode: str) -> None:
    for one, other in zip(run("eager", STATISTICS).steps, run(mode, STATISTICS).steps, strict=True):
        found = compare(one, other, 1e-4)
        assert [entry.entry for entry in found.parting if parse(entry.entry).kind == "module"] == []
        before, after = values(one), values(other)
        ours = [key for key in before if parse(key[0]).kind == "module" and before[key]["Max"] is not None]
        there = [key for key in ours if after[key]["Max"] is not None]
        assert len(there) >= (0.95 if "eager" in mode else 0.75) * len(ours)
        assert other.manifest is not None
        holes = {hole["site"] for hole in other.manifest["holes"]}
        missing = {key for key in ours if after[key]["Max"] is None}
        assert all(any(entry.startswith(hole) or hole.startswith(entry) for hole in holes) for entry, _ in missing)


def test_memory_that_attention_is_to_write_is_no_value_before(run: Runner) -> None:
    step = run("3", STATISTICS).steps[0]
    given = [
        tensor.record
        for tensor in step.tensors()
        if tensor.entry.startswith("vllm.unified_attention_with_output.") and tensor.position == "input_args.3"
    ]
    assert len(given) == 2
    for record in given:
        assert (record["Max"], record["reason"]) == (None, "memory that nothing was written to yet")


@pytest.mark.parametrize("mode", ["2", "3"])
def test_inductor_generates_for_it_what_it_generates_without(run: Runner, mode: str) -> None:
    untapped, tapped = run(mode, None), run(mode, STATISTICS)
    assert sum(untapped.functions.values()) >= 4
    assert tapped.functions == untapped.functions
    assert tapped.tokens == untapped.tokens


def test_functions_join_by_module_and_number_where_both_have_them(run: Runner) -> None:
    """vLLM runs custom operators eagerly and plain ones under Inductor, so that call numbers differ."""

    def sites(step: StepDump) -> set[tuple[str, str, int]]:
        names = ((parse(entry), step.data[entry].get("site")) for entry in step.data)
        return {(name.name, site["module"], site["number"]) for name, site in names if name.kind == "api" and site}

    eager, compiled = run("eager", STATISTICS).steps[0], run("2", STATISTICS).steps[0]
    assert len(sites(eager) & sites(compiled)) >= 50


def test_each_start_finds_its_own_in_the_cache(run: Runner, tmp_path: Path) -> None:
    cold = run("3", MODULES, tmp_path)
    warm = run("3", MODULES, tmp_path)
    other = run("3", {**MODULES, "statistics": {"list": ["mlp"]}}, tmp_path)
    without = run("3", None, tmp_path)
    assert (cold.loaded, warm.loaded, other.loaded, without.loaded) == (False, True, False, False)
    assert cold.tokens == warm.tokens == other.tokens == without.tokens
    for one, two in zip(cold.steps, warm.steps, strict=True):
        assert list(one.data) == list(two.data)
        assert compare(one, two, 0.0).parting == []
        assert one.manifest is not None
        assert two.manifest is not None
        assert one.manifest["holes"] == two.manifest["holes"]
    assert {"mlp" in entry for entry in other.steps[0].data} == {True}
    assert without.functions == run("3", None).functions


@pytest.mark.parametrize("tiny_model", ["llama", "opt"], indirect=True)
def test_tensors_are_saved_as_an_eager_run_saves_them(run: Runner, tiny_model: Path) -> None:
    config = {"task": "tensor", "level": "L0"}
    eager, compiled = run("eager", config), run("2", config)
    assert compiled.tokens == eager.tokens
    compared = 0
    for one, other in zip(eager.steps, compiled.steps, strict=True):
        before, after = values(one), values(other)
        for key, record in after.items():
            if record.get("data_name"):
                left = torch.load(one.folder / "dump_tensor_data" / before[key]["data_name"], weights_only=True)
                right = torch.load(other.folder / "dump_tensor_data" / record["data_name"], weights_only=True)
                torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared > 200


def test_shared_sites_tell_how_they_are_shared(run: Runner) -> None:
    """The pieces of both ranks have the size, and the extremes, of the whole value of a single one."""
    whole, shared = run("eager", STATISTICS), run("3-eager", MODULES, ranks=2)
    assert whole.steps[0].manifest is not None
    assert whole.steps[0].manifest["sharding"] == {}
    one, *ranks = whole.steps[0], *shared.steps[:2]
    told = [step.manifest["sharding"] for step in ranks if step.manifest is not None]
    assert told[0] == told[1]
    records = [
        {(site(step, each.entry), each.position): each.record for each in step.tensors()} for step in (one, *ranks)
    ]
    seen = set()
    for path, places in told[0].items():
        for position, split in places.items():
            single, *pieces = (found.get((path, position)) for found in records)
            if single is None or any(piece is None or piece["Max"] is None for piece in pieces):
                continue
            seen.add((path.rpartition(".")[2], position))
            for piece in pieces:
                assert piece["shape"][split["dim"]] == sum(split["sizes"])
                assert 2 * piece["shape"][split["dim"]] == single["shape"][split["dim"]]
            assert max(piece["Max"] for piece in pieces) == pytest.approx(single["Max"], rel=1e-4)
            assert min(piece["Min"] for piece in pieces) == pytest.approx(single["Min"], rel=1e-4)
    assert {("qkv_proj", "output.0"), ("o_proj", "input_args.0")} <= seen


def site(step: StepDump, entry: str) -> str | None:
    """The module that an entry is of; None for a function's."""
    parts = parse(entry)
    return step.data[entry]["site"]["module"] if parts.kind == "module" else None


def test_each_rank_has_the_modules_of_an_eager_one(run: Runner) -> None:
    """In pieces, which Inductor would compile slowly in each; test_service has two ranks in mode 2 with Inductor."""
    eager, compiled = run("eager", STATISTICS), run("3-eager", MODULES, ranks=2)
    assert compiled.tokens == eager.tokens
    both = [step.folder.relative_to(step.folder.parents[1]) for step in compiled.steps]
    assert both == [Path(f"step{number}", rank) for number in range(5) for rank in ("rank0", "rank1")]
    for one, *ranks in zip(eager.steps, compiled.steps[::2], compiled.steps[1::2], strict=True):
        assert one.manifest is not None
        for step in ranks:
            assert list(step.data) == modules(one)
            assert step.manifest is not None
            assert (step.manifest["mode"], step.manifest["requests"]) == ("graph", one.manifest["requests"])
            assert {hole["site"] for hole in step.manifest["holes"]}.isdisjoint(step.data)
