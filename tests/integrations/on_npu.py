"""vllm-ascend with graphs on a device called "npu"; see test_vllm_ascend_graphs, which runs this, and ascend_graphs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode

from msprobe_graph import AclGraphDumper, PrecisionDebugger
from msprobe_graph.dump.names import parse
from msprobe_graph.dump.reader import StepDump, read, steps
from msprobe_graph.integrations.vllm.ascend import AscendGraphs
from msprobe_graph.integrations.vllm.compiled import heed_hooks

from ..capturing import holes
from ..released import Given, Wheel
from .ascend_graphs import compile_with, graph_for, install, new_config, new_model, new_worker, step

BATCHES = [
    {"first": [3, 1, 4, 1, 5]},
    {"first": [9], "second": [2, 6]},
    {"second": [5, 3, 5, 8, 9, 7, 9, 3, 2, 3]},
    {"first": [1, 2, 3, 4]},
]
"""Padded to 8, padded to 4, too large for a graph, and as large as one."""
HOOKED = ["Module.model.Body.forward.0", "Module.Model.forward.0"]
"""What a replay of the whole model does not run the hooks of."""
WAYS = [
    pytest.param(CUDAGraphMode.FULL, True, id="full, npugraph_ex"),
    pytest.param(CUDAGraphMode.FULL, False, id="full, passes"),
    pytest.param(CUDAGraphMode.PIECEWISE, False, id="piecewise, passes"),
    pytest.param(CUDAGraphMode.FULL_AND_PIECEWISE, False, id="full and piecewise, passes"),
]
"""As vllm-ascend has them: pieces are compiled without npugraph_ex."""
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def wheel(wheel_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    torch_npu = Wheel("torch-npu==2.10.0", "manylinux_2_28_aarch64", wheel_folder)
    sources = torch_npu.unpack("torch_npu/dynamo/npugraph_ex", tmp_path_factory.mktemp("torch_npu")).parent
    found = Wheel("vllm-ascend==0.23.0", "manylinux_2_34_aarch64", wheel_folder)
    install(found, sources)
    return found


@pytest.fixture(autouse=True)
def _compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    yield
    torch._dynamo.reset()


def config(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "config.json"
    always = {"dump_path": str(folder / "dump"), "risk_level": "ALL", "extra_info": False, "level": "L0"}
    file.write_text(json.dumps({**always, **settings}))
    return file


def dumped(folder: Path) -> list[StepDump]:
    return [read(step) for step in steps(folder / "dump")]


def expected(folder: Path, **settings: Any) -> tuple[list[StepDump], list[list[int]]]:
    """The same batches on the CPU, eagerly and without padding, and the tokens."""
    model, tokens = new_model(new_config(CUDAGraphMode.NONE, {}), "cpu"), []
    heed_hooks(model)
    debugger = PrecisionDebugger(str(config(folder, **settings)))
    with torch.inference_mode():
        for batch in BATCHES:
            ids = torch.tensor([token for request in batch.values() for token in request])
            ends = torch.tensor([len(request) for request in batch.values()]).cumsum(0)
            positions, last = torch.arange(len(ids)), ends - 1
            with debugger.start(model):
                hidden = model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
                tokens.append(model.compute_logits(hidden[last]).argmax(-1).tolist())
    return dumped(folder), tokens


def started(wheel: Wheel, mode: CUDAGraphMode, file: Path) -> Any:
    """A worker whose warm-up is over."""
    return new_worker(wheel, new_config(mode, {"dump_config_path": str(file)}), file)


def served(worker: Any) -> list[list[int]]:
    """The tokens behind the batches. Behind each there is a dummy run, of a graph."""
    tokens = []
    for batch in BATCHES:
        tokens.append(step(worker, batch))
        worker.model_runner._dummy_run(2)
    return tokens


def modules(step: StepDump) -> list[str]:
    return [entry for entry in step.data if parse(entry).kind == "module"]


def assert_alike(here: StepDump, there: StepDump, missing: Collection[str] = ()) -> None:
    """The same entries but for the modules `missing`, and the same values. Where some are missing, calls of functions
    have other numbers: a replay's come behind those that are made around it."""
    assert here.finished
    assert modules(here) == [entry for entry in modules(there) if entry not in missing]
    if not missing:
        assert list(here.data) == list(there.data)
    wanted = {(each.entry, each.position): each.record for each in there.tensors()}
    for each in here.tensors():
        site = each.entry, each.position
        if missing and parse(each.entry).kind != "module":
            continue
        assert "reason" not in each.record, (site, each.record["reason"])
        assert each.record["shape"] == wanted[site]["shape"], site
        for field in ("Max", "Min", "Mean", "Norm"):
            assert each.record[field] == pytest.approx(wanted[site][field], **TOLERANCE), (site, field)


@pytest.mark.parametrize(("mode", "npugraph_ex"), WAYS)
def test_replayed_steps_are_steps_without_graphs(
    wheel: Wheel, mode: CUDAGraphMode, npugraph_ex: bool, tmp_path: Path
) -> None:
    compile_with(npugraph_ex)
    there, tokens = expected(tmp_path / "there", level="mix")
    assert served(started(wheel, mode, config(tmp_path / "here", level="mix"))) == tokens
    here = dumped(tmp_path / "here")
    assert len(here) == len(there) == len(BATCHES)
    for batch, found, plain in zip(BATCHES, here, there, strict=True):
        replayed_whole = graph_for(mode, sum(map(len, batch.values()))) == CUDAGraphMode.FULL
        assert_alike(found, plain, HOOKED if replayed_whole else ())
        assert found.manifest is not None
        assert [each["request"] for each in found.manifest["requests"]] == list(batch)
        reasons = holes(found).values()
        assert any("AscendCompiler offers no place" in reason for reason in reasons)
        assert not any("more than once" in reason for reason in reasons), "a dummy run is none"


@pytest.mark.parametrize(("mode", "npugraph_ex"), [WAYS[0], WAYS[-1]])
def test_the_next_start_has_the_same(
    wheel: Wheel, mode: CUDAGraphMode, npugraph_ex: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_MEGA_AOT_ARTIFACT", "0")  # which saves nothing that a platform's compiler has made
    compile_with(npugraph_ex)
    tokens = served(started(wheel, mode, config(tmp_path)))
    before = dumped(tmp_path)
    torch._dynamo.reset()
    worker = started(wheel, mode, config(tmp_path, dump_path=str(tmp_path / "again" / "dump")))
    assert worker.get_model().model.was_aot_compile_fn_loaded_from_disk
    assert served(worker) == tokens
    for found, there in zip(dumped(tmp_path / "again"), before, strict=True):
        assert_alike(found, there)


def test_one_request_in_its_steps_alone(wheel: Wheel, tmp_path: Path) -> None:
    compile_with(npugraph_ex=False)
    served(started(wheel, CUDAGraphMode.FULL, config(tmp_path, statistics={"request_id": "second"})))
    norms = {step.folder.parent.name: step.data["Module.model.norm.LayerNorm.forward.0"] for step in dumped(tmp_path)}
    shapes = {name: entry["output"][0]["shape"] for name, entry in norms.items()}
    assert shapes == {"step1": [2, 8], "step2": [10, 8]}


@pytest.mark.parametrize(("mode", "npugraph_ex"), [WAYS[0], WAYS[-1]])
def test_tensors_are_saved_inside_graphs(wheel: Wheel, mode: CUDAGraphMode, npugraph_ex: bool, tmp_path: Path) -> None:
    compile_with(npugraph_ex)
    there, tokens = expected(tmp_path / "there", task="tensor")
    assert served(started(wheel, mode, config(tmp_path / "here", task="tensor"))) == tokens
    here = dumped(tmp_path / "here")
    for batch, found, plain in zip(BATCHES, here, there, strict=True):
        replayed_whole = graph_for(mode, sum(map(len, batch.values()))) == CUDAGraphMode.FULL
        assert_alike(found, plain, HOOKED if replayed_whole else ())
        assert not any("not saved" in reason for reason in holes(found).values())
        wanted = {(each.entry, each.position): each for each in plain.tensors()}
        for each in found.tensors():
            saved, other = found.load(each), plain.load(wanted[each.entry, each.position])
            assert saved.untyped_storage().nbytes() == saved.nbytes
            torch.testing.assert_close(saved, other, rtol=TOLERANCE["rel"], atol=TOLERANCE["abs"])
            if each.record["dtype"] == "torch.float32" and saved.numel():
                assert (saved.max().item(), saved.min().item()) == (each.record["Max"], each.record["Min"])
        names = {each.record["data_name"] for each in found.tensors()}
        assert names == {file.name for file in (found.folder / "dump_tensor_data").iterdir()}


def test_tensors_that_a_list_leaves_out_take_no_room(wheel: Wheel, tmp_path: Path) -> None:
    compile_with(npugraph_ex=False)
    norm = "Module.model.norm.LayerNorm.forward.0"
    settings = {"task": "tensor", "tensor": {"list": [norm]}, "graph_copy_bytes": 2 * 8 * 8 * 4}
    served(started(wheel, CUDAGraphMode.FULL, config(tmp_path, **settings)))
    for found in dumped(tmp_path):
        assert list(found.data) == [norm]
        assert all("data_name" in each.record for each in found.tensors())


def test_slices_in_graphs_are_a_hole(wheel: Wheel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_with(npugraph_ex=True)
    settings = {"task": "tensor", "tensor": {"slice": [{"begin": 0, "end": 1}]}}
    with caplog.at_level("WARNING"):
        served(started(wheel, CUDAGraphMode.FULL, config(tmp_path, **settings)))
    assert "in which no slice or checksum is taken" in caplog.text
    for found in dumped(tmp_path):
        assert "in which no slice" in holes(found)["what vLLM replays as a CUDA graph"]
        (head,) = (
            each
            for each in found.tensors()
            if each.entry == "Module.head.Linear.forward.0" and each.position == "output.0"
        )
        assert found.load(head).shape[0] == 1, "which runs outside of graphs"


def test_a_step_is_on_disk_when_its_tokens_go_out_if_it_is_wanted(wheel: Wheel, tmp_path: Path) -> None:
    compile_with(npugraph_ex=False)
    there, _ = expected(tmp_path / "there")
    folder = tmp_path / "here"
    worker = started(wheel, CUDAGraphMode.FULL, config(folder, step=[1, 3]))
    for number, batch in enumerate(BATCHES):
        assert not (folder / "dump" / f"step{number}").exists()
        step(worker, batch)
        assert (folder / "dump" / f"step{number}").exists() == (number in (1, 3))
    for found, number in zip(dumped(folder), (1, 3), strict=True):
        assert_alike(found, there[number], HOOKED)


def test_a_failure_ends_capture_and_not_serving(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_with(npugraph_ex=False)
    _, tokens = expected(tmp_path / "there")
    worker = started(wheel, CUDAGraphMode.FULL, config(tmp_path / "here"))
    monkeypatch.setattr("msprobe_graph.integrations.vllm.ascend.requests", lambda *_: 1 / 0)
    with caplog.at_level("ERROR"):
        assert served(worker) == tokens
    assert caplog.text.count("captures no more steps of this worker") == 1
    assert not (tmp_path / "here" / "dump").exists()


@pytest.mark.parametrize("lacking", ["debugger", "_model_forward"])
def test_another_vllm_ascend_is_told_of_and_not_disturbed(
    wheel: Wheel, lacking: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compile_with(npugraph_ex=False)
    vllm_config = new_config(CUDAGraphMode.FULL, {"dump_config_path": str(config(tmp_path))})
    init_backend = vllm_config.compilation_config.init_backend
    dumper = AclGraphDumper(str(config(tmp_path)))
    runner = SimpleNamespace(debugger=dumper, _model_forward=print)
    delattr(runner, lacking)
    worker = Given(vllm_config=vllm_config, model_runner=runner)
    AscendGraphs(worker)
    with caplog.at_level("WARNING"):
        worker.init_device()
    assert ("NoneType" if lacking == "debugger" else "without _model_forward") in caplog.text
    assert "--enforce-eager" in caplog.text
    assert vllm_config.compilation_config.init_backend == init_backend
    assert not dumper.awaits_batches


def test_graphs_of_what_is_not_compiled_are_a_hole(
    wheel: Wheel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vllm_config = new_config(CUDAGraphMode.FULL, {})
    vllm_config.compilation_config.mode = CompilationMode.NONE
    _, tokens = expected(tmp_path / "there")
    file = config(tmp_path / "here")
    vllm_config.additional_config["dump_config_path"] = str(file)
    with caplog.at_level("WARNING"):
        assert served(new_worker(wheel, vllm_config, file)) == tokens
    assert "vLLM does not compile" in caplog.text
    here = dumped(tmp_path / "here")
    assert len(here) == len(BATCHES)
    for found in here:
        assert "vLLM does not compile" in holes(found)["what vllm-ascend replays"]
        assert "Module.head.Linear.forward.0" in found.data, "the logits are computed outside of graphs"
