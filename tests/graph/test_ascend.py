"""Handing on to npugraph_ex and torchair: with the sources of a torch_npu wheel, where they run on a CPU.

See npugraph_ex.py for what is real there. torchair needs a library of its own, so only what is called of it is checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from msprobe_graph.config import ConfigError
from msprobe_graph.dump.reader import read, steps
from msprobe_graph.graph import ascend
from msprobe_graph.graph.handoff import Taps, hand_on
from msprobe_graph.graph.options import GraphOptions, graph_options

from ..released import Wheel

COMPILER = "torch_npu/dynamo/{}/npu_fx_compiler.py"
CONFIG = "torch_npu/dynamo/{}/configs/compiler_config.py"
NPU = "torch_npu/npu/__init__.py"


@pytest.fixture(scope="module")
def wheel(wheel_folder: Path) -> Wheel:
    return Wheel("torch-npu==2.10.0", "manylinux_2_28_aarch64", wheel_folder)


@pytest.mark.slow
def test_npugraph_ex_captures_what_eager_code_does(wheel: Wheel, tmp_path: Path) -> None:
    sources = wheel.unpack("torch_npu/dynamo/npugraph_ex", tmp_path).parent
    command = [sys.executable, str(Path(__file__).with_name("npugraph_ex.py")), str(sources), str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=180)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT ")) == {
        "same": [True, True],
        "called": ["CompilerConfig", "CompilerConfig"],  # the user's own pass, forward and backward
        "late": True,
    }
    here, there = (read(steps(tmp_path / name)[0]) for name in ("graph", "eager"))
    forward = [name for name in there.data if "backward" not in name and "grad" not in name]
    assert [name for name in here.data if name in forward] == forward
    eager = {(tensor.entry, tensor.position): tensor for tensor in there.tensors()}
    compared = set()
    for tensor in here.tensors():
        if "reason" not in tensor.record:
            value = eager[tensor.entry, tensor.position]
            torch.testing.assert_close(tensor.record["Norm"], value.record["Norm"], rtol=1e-4, atol=1e-5)
            if "data_name" in tensor.record:
                torch.testing.assert_close(here.load(tensor), there.load(value))
            compared.add(tensor.entry)
    assert set(forward) <= compared
    assert {"Module.1.up.Linear.backward.0", "Functional.gelu.0.backward"} <= compared
    assert here.manifest is not None
    assert [graph["inner"] for graph in here.manifest["graphs"]] == ["npugraph_ex"]


@pytest.mark.parametrize("name", ascend.COMPILERS)
def test_what_is_called_of_the_compilers(wheel: Wheel, name: str) -> None:
    assert wheel.arguments(COMPILER.format(name), "get_npu_backend") == ["compiler_config", "custom_decompositions"]
    backend = wheel.arguments(COMPILER.format(name), "_npu_backend")
    assert (len(backend[:2]), backend[-1]) == (2, "**kwargs")
    config = wheel.text(CONFIG.format(name))
    for slot in (ascend.PIN, ascend.FULL):
        assert f"self.{slot} = CallableValue(None)" in config
    if name == "torchair":
        assert f'"{ascend.MODE}"' in config


def test_what_is_called_of_torch_npu(wheel: Wheel) -> None:
    assert wheel.arguments(NPU, "_launch_host_func") == ["op_stream", "fn", "user_data"]
    assert wheel.arguments(NPU, "_subscribe_report") == ["op_stream"]
    assert '"is_current_stream_capturing"' in wheel.text(NPU)
    meta = "torch_npu/op_plugin/meta/_meta_registrations.py"
    assert wheel.arguments(meta, "save_npugraph_tensor_meta") == ["input", "save_path"]


@pytest.mark.parametrize("name", ascend.COMPILERS)
def test_without_torch_npu_it_is_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=f"the option inner is '{name}', but torch_npu is not installed"):
        hand_on(torch.fx.symbolic_trace(torch.nn.ReLU()), [], Taps(), GraphOptions(inner=name))


def test_a_torch_npu_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"npugraph_ex is in torch_npu from 2\.10 on"):
        hand_on(torch.fx.symbolic_trace(torch.nn.ReLU()), [], Taps(), GraphOptions(inner="npugraph_ex"))
    sys.modules.pop("torch_npu", None)


class Torchair(ModuleType):
    """An older one: its configuration has no slots for passes."""

    def __init__(self, slots: bool) -> None:
        super().__init__("torchair")
        self.configs: list[SimpleNamespace] = []
        self.graphs: list[torch.fx.GraphModule] = []
        self._slots = dict.fromkeys((ascend.PIN, ascend.FULL), SimpleNamespace(value=None)) if slots else {}

    def CompilerConfig(self) -> SimpleNamespace:
        return SimpleNamespace(mode=None, **self._slots)

    def get_npu_backend(self, *, compiler_config: SimpleNamespace) -> Any:
        self.configs.append(compiler_config)

        def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
            self.graphs.append(module)
            return module.forward

        return backend


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Torchair:
    fake = Torchair(slots=False)
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setitem(sys.modules, "torchair", fake)
    return fake


def test_an_older_torchair_is_tapped_at_dynamo_level(older: Torchair) -> None:
    module = torch.fx.symbolic_trace(torch.nn.ReLU())
    compiled = hand_on(module, [torch.ones(2)], Taps(), GraphOptions(inner="torchair"))
    assert [config.mode for config in older.configs] == ["reduce-overhead"]
    assert "offers no place behind AOTAutograd" in compiled.remarks[0]


def test_graphs_of_another_mode_can_not_be_tapped(older: Torchair) -> None:
    with pytest.raises(ConfigError, match="inner torchair captures in 'reduce-overhead' only"):
        hand_on(
            torch.fx.symbolic_trace(torch.nn.ReLU()), [], Taps(), GraphOptions(inner="torchair", mode="max-autotune")
        )


def test_what_compiles_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    on_npu, elsewhere = [torch.ones(1)], [torch.ones(1)]
    monkeypatch.setattr(ascend.torch, "Tensor", SimpleNamespace)
    on_npu = [SimpleNamespace(device=SimpleNamespace(type="npu"))]
    elsewhere = [SimpleNamespace(device=SimpleNamespace(type="cuda")), 3]
    assert ascend.preferred(on_npu) is None, "without torch_npu"
    for installed, expected in (
        ({"torchair"}, "torchair"),
        ({"torchair", "npugraph_ex"}, "npugraph_ex"),
    ):
        monkeypatch.setattr(ascend, "_found", lambda name, there=installed: ModuleType(name) if name in there else None)
        assert ascend.preferred(on_npu) == expected
        assert ascend.preferred(elsewhere) is None
    assert graph_options(None, None, "torchair").inner == "torchair"
    assert graph_options({"inner": "inductor"}, None, "torchair").inner == "inductor"
    assert graph_options(None, None).inner == "inductor"
