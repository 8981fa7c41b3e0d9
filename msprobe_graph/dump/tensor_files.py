"""Numbered tensor files, ``x_0.pt``, ``x_1.pt``, ...: a background thread writes them, off the hot path.

A file takes its name only when it is whole, so a process killed at any moment leaves no half file under that name.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from .boundary import Boundary

log = logging.getLogger("msprobe_graph")

T = TypeVar("T")

QUEUED_BYTES = 1 << 30
"""Tensors waiting to be written may take this much memory; then save() waits for the disk."""

Host = tuple[torch.Tensor, Callable[[], None]]
"""A tensor in host memory that nobody else changes, and what to call until its values have arrived there."""


class _File(msgspec.Struct):
    path: Path
    number: int
    size: int
    host: Host


class _Flush(msgspec.Struct):
    done: threading.Event


class TensorFiles:
    """Gives each tensor saved under a path the next number of that path and writes it.

    ``dump/x`` and ``dump/x.pt`` are one path, and so are its relative and its absolute spelling; other suffixes belong
    to the name (``layer.3`` becomes ``layer.3_0.pt``). Numbers count this process's calls from 0: a call that fails
    leaves a gap. May be used from several threads.
    """

    def __init__(self, queued_bytes: int = QUEUED_BYTES) -> None:
        self.lost = 0
        """How many tensors could not be saved."""
        self._limit = queued_bytes
        self._numbers: dict[str, int] = {}
        """Of each path that was looked at, without its suffix: the number of the next file."""
        self.restart()

    def restart(self) -> None:
        """To be called in a forked process, which has the numbers but not the thread, and locks that no one opens.

        What waits to be written is the parent's to write.
        """
        self._boundary = Boundary()
        self._jobs: queue.SimpleQueue[_File | _Flush] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._room = threading.Condition()
        self._queued = 0
        self._thread: threading.Thread | None = None

    def expect(self, path: str) -> None:
        """Make the folder of `path` and raise, one sentence, when files can't be written there.

        ValueError when `path` names no file, OSError for what the file system says. A path is looked at once.
        """
        stem = _stem(path)
        if stem in self._numbers:
            return
        folder = Path(stem).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            _part(_file(stem, 10**6)).exists()  # raises when the name is too long
        except OSError as error:
            code = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno or errno.EIO
            raise OSError(code, f"acl_save can't write {path!r}: {os.strerror(code)}") from error
        self._numbers.setdefault(stem, 0)

    def attempt(self, path: str, save: Callable[..., T], *args: Any) -> T | None:
        """What `save` returns. Whatever fails in it is logged once, counted as lost, and goes no further."""
        return self._boundary.attempt(path, save, *args)

    def save(self, path: str, size: int, read: Callable[[], Host]) -> None:
        """Take what `read` returns, `size` bytes, as the next file of `path`; waits while QUEUED_BYTES are taken.

        `read` runs before this returns. Whatever fails is logged once, counted in `lost`, and goes no further.
        """
        self.attempt(path, self._take, path, size, read)

    def write(self, path: str, read: Callable[[], torch.Tensor]) -> None:
        """Write what `read` returns, a tensor in host memory, as the next file of `path`, in this thread.

        It waits for nothing but the disk; above all not for what save() has taken, which may wait for a device.
        Whatever fails is treated as in save().
        """
        self.attempt(path, self._write_now, path, read)

    def _take(self, path: str, size: int, read: Callable[[], Host]) -> None:
        file, number = self._next(path)
        with self._lock:
            if self._thread is None:
                self._start()
        with self._room:
            self._room.wait_for(lambda: self._queued == 0 or self._queued + size <= self._limit)
            self._queued += size
        host: Host | None = None
        try:
            host = read()
            self._jobs.put(_File(file, number, size, host))
        except (RuntimeError, OSError) as error:  # torch's out of memory is a RuntimeError
            self._lose(file, error)
        finally:
            if host is None:
                self._release(size)

    def _write_now(self, path: str, read: Callable[[], torch.Tensor]) -> None:
        file, number = self._next(path)
        try:
            tensor = read()
        except (RuntimeError, OSError) as error:
            self._lose(file, error)
        else:
            self._write(file, number, tensor)

    def _next(self, path: str) -> tuple[Path, int]:
        """The next file of `path`, and its number."""
        stem = _stem(path)
        with self._lock:
            number = self._numbers.get(stem, 0)
            self._numbers[stem] = number + 1
        return _file(stem, number), number

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="msprobe_graph tensor files", daemon=True)
        thread.start()
        self._thread = thread
        # A process that multiprocessing has forked ends without running what atexit holds.
        Finalize(None, self.close, exitpriority=0)

    def flush(self) -> None:
        """Return when all that was saved before is on disk (or lost)."""
        if self._thread is not None:
            done = threading.Event()
            self._jobs.put(_Flush(done))
            done.wait()

    def close(self) -> None:
        """The end: everything is on disk, and what is missing is said. Saving may still go on."""
        self.flush()
        if lost := self.lost + self._boundary.failures:
            log.error("acl_save: %d tensors could not be saved", lost)
            self.lost = self._boundary.failures = 0

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if isinstance(job, _Flush):
                job.done.set()
            else:
                self.attempt(str(job.path), self._arrive_and_write, job)
                size = job.size
                del job  # its memory goes before the room for it is given away
                self._release(size)

    def _release(self, size: int) -> None:
        with self._room:
            self._queued -= size
            self._room.notify_all()

    def _arrive_and_write(self, job: _File) -> None:
        tensor, arrive = job.host
        arrive()
        self._write(job.path, job.number, tensor)

    def _write(self, path: Path, number: int, tensor: torch.Tensor) -> None:
        part = _part(path)
        try:
            if number == 0 and path.exists():
                log.warning(
                    "acl_save replaces %s, of another run or process; later numbers may be left over from it", path
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(tensor, file)
            part.replace(path)
        except OSError as error:
            self._lose(path, error)
        except RuntimeError as error:  # torch.save's writer, when the file raised while it was being closed
            self._lose(path, error.__context__ or error)

    def _lose(self, file: Path, error: BaseException) -> None:
        self.lost += 1
        if self.lost == 1:
            log.error(
                "acl_save could not save %s (%s); the model goes on, and further failures are counted, not logged",
                file,
                error,
            )


def _stem(path: str) -> str:
    """The absolute path without ``.pt``: what all files of `path` have in common."""
    if "\0" in path or Path(path).name in ("", "..", ".pt") or path.endswith(("/", "/.")):
        raise ValueError(f"acl_save needs the path of a file, such as 'dump/x.pt', not {path!r}")
    return os.path.abspath(path.removesuffix(".pt"))  # noqa: PTH100, Path.resolve would ask the disk at each call


def _file(stem: str, number: int) -> Path:
    return Path(f"{stem}_{number}.pt")


def _part(file: Path) -> Path:
    """What `file` is called until it is whole."""
    return file.with_name(file.name + ".part")
