"""What users pass to the backend: wrong options are one sentence, the inner backend's own ones reach it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from msprobe_graph import flush, msprobe_backend
from msprobe_graph.config import ConfigError
from msprobe_graph.graph.inductor import inductor_config
from msprobe_graph.graph.inductor_compat import SchedulerPass
from msprobe_graph.graph.options import graph_options
from msprobe_graph.graph.tap_op import TAP

from ..capturing import Apply, Capture
from .conftest import Dumped, Net, differences


class Inner:
    """A backend that keeps what it is given."""

    def __init__(self) -> None:
        self.modules: list[fx.GraphModule] = []
        self.keywords: dict[str, Any] = {}

    def __call__(self, module: fx.GraphModule, inputs: Any, **keywords: Any) -> Any:
        self.modules.append(module)
        self.keywords = keywords
        return module.forward

    @property
    def taps(self) -> list[fx.Node]:
        return [node for module in self.modules for node in module.graph.nodes if node.target is TAP]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return {"dump_path": str(tmp_path / "dump"), "level": "mix", "risk_level": "ALL"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "fidelity": ({"fidelity": "exakt"}, "the option fidelity is 'exakt'; it is one of exact, full"),
    "inner, of another type": ({"inner": 3}, "the option inner is 3; it is a backend's name or a callable"),
    "inner, unknown": ({"inner": "nonesuch"}, "the option inner is 'nonesuch', which is not in"),
    "a misspelt key": ({"fidelty": "full"}, "the option 'fidelty' is unknown; did you mean 'fidelity'?"),
    "full_modules": ({"full_modules": "layers.0"}, "the option full_modules is 'layers.0'; it is a list of"),
    "Inductor's": ({"no_such_option": 1}, "the option 'no_such_option' is neither msprobe's nor Inductor's"),
    "mode": ({"mode": "fastest"}, "fastest"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_option_is_one_sentence(config: dict[str, Any], what: str) -> None:
    options, sentence = WRONG[what]
    compiled = torch.compile(nn.Linear(2, 2), backend=msprobe_backend, options={"config_path": config, **options})
    with pytest.raises(Exception, match="ConfigError: backend msprobe: ") as raised:
        compiled(torch.ones(1, 2))
    cause = raised.value.__cause__ or raised.value.inner_exception  # type: ignore[attr-defined]
    assert isinstance(cause, ConfigError)
    assert sentence in str(cause)
    assert "\n" not in str(cause).strip()


@pytest.mark.parametrize("modules", [3, [1], "layers"])
def test_full_modules_is_a_list_of_names(modules: Any) -> None:
    with pytest.raises(ConfigError, match="full_modules"):
        graph_options({"full_modules": modules}, None)


def test_a_config_that_is_wrong_says_what_is_wrong_with_it(config: dict[str, Any]) -> None:
    compiled = torch.compile(
        nn.Linear(2, 2), backend="msprobe", options={"inner": "eager", "config_path": {**config, "level": "L7"}}
    )
    with pytest.raises(Exception, match=r"level.*L7"):
        compiled(torch.ones(1, 2))


def test_without_config_and_debugger_it_says_what_to_do() -> None:
    program = (
        "import torch, msprobe_graph\n"
        "torch.compile(torch.nn.Linear(2, 2), backend=msprobe_graph.msprobe_backend)(torch.ones(1, 2))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "backend msprobe does not know what to capture: create a PrecisionDebugger" in ended.stderr


def test_mode_and_the_inner_backends_options_reach_it(config: dict[str, Any]) -> None:
    inner = Inner()
    options = {"config_path": config, "inner": inner, "mode": "max-autotune", "theirs": 3}
    torch.compile(nn.Linear(2, 2), backend="msprobe", options=options)(torch.ones(1, 2))
    assert inner.keywords == {"mode": "max-autotune", "theirs": 3}


def test_mode_and_options_become_inductors_configuration() -> None:
    options = graph_options({"mode": "max-autotune-no-cudagraphs", "epilogue-fusion": False}, None)
    found = inductor_config(options)
    assert found["max_autotune"] is True
    assert found["epilogue_fusion"] is False
    assert inductor_config(graph_options({}, "default")) == {}
    assert inductor_config(graph_options({}, "max-autotune-no-cudagraphs"))["max_autotune"] is True


def test_the_backend_by_name_is_the_callable(capture: Capture) -> None:
    model, x = Net().eval(), torch.randn(2, 8)
    found = []
    for backend in ("msprobe", msprobe_backend):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
        found.append(capture(compiled, lambda compiled=compiled: compiled(x)))
    assert differences(*found) == []
    assert found[0].data


def test_a_registered_backend_can_be_the_inner_one(capture: Capture) -> None:
    model, x = Net().eval(), torch.randn(2, 8)
    eager = capture(model, lambda: model(x))
    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": "aot_eager"})
    with torch.no_grad():
        found = capture(compiled, lambda: compiled(x), statistics={"data_mode": ["forward"]})
    assert list(found.data) == list(eager.data)


def test_where_taps_can_perturb_the_manifest_says_so(capture: Capture) -> None:
    model, x = Net().eval(), torch.randn(2, 8)

    def foreign(module: fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    compiled = torch.compile(model, backend=msprobe_backend, options={"inner": foreign})
    manifest = capture(compiled, lambda: compiled(x)).manifest
    assert "foreign" in str(manifest)
    assert "can change what it fuses" in str(manifest)


def test_with_nothing_selected_the_graph_is_handed_on_as_it_came(config: dict[str, Any], tmp_path: Path) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.sin(x) * 2

    inner, plain = Inner(), Inner()
    options = {"inner": inner, "config_path": {**config, "level": "L0"}}
    torch.compile(function, backend=msprobe_backend, options=options)(torch.ones(2))
    torch._dynamo.reset()
    torch.compile(function, backend=plain)(torch.ones(2))
    flush()
    assert inner.taps == []
    assert inner.modules[0].code == plain.modules[0].code
    assert not list(tmp_path.glob("dump/step*/*/dump_tensor_data/*"))


def test_only_what_is_selected_is_tapped(config: dict[str, Any]) -> None:
    model = nn.Sequential(Apply(lambda x: torch.sin(torch.cos(x))), nn.Linear(8, 8), nn.Flatten(), nn.ReLU())

    def taps(**settings: Any) -> int:
        torch._dynamo.reset()
        inner = Inner()
        options = {"inner": inner, "config_path": {**config, **settings}}
        with torch.no_grad():
            torch.compile(model, backend=msprobe_backend, options=options)(torch.ones(2, 8))
        return sum(len(tap.args[1]) for tap in inner.taps)  # type: ignore[arg-type, misc]

    # Of cos, sin, linear, view and relu. The last is the graph's output, which needs no tap.
    assert taps() == 4
    assert taps(level="L0") == 3
    assert taps(level="L1", risk_level="CORE") == 2  # what linear reads and what it gives


class Marked(CustomGraphPass):
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> None:
        return None


class Scheduled(SchedulerPass):  # type: ignore[misc]
    def __init__(self) -> None:
        self.nodes = 0

    def __call__(self, nodes: list[Any]) -> list[Any]:
        self.nodes += len(nodes)
        return nodes

    def uuid(self) -> None:
        return None


def test_the_users_own_passes_keep_running(config: dict[str, Any], dumped: Dumped) -> None:
    post_grad, fused = Marked(), Scheduled()
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 4)
    options = {"config_path": config, "post_grad_custom_post_pass": post_grad, "_post_fusion_custom_pass": fused}
    with torch.no_grad():
        found = torch.compile(model, backend=msprobe_backend, options=options)(x)
        torch.testing.assert_close(found, model(x))
    flush()
    assert post_grad.graphs == 1
    assert fused.nodes > 0
    assert "Module.0.Linear.forward.0" in dumped()[0].data
