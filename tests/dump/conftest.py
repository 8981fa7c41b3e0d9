"""A recorder and a writer as a capture has them, and their files read back strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from msprobe_graph.config import load_settings
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.manifest import Provenance
from msprobe_graph.dump.records import Entry
from msprobe_graph.dump.writer import Writer
from msprobe_graph.taps.recorder import Recorder

Strict: TypeAlias = Callable[[Path], Any]
"""Reads a JSON file; the bare words NaN and Infinity, which are no JSON, fail the test."""
NewWriter: TypeAlias = Callable[..., Writer]
"""A writer for a folder of its own; `max_bytes` and what differs in the provenance may be given."""
Written: TypeAlias = Callable[..., dict[str, Any]]
"""One entry with the given parts, as dump.json holds it."""


@pytest.fixture
def strict() -> Strict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return lambda path: json.loads(path.read_bytes(), parse_constant=refuse)


@pytest.fixture
def new_writer(tmp_path: Path) -> Iterator[NewWriter]:
    writers = []

    def make(dump_path: Path | None = None, max_bytes: int | None = None, **differs: str) -> Writer:
        dump_path = dump_path or tmp_path / f"dump{len(writers)}"
        dump_path.mkdir(exist_ok=True)
        told = {
            "process": "rank0",
            "device": "cpu",
            "package": "0",
            "model": "Model",
            "task": "statistics",
            "level": "mix",
            "run": "test",
        }
        writers.append(Writer(dump_path, Provenance(config={}, **{**told, **differs}), Boundary(), max_bytes))
        return writers[-1]

    yield make
    for writer in writers:
        writer.flush()


@pytest.fixture
def written(new_writer: NewWriter, strict: Strict) -> Written:
    def write(parts: dict[str, Any], save: bool = False, **settings: Any) -> dict[str, Any]:
        writer = new_writer()
        recorder = Recorder(load_settings({"dump_path": str(writer.files.dump_path), **settings}), writer)
        measured = {}
        for name, value in parts.items():
            stem = f"Torch.call.0.forward.{name}" if save else None
            measured[name] = recorder.value(value, stem)
        recorder.entries["Torch.call.0.forward"] = Entry("Torch.call.0.forward", measured, module="layers.0", number=2)
        writer.submit(recorder.as_step(True, 0, 0, [], []))
        writer.flush()
        entry: dict[str, Any] = strict(writer.files.folder(0) / "dump.json")["data"]["Torch.call.0.forward"]
        return entry

    return write
