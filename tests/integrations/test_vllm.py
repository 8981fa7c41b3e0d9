"""The plugin in real vLLM on the CPU: what a dump holds, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from msprobe_graph.config import ConfigError
from msprobe_graph.dump.names import parse
from msprobe_graph.dump.reader import StepDump, TensorAt
from msprobe_graph.integrations.vllm import requested

from .engines import PROMPTS, TOKENS, Server, dumped, engine, generate, rows, step_through, worker

pytestmark = pytest.mark.vllm
STEPS = max(TOKENS)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Captured(NamedTuple):
    level: str
    task: str
    tokens: list[list[int]]
    ran: list[list[str]]
    """By step, the modules that called the test's own hooks."""
    steps: list[StepDump]
    """The first STEPS are of PROMPTS together; then each of PROMPTS alone."""
    dump: Path


@pytest.fixture(
    scope="module", params=["L0-statistics", "L0-tensor", "L1-statistics", "L1-tensor", "mix-statistics", "mix-tensor"]
)
def captured(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    level, task = request.param.split("-")
    dump = tmp_path_factory.mktemp("capture") / "dump"
    config = {"task": task, "level": level, "dump_path": str(dump), "risk_level": "ALL"}
    ran: list[list[str]] = []
    with engine(tiny_model, additional_config={"dump_config": config}) as llm:
        model = worker(llm).get_model()
        model.register_forward_pre_hook(lambda *_: ran.append([]))
        for name, module in model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: ran[-1].append(name))
        tokens = generate(llm)
        worker(llm).execute_dummy_batch()  # as data-parallel vLLM does where a rank has nothing to do
        del ran[STEPS:]  # that run, which is no step
        for prompt, count in zip(PROMPTS, TOKENS, strict=True):
            assert generate(llm, [prompt], [count]) == [tokens[PROMPTS.index(prompt)]]
    return Captured(level, task, tokens, ran, dumped(dump), dump)


def entries(step: StepDump, path: str) -> list[str]:
    """The forward entries of the module at `path`."""
    names = ((name, parse(name)) for name in step.data)
    return [name for name, parts in names if (parts.kind, parts.name, parts.direction) == ("module", path, "forward")]


def outputs(step: StepDump, entry: str) -> list[TensorAt]:
    return [tensor for tensor in step.tensors() if tensor.entry == entry and tensor.position.startswith("output")]


def test_tokens_are_those_without_capture(captured: Captured, untouched: dict[str, Any]) -> None:
    assert captured.tokens == untouched["tokens"]


def test_each_token_has_its_step_and_nothing_else_has(captured: Captured) -> None:
    steps = captured.steps
    assert [step.folder.parent.name for step in steps] == [f"step{number}" for number in range(STEPS + sum(TOKENS))]
    assert {step.folder.name for step in steps} == {"rank0"}
    assert all(step.finished and step.manifest and step.manifest["entries"] for step in steps)
    for request, count in enumerate(TOKENS):
        assert sum(str(request) in rows(step) for step in steps) == count


def test_every_module_that_runs_has_its_entry(captured: Captured) -> None:
    for ran, step in zip(captured.ran, captured.steps, strict=True):
        assert len(ran) > 20
        for path in ran if captured.level != "L1" else ():
            assert len(entries(step, path)) == ran.count(path), path
        assert captured.level == "L1" or entries(step, "model"), "vLLM's own call of it goes past hooks"


def test_logits_are_captured(captured: Captured) -> None:
    for step in captured.steps[:STEPS]:
        if captured.level == "L1":
            shapes = [tensor.record["shape"] for tensor in step.tensors() if tensor.entry.startswith("_C.onednn_mm")]
            assert [len(rows(step)), 512] in shapes
            continue
        (entry,) = entries(step, "logits_processor")
        (logits,) = outputs(step, entry)
        assert logits.record["shape"] == [len(rows(step)), 512]
        if captured.task == "tensor":
            chosen = step.load(logits).argmax(-1).tolist()
            number = captured.steps.index(step)
            assert chosen == [captured.tokens[int(request)][number] for request in rows(step)]


def test_capture_begins_with_the_model(captured: Captured) -> None:
    """Not with the layout of the batch, which is the runner's."""
    if captured.level == "L0":
        pytest.skip("operators are captured at L1 and mix")
    for step in captured.steps:
        operators = [entry["site"]["module"] for name, entry in step.data.items() if not name.startswith("Module.")]
        assert operators[0] == "model.embed_tokens"


def test_custom_operators_with_what_they_write_into_their_arguments(captured: Captured) -> None:
    if captured.level == "L0":
        pytest.skip("operators are captured at L1 and mix")
    for step in captured.steps:
        linear = [name for name in step.data if name.startswith("_C.onednn_mm.")]
        assert len(linear) == 9  # 4 in each of 2 layers, and the lm_head
        assert all(outputs(step, name) for name in linear)
        (result,) = outputs(step, "_C.onednn_mm.0.forward")
        assert result.record["shape"][-1] == 256
        query, key = outputs(step, "_C.rotary_embedding.0.forward")
        assert (query.record["shape"][-1], key.record["shape"][-1]) == (128, 64)
        if captured.level == "mix":
            (module,) = outputs(step, "Module.model.layers.0.self_attn.qkv_proj.QKVParallelLinear.forward.0")[:1]
            fields = ("shape", "Max", "Min", "Mean", "Norm")
            assert [result.record[field] for field in fields] == [module.record[field] for field in fields]


def test_rows_are_those_of_the_requests(captured: Captured) -> None:
    if (captured.level, captured.task) != ("L0", "tensor"):
        pytest.skip("values of modules are in the dump of L0 with task tensor")
    together, alone = captured.steps[:STEPS], iter(captured.steps[STEPS:])
    assert list(rows(together[0])) == ["0", "1", "2"]
    assert list(rows(together[2])) == ["2", "1"], "not the order of the batch when request 0 has left it"
    compared = 0
    for request, count in enumerate(TOKENS):
        for shared in together[:count]:
            single = next(alone)
            mine = rows(shared)[str(request)]
            total = max(each.stop for each in rows(shared).values())
            for ours, other in zip(single.tensors(), shared.tensors(), strict=True):
                assert (ours.entry, ours.position) == (other.entry, other.position)
                if "Decoder" in ours.entry and ours.position.startswith("output") and other.record["shape"][0] == total:
                    torch.testing.assert_close(shared.load(other)[mine], single.load(ours), **TOLERANCE)
                    compared += 1
    assert compared == sum(TOKENS) * 2 * 2  # layers, hidden states and residual


def test_weights_that_are_loaded_anew_are_measured_anew(tiny_model: Path, tmp_path: Path) -> None:
    """A trainer writes into them through .data, and perhaps nowhere where the probe looks."""
    name = "model.layers.0.input_layernorm"
    config = {"task": "statistics", "level": "L0", "dump_path": str(tmp_path)}
    with engine(tiny_model, additional_config={"dump_config": config}) as llm:
        model = worker(llm).get_model()
        weight = model.get_parameter(f"{name}.weight").detach().clone()
        weight[1] = 100.0
        step_through(llm, {3: lambda: model.load_weights([(f"{name}.weight", weight)])})
    maxima = [step.data[f"Module.{name}.RMSNorm.forward.0"]["parameters"]["weight"]["Max"] for step in dumped(tmp_path)]
    assert maxima[:3] == [maxima[0]] * 3
    assert maxima[0] < 100
    assert maxima[3:] == [100.0] * 3


def test_one_request_alone(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"task": "tensor", "level": "L0", "dump_path": str(tmp_path / "dump"), "tensor": {"request_id": "2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("MSPROBE_GRAPH_CONFIG", str(tmp_path / "config.json"))
    with engine(tiny_model) as llm:
        tokens = generate(llm)
        generate(llm, PROMPTS[:1], [2])
    steps = dumped(tmp_path / "dump")
    assert len(steps) == TOKENS[2]
    for number, step in enumerate(steps):
        length = rows(step)["2"].stop - rows(step)["2"].start
        for tensor in step.tensors():
            if "DecoderLayer" in tensor.entry:
                assert tensor.record["shape"][0] == length
        (logits,) = outputs(step, "Module.logits_processor.LogitsProcessor.forward.0")
        assert step.load(logits).argmax(-1).tolist() == [tokens[2][number]]


def test_edited_by_hand(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: dict[str, Any]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"task": "statistics", "level": "mix", "dump_path": str(tmp_path / "dump")}))
    monkeypatch.setenv("HAND_EDITED_CONFIG", str(config))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with engine(tiny_model, worker_cls="hand_edited.HandEditedWorker") as llm:
        assert generate(llm) == untouched["tokens"]
        worker(llm).model_runner.debugger.flush()
    steps = [step for step in dumped(tmp_path / "dump") if step.data]
    assert len(steps) == STEPS
    assert all("Module.logits_processor.LogitsProcessor.forward.0" in step.data for step in steps)


def test_a_failing_capture_leaves_serving_alone(
    tiny_model: Path, tmp_path: Path, untouched: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    dump = tmp_path / "dump"
    config = {"task": "statistics", "level": "mix", "dump_path": str(dump)}
    with engine(tiny_model, additional_config={"dump_config": config}) as llm:
        dump.write_text("a file where the folder should be, made after the start")
        assert generate(llm) == untouched["tokens"]
        assert "File exists" in caplog.text
        dump.unlink()
        assert generate(llm) == untouched["tokens"]
    assert not dump.exists()


def test_a_vllm_that_is_not_as_expected_is_served_all_the_same(
    tiny_model: Path, tmp_path: Path, untouched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"task": "statistics", "level": "mix", "dump_path": str(tmp_path / "dump")}
    with engine(tiny_model, additional_config={"dump_config": config}) as llm:
        generate(llm)
        row_order = "msprobe_graph.integrations.vllm.worker.row_order"
        monkeypatch.setattr(row_order, lambda worker, scheduler_output: worker.no_such_attribute)
        assert generate(llm) == untouched["tokens"]
        monkeypatch.undo()
        assert generate(llm) == untouched["tokens"]
    finished = [step for step in dumped(tmp_path / "dump") if step.finished]
    assert len(finished) == STEPS


def test_not_asked_for_nothing_is_there(untouched: dict[str, Any]) -> None:
    assert untouched["wrapped"] == []
    ours = {"msprobe_graph", "msprobe_graph.version", "msprobe_graph.integrations", "msprobe_graph.integrations.vllm"}
    assert set(untouched["loaded"]) == ours


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dump_config": {"dump_path": "dump", "level": "l1"}}, 'level is "l1"; it must be one of'),
        ({"dump_config_path": "nowhere.json"}, "nowhere.json: the config file cannot be read"),
        ({"dump_config_path": "a.json", "dump_config": {}}, "has both dump_config_path and dump_config"),
        ({"dump_config": "config.json"}, "dump_config 'config.json'; it must be an object"),
        ({"dump_config_path": ""}, "dump_config_path ''; it must be the path of a config file"),
    ],
)
def test_wrong_config_ends_the_start(tiny_model: Path, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error, engine(tiny_model, additional_config=wrong):
        pass
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_additional_config_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested({}) is None
    assert requested(object()) is None
    monkeypatch.setenv("MSPROBE_GRAPH_CONFIG", "environment.json")
    assert requested({}) == "environment.json"
    assert requested({"dump_config_path": "given.json"}) == "given.json"
    assert requested({"dump_config": {"dump_path": "dump"}}) == {"dump_path": "dump"}


@pytest.mark.slow
def test_a_killed_server_leaves_every_answered_step_whole(
    tiny_model: Path, tmp_path: Path, untouched: dict[str, Any]
) -> None:
    """Two workers of their own, with half of each layer. The answer comes from rank 0."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"task": "tensor", "level": "mix", "dump_path": str(tmp_path / "dump")}))
    additional = json.dumps({"dump_config_path": str(config)})
    server = Server(tiny_model, tmp_path / "log", "--additional-config", additional, "--tensor-parallel-size", "2")
    try:
        assert server.wait(), server.log.read_text()[-3000:]
        asked = zip(PROMPTS, TOKENS, strict=True)
        answers = [server.complete(*each, f"mine-{number}") for number, each in enumerate(asked)]
    finally:
        server.kill()
    assert answers == untouched["tokens"]
    requests = [[f"cmpl-mine-{number}-0"] for number, count in enumerate(TOKENS) for _ in range(count)]
    steps = dumped(tmp_path / "dump")
    first, second = (
        [step for step in steps if step.folder.name == rank and step.finished] for rank in ("rank0", "rank1")
    )
    assert [list(rows(step)) for step in first] == requests
    assert [list(rows(step)) for step in second][: len(requests) - 1] == requests[:-1]
    for step in first:
        for tensor in step.tensors():
            if tensor.record.get("data_name"):
                assert list(step.load(tensor).shape) == tensor.record["shape"]


@pytest.mark.slow
def test_a_server_with_a_wrong_config_never_serves(tiny_model: Path, tmp_path: Path) -> None:
    additional = json.dumps({"dump_config": {"dump_path": "dump", "tesk": "statistics"}})
    server = Server(tiny_model, tmp_path / "log", "--additional-config", additional)
    try:
        assert not server.wait()
    finally:
        server.kill()
    assert 'unknown key "tesk" in the top level, did you mean task?' in server.log.read_text()
