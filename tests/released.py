"""Functions of released packages, taken from their wheels and run as they are, where the packages can't be installed.

Everything a function needs of its own module is there: its imports, as far as they can be imported, and the module's
other classes and functions, where they are asked for. What can't be imported (torch_npu, the package itself) is
`Nothing`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest


class Nothing:
    """Stands for what isn't there: false, zero and empty; called, entered or asked for a part it gives itself."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return self

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return not other

    def __hash__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0

    def __or__(self, other: object) -> Any:
        return Any  # in an annotation

    __ror__ = __or__

    def __lt__(self, other: float) -> bool:
        return other > 0

    def __gt__(self, other: float) -> bool:
        return other < 0

    def __mul__(self, other: object) -> Nothing:
        return self

    __rmul__ = __mul__

    def __truediv__(self, other: object) -> Nothing:
        return self

    def __getitem__(self, key: object) -> Nothing:
        return self


NOTHING = Nothing()


class Given(Nothing):
    """These attributes; all others are nothing."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Wheel:
    """A released wheel, of any platform, whose Python sources can be read."""

    def __init__(self, requirement: str, platform: str, into: Path) -> None:
        """Downloads it, or skips the test."""
        folder = into / requirement
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += ["--platform", platform, "--python-version", "3.11", "--dest", str(folder), requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{requirement} can't be downloaded: {done.stderr.strip().splitlines()[-1]}")
        (self._file,) = folder.glob("*.whl")

    def text(self, path: str) -> str:
        """The source at `path` inside the wheel."""
        with zipfile.ZipFile(self._file) as archive:
            return archive.read(path).decode()

    def unpack(self, folder: str, into: Path) -> Path:
        """The Python files below `folder` of the wheel, and where they are now."""
        with zipfile.ZipFile(self._file) as archive:
            for name in archive.namelist():
                if name.startswith(f"{folder}/") and name.endswith(".py"):
                    archive.extract(name, into)
        return into / folder

    def arguments(self, path: str, function: str) -> list[str]:
        """What a function, "name" or "Class.method", of the module at `path` takes; ``*`` and ``**`` before what
        collects the rest."""
        nodes = [ast.parse(self.text(path))] if "." not in function else self.body(path, function.rpartition(".")[0])
        (found,) = (
            node
            for root in nodes
            for node in ast.walk(root)
            if isinstance(node, ast.FunctionDef) and node.name == function.rpartition(".")[2]
        )
        given = found.args
        names = [each.arg for each in (*given.posonlyargs, *given.args)]
        names += [f"*{given.vararg.arg}"] if given.vararg else []
        names += [each.arg for each in given.kwonlyargs]
        return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])

    def module(self, path: str, names: Collection[str], **standing_in: Any) -> dict[str, Any]:
        """The namespace of the module at `path` with its imports and those of its classes and functions that are
        `names`. A class can be cut down to some of its members: "Class.method", without its bases."""
        tree = ast.parse(self.text(path))
        namespace: dict[str, Any] = {"__name__": path}
        for statement in tree.body:
            for imported in _imports(statement):
                _run(imported, path, namespace)
        namespace |= standing_in
        for statement in tree.body:
            if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
                members = {name.partition(".")[2] for name in names if name.partition(".")[0] == statement.name}
                if isinstance(statement, ast.ClassDef) and members and "" not in members:
                    statement.body = [each for each in statement.body if getattr(each, "name", None) in members]
                    statement.bases = []
                if members:
                    _exec(statement, path, namespace)
        return namespace

    def body(self, path: str, function: str) -> list[ast.stmt]:
        """The statements of a method or function, "Class.method", of the module at `path`."""
        nodes: list[ast.stmt] = ast.parse(self.text(path)).body
        for name in function.split("."):
            (found,) = (each for each in nodes if getattr(each, "name", None) == name)
            nodes = getattr(found, "body", [])
        return nodes


def run(statements: list[ast.stmt], path: str, namespace: dict[str, Any]) -> None:
    """Run statements of the module at `path`, such as some of a function's."""
    for statement in statements:
        _exec(statement, path, namespace)


def _imports(statement: ast.stmt) -> Iterator[ast.Import | ast.ImportFrom]:
    """One for each name that a statement of a module imports, also where it does so for a type checker only."""
    if isinstance(statement, ast.If):
        for inner in (*statement.body, *statement.orelse):
            yield from _imports(inner)
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            yield ast.Import([alias])
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            yield ast.ImportFrom(statement.module, [alias], statement.level)


def _run(imported: ast.Import | ast.ImportFrom, path: str, namespace: dict[str, Any]) -> None:
    (alias,) = imported.names
    try:
        _exec(imported, path, namespace)
    except (ImportError, KeyError):
        namespace[alias.asname or alias.name.partition(".")[0]] = NOTHING


def _exec(statement: ast.stmt, path: str, namespace: dict[str, Any]) -> None:
    module = ast.fix_missing_locations(ast.Module([statement], []))
    flags = annotations.compiler_flag if namespace.get("annotations") is annotations else 0  # as its module says
    exec(compile(module, path, "exec", flags, dont_inherit=True), namespace)
