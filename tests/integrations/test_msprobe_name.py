"""The import name msprobe.pytorch: ours where asked for, msProbe's where it is installed."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msprobe_graph import AclGraphDumper, acl_save
from msprobe_graph.dump.reader import read, steps


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    return done.stdout.strip()


@pytest.fixture
def theirs(tmp_path: Path) -> str:
    """A folder in which something called msprobe is installed."""
    (tmp_path / "msprobe").mkdir()
    (tmp_path / "msprobe" / "__init__.py").touch()
    (tmp_path / "msprobe" / "pytorch.py").write_text("PrecisionDebugger = 'theirs'\n")
    return str(tmp_path)


def test_the_name_is_nobodys_before_it_is_asked_for(as_msprobe: None) -> None:
    assert python("import msprobe_graph, sys; print('msprobe' in sys.modules)") == "False"


def test_the_four_names(as_msprobe: None) -> None:
    from msprobe.pytorch import AclGraphDumper as Dumper
    from msprobe.pytorch import PrecisionDebugger, seed_all
    from msprobe.pytorch import acl_save as save

    assert issubclass(Dumper, AclGraphDumper)
    assert save is acl_save
    assert not hasattr(Dumper, "stop")
    assert _parameters(PrecisionDebugger.__init__)[:5] == ["config_path", "task", "dump_path", "level", "step"]
    assert _parameters(PrecisionDebugger.start)[:4] == ["model", "token_range", "rank_id", "scheduled_tokens"]
    assert _parameters(seed_all) == ["seed", "mode", "rm_dropout", "is_enhanced"]
    assert _parameters(Dumper.__init__) == ["config_path"]
    assert (_parameters(Dumper.start), _parameters(Dumper.step)) == (["model"], ["dump"])


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_methods_may_be_called_on_the_class(as_msprobe: None, tmp_path: Path) -> None:
    """msProbe's are class methods of its one debugger."""
    from msprobe.pytorch import PrecisionDebugger

    PrecisionDebugger.latest = None
    with pytest.raises(RuntimeError, match=r"make a PrecisionDebugger\(\.\.\.\) before PrecisionDebugger.start\(\)"):
        PrecisionDebugger.start()
    PrecisionDebugger(dump_path=str(tmp_path / "first"), level="L0")
    debugger = PrecisionDebugger(dump_path=str(tmp_path / "dump"), level="L0")
    model = torch.nn.Linear(2, 2)
    for _ in range(2):
        PrecisionDebugger.start(model)
        model(torch.ones(1, 2))
        PrecisionDebugger.stop()
        PrecisionDebugger.step()
    assert debugger.session.step == 2
    assert [list(read(step).data) for step in steps(tmp_path / "dump")] == [["Module.Linear.forward.0"]] * 2
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("keyword", ["rm_dropout", "is_enhanced"])
def test_what_would_replace_functions_of_torch_is_refused(as_msprobe: None, keyword: str) -> None:
    from msprobe.pytorch import seed_all

    with pytest.raises(ValueError, match=f"seed_all: {keyword} is not supported"):
        seed_all(1, **{keyword: True})


def test_msprobe_is_not_shadowed_unless_told_to(theirs: str) -> None:
    install = "import msprobe_graph; print(msprobe_graph.install_as_msprobe({}))"
    tell = "from msprobe.pytorch import PrecisionDebugger; print(PrecisionDebugger)"
    assert python(f"{install.format('')}\n{tell}", PYTHONPATH=theirs) == "False\ntheirs"
    assert python(f"import msprobe\n{install.format('')}\n{tell}", PYTHONPATH=theirs) == "False\ntheirs"
    told = python(f"{install.format('replace=True')}\n{tell}", PYTHONPATH=theirs)
    assert told == "True\n<class 'msprobe.pytorch.PrecisionDebugger'>"


def test_other_parts_of_msprobe_are_not_there(as_msprobe: None) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"msprobe\.core"):
        __import__("msprobe.core")
    with pytest.raises(ImportError, match="TrainerMon"):
        exec("from msprobe.pytorch import TrainerMon")


@pytest.mark.vllm
class TestOnAscend:
    """vLLM's plugin in a worker of an NPU."""

    @pytest.fixture
    def attach(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        import vllm.platforms
        from vllm.config import CUDAGraphMode

        from msprobe_graph.integrations import vllm as plugin

        monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(device_type="npu"))
        monkeypatch.delenv("MSPROBE_GRAPH_RUN", raising=False)

        def attach(additional_config: dict[str, Any]) -> None:
            eager = SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE)
            config = SimpleNamespace(
                additional_config=additional_config, instance_id="abc_dp1", compilation_config=eager
            )
            worker = SimpleNamespace(vllm_config=config)
            plugin.attach(worker)
            assert vars(worker) == {"vllm_config": config}, "vllm-ascend captures, not we"

        return attach

    @pytest.fixture(autouse=True)
    def _as_it_was(self) -> Any:
        yield
        for name in ("msprobe.pytorch", "msprobe"):
            sys.modules.pop(name, None)
        os.environ.pop("MSPROBE_GRAPH_RUN", None)

    def test_it_installs_the_name_and_nothing_else(self, attach: Callable[..., None]) -> None:
        attach({"dump_config_path": "config.json"})
        assert "msprobe" in sys.modules
        assert os.environ["MSPROBE_GRAPH_RUN"] == "vllm-abc"  # one run, whatever process started a worker

    def test_it_does_nothing_unasked(self, attach: Callable[..., None]) -> None:
        attach({})
        assert "msprobe" not in sys.modules

    def test_it_says_what_vllm_ascend_does_not_read(
        self, attach: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("MSPROBE_GRAPH_CONFIG", "config.json")
        with caplog.at_level("WARNING", logger="vllm.msprobe_graph"):
            attach({})
        assert not caplog.records or "--additional-config" in caplog.text


def test_acl_save_gives_back_its_argument(as_msprobe: None, tmp_path: Path) -> None:
    from msprobe.pytorch import acl_save as save

    x = torch.ones(2)
    assert save(x, str(tmp_path / "x.pt")) is x


def test_what_vllm_compiles_is_said_to_be_out_of_sight(as_msprobe: None, tmp_path: Path) -> None:
    from msprobe.pytorch import AclGraphDumper as Dumper

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"dump_path": str(tmp_path / "dump"), "level": "L0"}))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].do_not_compile = False  # as vLLM marks what it compiles
    dumper = Dumper(str(config))
    dumper.start(model)
    model(torch.ones(1, 2))
    dumper.step()
    dumper._debugger.stop()
    (folder,) = steps(tmp_path / "dump")
    manifest = read(folder).manifest
    assert manifest is not None
    assert ("1", True) in [(hole["site"], "--enforce-eager" in hole["reason"]) for hole in manifest["holes"]]
