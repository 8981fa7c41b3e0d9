"""Reading dumps: ours, and msProbe's, which are the same without a manifest. Importing this doesn't import torch.

>>> for folder in steps("dump"):
...     step = read(folder)
...     for tensor in step.tensors():
...         print(tensor.entry, tensor.position, tensor.record["Max"])
Functional.linear.0.forward input_args.0 1.5
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .folder import PART, SCHEMA_VERSION, TENSOR_FOLDER

if TYPE_CHECKING:
    import torch

_NUMBER = re.compile(r"\d+$")


class DumpError(ValueError):
    """A folder or file that is no dump, or one that this version can't read."""


class TensorAt(NamedTuple):
    """One tensor of a dump."""

    entry: str
    position: str
    """``input_args.0``, ``output.0.1``, ``parameters.weight``: the way to it in the entry; "" for a saved tensor."""
    record: dict[str, Any]


class StepDump(NamedTuple):
    """One process's dump of one step, as it was read."""

    folder: Path
    task: str
    level: str
    data: dict[str, dict[str, Any]]
    """The entries by name, in execution order, and what save() was given. NaN and infinities are floats again."""
    construct: dict[str, str | None]
    stack: dict[str, list[list[str]]]
    manifest: dict[str, Any] | None
    """None for a dump of msProbe's."""

    @property
    def finished(self) -> bool:
        """False when the process ended, or still runs, in the middle of the step."""
        return self.manifest is None or self.manifest["status"] == "finished"

    def tensors(self) -> Iterator[TensorAt]:
        """Every tensor of every entry, in order."""
        for entry, record in self.data.items():
            for position, tensor in _tensors(record, ()):
                yield TensorAt(entry, ".".join(position), tensor)

    def load(self, tensor: TensorAt) -> torch.Tensor:
        """The saved values of `tensor`; DumpError when the dump holds its statistics only, or
        the file is gone."""
        import torch

        name = tensor.record.get("data_name")
        if name is None:
            raise DumpError(f"{tensor.entry} {tensor.position} in {self.folder} has statistics but no saved values")
        file = self.folder / TENSOR_FOLDER / name
        try:
            loaded = torch.load(file, weights_only=True)
        except (OSError, RuntimeError) as error:  # gone, or cut short
            raise DumpError(f"{file} can't be read: {error}") from error
        assert isinstance(loaded, torch.Tensor)
        return loaded


def steps(path: str | Path) -> list[Path]:
    """The folders of one step and one process each at or below `path`, by step and then process.

    `path` is a dump_path, a step folder or a process folder; DumpError when there is no dump there.
    """
    path = Path(path)
    # os.walk takes it that a folder is no more, as when a step that is being written has become whole; glob does not.
    found = [Path(folder) for folder, _, files in os.walk(path) if "dump.json" in files and not folder.endswith(PART)]
    if not found:
        what = "holds no dump.json" if path.is_dir() else "is no folder"
        raise DumpError(f"{path} {what}: expected a dump_path, or a step<N> or step<N>/rank<R> folder in it")
    return sorted(found, key=lambda folder: (_number(folder.parent), str(folder.parent), _number(folder)))


def read(folder: str | Path) -> StepDump:
    """Read one process's dump of one step; DumpError when it is none or its schema is newer than this package."""
    folder = Path(folder)
    dump = _read_json(folder / "dump.json")
    manifest = _read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else None
    if manifest is not None and manifest.get("schema_version", 0) > SCHEMA_VERSION:
        raise DumpError(
            f"{folder} has schema version {manifest['schema_version']}; "
            f"this version of msprobe_graph reads up to {SCHEMA_VERSION}"
        )
    construct, stack, saved = (
        _read_json(folder / name) if (folder / name).exists() else {}
        for name in ("construct.json", "stack.json", "debug.json")
    )
    data = dump.get("data")
    if not isinstance(data, dict):
        raise DumpError(f'{folder / "dump.json"} holds no entries: expected an object with "data"')
    data.update(saved.get("data", {}))
    return StepDump(folder, str(dump.get("task")), str(dump.get("level")), data, construct, stack, manifest)


def _number(folder: Path) -> int:
    """The N of ``step<N>``, ``rank<N>`` or ``proc<N>``."""
    match = _NUMBER.search(folder.name)
    return int(match[0]) if match else -1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), object_hook=_restore)
    except (OSError, ValueError) as error:
        raise DumpError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DumpError(f"{path} holds a JSON {type(content).__name__}: expected an object")
    return content


def _restore(record: dict[str, Any]) -> dict[str, Any]:
    """A tensor's statistics written as the string "nan" become floats again (1e999 already is one)."""
    if record.get("type") == "torch.Tensor" and "nan" in record.values():
        return {key: math.nan if value == "nan" else value for key, value in record.items()}
    return record


def _tensors(value: Any, position: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if isinstance(value, dict):
        if value.get("type") == "torch.Tensor":
            yield position, value
            return
        for key, item in value.items():
            yield from _tensors(item, (*position, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _tensors(item, (*position, str(index)))
