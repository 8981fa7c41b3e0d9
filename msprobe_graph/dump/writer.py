"""The one writer: a background thread that turns steps into files, off the hot path.

Steps and tensors are handed over in order and written in order. A step's folder is whole when its manifest says
"finished": the manifest is the last file written, and every JSON file is replaced in one piece, so a process killed at
any moment leaves finished steps whole and an unfinished one recognisable.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from .boundary import Boundary
from .encode import complete, document, encoded, share, tree
from .folder import TENSOR_FOLDER, step_folder, write_whole
from .manifest import Provenance, manifest
from .records import Hole, Step
from .stack import grouped

log = logging.getLogger("msprobe_graph")

QUEUED_BYTES = 1 << 30
"""Tensors waiting to be written may take this much memory; then capture waits for the disk."""
QUEUED_STEPS = 64
"""As many steps may wait to be written; then capture waits for the disk."""
DRAFT_SECONDS = 0.5


class _Tensor(msgspec.Struct):
    step: int
    name: str
    value: torch.Tensor | Path
    """The values, or the file of an earlier step that holds the same ones."""


class _Wake(msgspec.Struct):
    """There is a draft to wait for."""


class _Flush(msgspec.Struct):
    done: threading.Event


_Job = _Tensor | Step | _Wake | _Flush


class Writer:
    """Writes one process's steps under `dump_path`.

    `max_bytes` bounds what is written in all; once it is reached `full` is True and tensors are no longer taken (the
    step that is being captured is still written). An OSError (disk full, folder gone) sets `failed` and is logged
    once: from then on everything handed over is dropped.
    """

    def __init__(
        self, dump_path: Path, provenance: Provenance, boundary: Boundary, max_bytes: int | None = None
    ) -> None:
        self.dump_path = dump_path
        self.provenance = provenance
        self.max_bytes = max_bytes if max_bytes is not None else shutil.disk_usage(dump_path).free * 4 // 5
        self.written = 0
        """Bytes on disk and bytes accepted for it."""
        self.failed: OSError | None = None
        self._boundary = boundary
        self._jobs: queue.Queue[_Job] = queue.Queue()
        self._room = threading.Condition()
        self._queued_bytes = 0
        self._queued_steps = 0
        self._draft: Callable[[], Step] | None = None
        self.pid = os.getpid()
        """The process in which the writer's thread runs: in one forked from it there is none."""
        # Started here and not when there is work: at the interpreter's exit, when the last step comes, no thread
        # starts.
        threading.Thread(target=self._run, name="msprobe_graph writer", daemon=True).start()

    @property
    def full(self) -> bool:
        return self.written >= self.max_bytes

    def folder(self, step: int) -> Path:
        return step_folder(self.dump_path, step, self.provenance.process)

    def tensor_file(self, step: int, name: str) -> Path:
        return self.folder(step) / TENSOR_FOLDER / name

    def save(self, step: int, name: str, value: torch.Tensor) -> bool:
        """Take a private copy of a tensor to be written as `name`; waits while QUEUED_BYTES are taken.

        False when it is not taken because `max_bytes` is reached.
        """
        size = value.untyped_storage().nbytes()
        if self.written + size > self.max_bytes:
            self.written = self.max_bytes
            return False
        self.written += size
        with self._room:
            self._room.wait_for(lambda: self._queued_bytes == 0 or self._queued_bytes + size <= QUEUED_BYTES)
            self._queued_bytes += size
        self._jobs.put(_Tensor(step, name, value))
        return True

    def save_again(self, step: int, name: str, earlier: Path) -> None:
        """Like `save`, for values that the file `earlier`, already handed over, holds: the two become one file on
        disk."""
        self._jobs.put(_Tensor(step, name, earlier))

    def draft(self, step: Callable[[], Step]) -> None:
        """Take a step that may go on. It is asked for and written, as unfinished, when nothing else has come for
        DRAFT_SECONDS."""
        self._draft = step
        self._jobs.put(_Wake())

    def submit(self, step: Step) -> None:
        """Take a step. One that is not finished may be submitted again later, with more entries at its end."""
        with self._room:
            self._draft = None
            self._room.wait_for(lambda: self._queued_steps < QUEUED_STEPS)
            self._queued_steps += 1
        self._jobs.put(step)

    def flush(self) -> None:
        """Return when all that was handed over is on disk (or, after a failure, dropped)."""
        if self.pid != os.getpid():
            return
        done = threading.Event()
        self._jobs.put(_Flush(done))
        done.wait()

    def _next(self) -> _Job:
        """The next job; the draft becomes one when nothing else comes."""
        while self._draft is not None:
            try:
                return self._jobs.get(timeout=DRAFT_SECONDS)
            except queue.Empty:
                with self._room:  # submit() waits, so that the step can't end meanwhile
                    draft, self._draft = self._draft, None
                    step = self._boundary.attempt(str(self.dump_path), draft) if draft is not None else None
                    if step is not None:
                        self._queued_steps += 1
                        return step
        return self._jobs.get()

    def _run(self) -> None:
        while True:
            job = self._next()
            if isinstance(job, _Flush):
                job.done.set()
            elif not isinstance(job, _Wake):
                if self.failed is None:
                    self._boundary.attempt(str(self.dump_path), self._write, job)
                self._done(job)

    def _done(self, job: _Tensor | Step) -> None:
        with self._room:
            if isinstance(job, Step):
                self._queued_steps -= 1
            elif isinstance(job.value, torch.Tensor):
                self._queued_bytes -= job.value.untyped_storage().nbytes()
            self._room.notify_all()

    def _write(self, job: _Tensor | Step) -> None:
        try:
            if isinstance(job, Step):
                self._write_step(job)
            else:
                self._write_tensor(job)
        except OSError as error:
            self.failed = error
            log.error(
                "msprobe_graph stopped writing to %s (%s); what was captured since is lost", self.dump_path, error
            )

    def _write_tensor(self, job: _Tensor) -> None:
        path = self.tensor_file(job.step, job.name)
        if not path.parent.exists():
            self._begin(job.step)
            path.parent.mkdir()
        if isinstance(job.value, torch.Tensor):
            torch.save(job.value, path)
            return
        try:
            os.link(job.value, path)
        except OSError:  # a file system without hard links, or the earlier step was deleted meanwhile
            shutil.copyfile(job.value, path)

    def _begin(self, step: int) -> Path:
        """The step's folder; the first time with a manifest that says that the step is not finished."""
        folder = self.folder(step)
        if not folder.exists():
            folder.mkdir(parents=True)
            write_whole(folder / "manifest.json", manifest(self.provenance, Step(step)))
        return folder

    def _write_step(self, step: Step) -> None:
        folder = self._begin(step.number)
        if step.rows is not None:
            statistics = step.rows.fetch()
            for row, record in step.records.items():
                complete(record, statistics[row])
            for measured, other in step.shared:
                share(measured, other)
        files = {
            "dump.json": document(self._head(step), encoded(step.entries)),
            "stack.json": tree(grouped(step.entries)),
            "construct.json": tree(self._construct(step)),
        }
        if step.saved:
            values = ((name, msgspec.json.encode(value)) for name, value in step.saved.items())
            files["debug.json"] = document(self._head(step), values)
        self.written += sum(map(len, files.values()))
        if self.full:
            step.holes.append(Hole("later steps", f"max_bytes ({self.max_bytes}) is reached"))
        files["manifest.json"] = manifest(self.provenance, step)
        for name, content in files.items():
            write_whole(folder / name, content)

    def _construct(self, step: Step) -> dict[str, str | None]:
        """Each entry's parent; empty at the levels that know no modules, as msProbe's is."""
        if self.provenance.level not in ("L0", "mix"):
            return {}
        return {entry.name: entry.parent for entry in step.entries if entry.nested}

    def _head(self, step: Step) -> dict[str, str | None]:
        tensors = self.folder(step.number) / TENSOR_FOLDER
        return {
            "task": self.provenance.task,
            "level": self.provenance.level,
            "framework": "pytorch",
            "dump_data_dir": str(tensors) if tensors.exists() else None,
        }
