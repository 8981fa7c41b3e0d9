"""What the tests share: vLLM's environment, a capture, a folder of wheels, a tiny model, and why a test is skipped."""

from __future__ import annotations

import importlib.util
import itertools
import os
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from .capturing import Capture, capture_into

CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Set what vLLM reads once, at import; the processes that a test starts inherit it."""
    # How fast examples come says something of the machine, not of the code: the first one builds tables of Unicode.
    hypothesis_settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    hypothesis_settings.load_profile("any machine")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    # In one process requests join a step in a fixed order. Tests of workers of their own set it to 1.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches of this run alone: compiled graphs of an earlier one would hide what a test wants to see."""
    caches = tmp_path_factory.mktemp("caches")
    for variable in ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"):
        os.environ[variable] = str(caches / variable.lower())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    """Captures a program, each time into a folder of its own."""
    numbers = itertools.count()
    return lambda *args, **kwargs: capture_into(tmp_path / f"capture{next(numbers)}", *args, **kwargs)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step of each value that eager capture describes."""
    from msprobe_graph.taps.recorder import Recorder

    steps_of_values: list[int] = []
    value = Recorder.value
    monkeypatch.setattr(
        Recorder, "value", lambda self, *args: steps_of_values.append(self._number) or value(self, *args)
    )
    return steps_of_values


@pytest.fixture(scope="session")
def wheel_folder(request: pytest.FixtureRequest) -> Path:
    """Where wheels are kept from one run to the next."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("wheels")


@pytest.fixture(scope="session")
def msprobe() -> Path:
    """The command `msprobe` of the virtual environment that MSPROBE_VENV names."""
    environment = os.environ.get("MSPROBE_VENV")
    if environment is None:
        pytest.skip("MSPROBE_VENV is not set: it names a virtual environment with mindstudio-probe")
    command = Path(environment) / "bin" / "msprobe"
    if not command.exists():
        pytest.skip(f"MSPROBE_VENV={environment} has no bin/msprobe")
    return command


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model, qwen2 unless asked otherwise:

    @pytest.mark.parametrize("tiny_model", ["llama", "opt"], indirect=True)
    """
    architecture = getattr(request, "param", "qwen2")
    example = runpy.run_path(str(CHECKOUT / "examples" / "vllm_cpu" / "tiny_model.py"))
    made: Path = example["make_model"](tmp_path_factory.mktemp("model") / architecture, architecture)
    return made
