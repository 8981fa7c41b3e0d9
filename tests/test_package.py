"""The package as it is installed: what a wheel holds, what importing it pulls in, that the C extension is optional."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
# Each top-level folder of code, and where it is installed.
FOLDERS = {"msprobe_graph": "msprobe_graph", "eager": "msprobe_graph/eager"}


def build_wheel(into: Path, compiler: str | None = None) -> Path:
    """Build a wheel with the compiler `compiler`, from a copy: builds take in what earlier ones left."""
    source = into / "source"
    for folder in FOLDERS:
        shutil.copytree(CHECKOUT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(into), str(source)]
    subprocess.run(command, check=True, env=os.environ if compiler is None else os.environ | {"CC": compiler})
    (wheel,) = into.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def python(code: str, path: Path, cwd: Path) -> str:
    """What a new Python that finds packages in `path` first prints for `code`."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel_without_compiler"), compiler="false")


def test_wheel_has_one_top_level_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    assert "eager" not in tops
    assert {top for top in tops if not top.endswith(".dist-info")} == {"msprobe_graph"}


def test_wheel_has_every_module_and_data_file(wheel: Path) -> None:
    expected = {
        f"{installed}/{file.relative_to(CHECKOUT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for pattern in ("*.py", "*.yaml", "py.typed")
        for file in (CHECKOUT / folder).rglob(pattern)
    }
    assert "msprobe_graph/eager/__init__.py" in expected
    assert expected - names_in(wheel) == set()


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_wheel_has_the_extension(wheel: Path) -> None:
    assert any(name.startswith("msprobe_graph/taps/_statistics.") for name in names_in(wheel))


def test_without_a_compiler_it_installs_and_measures(wheel_without_compiler: Path, tmp_path: Path) -> None:
    assert not any("_statistics." in name for name in names_in(wheel_without_compiler))
    with zipfile.ZipFile(wheel_without_compiler) as archive:
        archive.extractall(tmp_path / "installed")
    code = """
import torch, msprobe_graph
from msprobe_graph.taps import Rows
rows = Rows()
number = rows.add(torch.tensor([3.0, 4.0]))
print(msprobe_graph.__file__, number)
"""
    file, number = python(code, tmp_path / "installed", tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert number == "0"


def test_import_leaves_frameworks_alone(tmp_path: Path) -> None:
    code = """
import sys, msprobe_graph, msprobe_graph.eager
print([name for name in ("vllm", "torch_npu", "msprobe") if name in sys.modules])
"""
    assert python(code, CHECKOUT, tmp_path) == "[]"
