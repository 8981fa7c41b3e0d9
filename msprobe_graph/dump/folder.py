"""Where a run's dumps lie, and how a run takes possession of its dump_path.

::

    <dump_path>/run.json                       which run the steps beside it belong to
    <dump_path>/step<N>/rank<R>|proc<PID>/     dump.json, stack.json, construct.json, manifest.json
                        dump_tensor_data/*.pt
    <dump_path>.20260122T101500Z/              an earlier run's steps, moved aside
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .template import writing

SCHEMA_VERSION = 1
"""The version of this layout and of what the files in it hold; it grows when an older reader would misread a dump."""
TENSOR_FOLDER = "dump_tensor_data"
RUN_FILE = "run.json"
PART = ".part"
"""Ends the name of what is not whole yet."""
STEP = re.compile(r"step(\d+)")
"""The name of a step's folder."""
RUN_VARIABLE = "MSPROBE_GRAPH_RUN"
"""Environment variable that names the run, where several processes that share a dump_path can't tell by themselves."""


def run_identity(world_size: int, nth: int, name: str | None = None) -> str:
    """A name that all processes of one run agree on, and no other run bears.

    Ranks of one job on one host share their parent process (torchrun, vLLM's engine); a lone process is its own. `nth`
    counts the captures begun in this process. A framework that has a name for the run gives it; a job over several
    hosts sets MSPROBE_GRAPH_RUN.
    """
    if named := os.environ.get(RUN_VARIABLE) or name:
        return f"{named}/{nth}"
    owner = os.getppid() if world_size > 1 else os.getpid()
    return f"{owner}@{_started(owner)}/{nth}"


def _started(pid: int) -> str:
    """When process `pid` started, in clock ticks since boot: tells it from a later process of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "unknown"


def claim(dump_path: Path, run: str) -> Path | None:
    """Make `dump_path` this run's: the steps of any other run are moved aside, never mixed and never lost.

    Whatever else lies in `dump_path`, which may well be the user's working directory, stays where it is. Returns where
    they were moved to, or None where nothing had to move. OSError when the folder can't be written.
    """
    dump_path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(dump_path.parent):
        moved = None
        steps = [folder for folder in dump_path.glob("step*") if STEP.fullmatch(folder.name)]
        if steps and _owner(dump_path) != run:
            moved = _free_name(dump_path)
            moved.mkdir()
            for earlier in [*steps, *dump_path.glob(RUN_FILE)]:
                earlier.rename(moved / earlier.name)
        dump_path.mkdir(exist_ok=True)
        (dump_path / RUN_FILE).write_text(json.dumps({"run": run}) + "\n")
        return moved


def _owner(dump_path: Path) -> str | None:
    try:
        owner = json.loads((dump_path / RUN_FILE).read_text())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return owner if isinstance(owner, str) else None


def _free_name(dump_path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    free = dump_path.with_name(f"{dump_path.name}.{stamp}")
    again = 1
    while free.exists():
        free = dump_path.with_name(f"{dump_path.name}.{stamp}.{again}")
        again += 1
    return free


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time; the lock is on the folder itself, so nothing is left behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def step_folder(dump_path: str, step: int, process: str) -> str:
    """``<dump_path>/step<N>/<process>``, where `process` is ``rank<R>`` or ``proc<PID>``."""
    return f"{dump_path}/step{step}/{process}"


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` so that a reader, or a kill in between, sees the old file or the new one and never half of one."""
    part = f"{path}{PART}"
    _write(part, content)
    os.replace(part, path)  # noqa: PTH105, the path need not be taken apart


def write_folder(folder: Path, files: Mapping[str, bytes], same: Mapping[str, Path]) -> bool:
    """Make a folder that nobody sees before all its files are there: with fewer calls of the system, which take longer
    than the writing, than by `write_whole`. `same` has files with the contents of some, which become one with them.
    False where there is one already: then nothing is done."""
    part = f"{folder}{PART}"
    if _write_natively(str(folder), part, files, same):
        return True
    if folder.exists():
        shutil.rmtree(part, ignore_errors=True)
        return False
    _make(part)
    for name, content in files.items():
        if name not in same or not _link(same[name], f"{part}/{name}"):
            _write(f"{part}/{name}", content)
    os.rename(part, folder)  # noqa: PTH104, as above
    return True


def _write_natively(folder: str, part: str, files: Mapping[str, bytes], same: Mapping[str, Path]) -> bool:
    """Whether that was done by the compiled code: not without it, nor where anything is in the way."""
    write = _native()
    if write is None:
        return False
    contents = [
        _Content(name.encode(), content, len(content), os.fsencode(same[name]) if name in same else None)
        for name, content in files.items()
    ]
    return bool(write(os.fsencode(folder), os.fsencode(part), (_Content * len(contents))(*contents), len(contents)))


class _Content(ctypes.Structure):
    """A file, as writing/files.h has it."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("text", ctypes.c_char_p),
        ("size", ctypes.c_int64),
        ("same", ctypes.c_char_p),
    )


@functools.cache
def _native() -> Callable[..., int] | None:
    """The code in writing/, which is optional."""
    text = ctypes.c_char_p
    return writing("msprobe_graph_write_folder", ctypes.c_int32, text, text, ctypes.c_void_p, ctypes.c_int64)


def _make(folder: str) -> None:
    """A folder in one that as a rule isn't there yet, either."""
    with suppress(FileExistsError, FileNotFoundError):
        os.mkdir(os.path.dirname(folder))  # noqa: PTH102, PTH120, as above
    try:
        os.mkdir(folder)  # noqa: PTH102, as above
    except FileExistsError:  # what is left of one that did not become whole; its files may be those of others, too
        shutil.rmtree(folder)
        os.mkdir(folder)  # noqa: PTH102, as above
    except FileNotFoundError:
        Path(folder).mkdir(parents=True)


def _link(file: Path, path: str) -> bool:
    """Whether `path` is now another name of `file`."""
    try:
        os.link(file, path)
    except OSError:  # it is gone, or has too many names, or the file system has no links
        return False
    return True


def _write(path: str, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(content)
        while rest:  # a disk that is nearly full takes less than it is given
            rest = rest[os.write(file, rest) :]
    finally:
        os.close(file)
