"""The one writer: a background thread that turns steps into files, off the hot path.

Steps and tensors are handed over in order and written in order. A step's folder is whole when its manifest says
"finished": a folder with JSON alone appears in one piece, and in one with tensors the manifest is the last file
written, and each file of JSON is replaced in one piece. So a process killed at any moment leaves finished steps whole
and an unfinished one recognisable.

With a ring, steps go into it in place of the files, and from there into files when something fires.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from .boundary import Boundary
from .encode import SameAgain, complete, document, entry_lines, lines, refuse, share
from .folder import TENSOR_FOLDER, step_folder, write_folder, write_whole
from .manifest import Manifests, Provenance
from .records import NOT_REPLAYED, OVERRUN, Block, Flushed, Hole, Step
from .ring import Ring, free_memory
from .saved import File, Saved
from .stack import Stacks

log = logging.getLogger("msprobe_graph")

QUEUED_BYTES = 1 << 30
"""Tensors waiting to be written may take this much memory; then capture waits for the disk."""
QUEUED_STEPS = 64
"""As many steps may wait to be written; then capture waits for the disk."""
DRAFT_SECONDS = 0.5


class _Wake(msgspec.Struct):
    """There is a draft to wait for."""


class _Flush(msgspec.Struct):
    done: threading.Event
    room: int = 0
    """So many bytes are to be given, by dropping steps from the ring."""


class _Fire(msgspec.Struct):
    flushed: Flushed
    running: bool


class _Drop(msgspec.Struct):
    """What has come of the step that runs is not wanted."""

    step: int


_Job = File | Step | _Drop | _Fire | _Wake | _Flush


class Writer:
    """Writes one process's steps under `dump_path`.

    `max_bytes` bounds what is written in all; once it is reached `full` is True and tensors are no longer taken (the
    step that is being captured is still written). An OSError (disk full, folder gone) sets `failed` and is logged
    once: from then on everything handed over is dropped.

    With a `ring` only what it lets go is written. The tensors in it count against `max_bytes`, and its oldest steps are
    dropped for newer ones to have room.
    """

    def __init__(
        self,
        dump_path: Path,
        provenance: Provenance,
        boundary: Boundary,
        max_bytes: int | None = None,
        ring: Ring | None = None,
    ) -> None:
        self.dump_path = dump_path
        self.provenance = provenance
        self.max_bytes = max_bytes if max_bytes is not None else _spare_bytes(dump_path, in_memory=ring is not None)
        self.written = 0
        """Bytes on disk and bytes accepted for it or for the ring."""
        self._kept = 0
        """Of these, bytes that the ring may drop."""
        self.failed: OSError | None = None
        self._ring = ring
        self._short = False
        """Steps had to be dropped to make room."""
        self._boundary = boundary
        self._manifests = Manifests(provenance)
        self._stacks = Stacks()
        self._tree = SameAgain()
        """Of construct.json."""
        # A SimpleQueue, because fire() puts into it from a signal handler, in the middle of anything.
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
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
        return self.written - self._kept >= self.max_bytes

    def folder(self, step: int) -> Path:
        return step_folder(self.dump_path, step, self.provenance.process)

    def tensor_file(self, step: int, name: str) -> Path:
        return self.folder(step) / TENSOR_FOLDER / name

    def save(self, step: int, name: str, value: torch.Tensor) -> Saved | None:
        """Take a private copy of a tensor to be written as `name`; waits while QUEUED_BYTES are taken.

        None when it is not taken because `max_bytes` is reached.
        """
        size = value.untyped_storage().nbytes()
        if self._ring is not None and self.written + size > self.max_bytes:
            self._drain(room=size)
        with self._room:
            if self.written + size > self.max_bytes:
                if self._ring is None:
                    self.written = self.max_bytes
                return None
            self.written += size
            if self._ring is not None:
                self._kept += size
            self._room.wait_for(lambda: self._queued_bytes == 0 or self._queued_bytes + size <= QUEUED_BYTES)
            self._queued_bytes += size
        saved = Saved(value, size)
        self._jobs.put(File(step, name, saved, queued=size))
        return saved

    def save_again(self, step: int, name: str, saved: Saved) -> bool:
        """Like `save`, for values that were handed over before: the two become one file on disk.

        False when they are there no longer, because the steps that had them left the ring, or their file is gone.
        """
        with self._room:
            if saved.value is None and (saved.path is None or not saved.path.exists()):
                return False
            saved.wanted += 1
        self._jobs.put(File(step, name, saved))
        return True

    def draft(self, step: Callable[[], Step]) -> None:
        """Take a step that may go on. It is asked for and written, as unfinished, when nothing else has come for
        DRAFT_SECONDS. A ring has no use for it."""
        if self._ring is None:
            self._draft = step
            self._jobs.put(_Wake())

    def submit(self, step: Step) -> None:
        """Take a step. One that is not finished may be submitted again later, with more entries at its end; a ring has
        no use for it."""
        with self._room:
            self._draft = None
            self._room.wait_for(lambda: self._queued_steps < QUEUED_STEPS)
            self._queued_steps += 1
        self._jobs.put(step)

    def drop(self, step: int) -> None:
        """Forget what has come of a step that runs, as if it had not begun."""
        with self._room:
            self._draft = None
        self._jobs.put(_Drop(step))

    def fire(self, flushed: Flushed, running: bool) -> None:
        """Have all that the ring keeps written and, if its step is still `running`, that one too when it ends. May be
        called in a signal handler: it doesn't wait."""
        self._jobs.put(_Fire(flushed, running))

    def wait(self, behind: int) -> None:
        """Return when at most so many of the steps handed over are not on disk yet, or in the ring."""
        if self._queued_steps > behind and self.pid == os.getpid():
            with self._room:
                self._room.wait_for(lambda: self._queued_steps <= behind)

    def flush(self) -> None:
        """Return when all that was handed over is on disk or in the ring (or, after a failure, dropped)."""
        if self.pid == os.getpid():
            self._drain()

    def close(self) -> None:
        """The end: flush, and say so when a ring has kept all for itself."""
        self.flush()
        if self._ring is not None and self._ring.kept and not self._ring.has_fired:
            count = len(self._ring.kept)
            log.warning(
                "%s kept and none of %s fired, so nothing was written to %s",
                "1 step was" if count == 1 else f"{count} steps were",
                ", ".join(self._ring.flush_on),
                self.dump_path,
            )

    def _drain(self, room: int = 0) -> None:
        done = threading.Event()
        self._jobs.put(_Flush(done, room))
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
                self._make_room(job.room)
                job.done.set()
            elif not isinstance(job, _Wake):
                if self.failed is None:
                    self._boundary.attempt(str(self.dump_path), self._take, job)
                self._done(job)

    def _done(self, job: File | Step | _Drop | _Fire) -> None:
        with self._room:
            if isinstance(job, Step):
                self._queued_steps -= 1
            elif isinstance(job, File):
                self._queued_bytes -= job.queued
                if self.failed is not None:
                    job.saved.value = None
            self._room.notify_all()

    def _take(self, job: File | Step | _Drop | _Fire) -> None:
        ring = self._ring
        if isinstance(job, _Fire):
            if ring is not None:
                self._let_go(ring, ring.fire(job.flushed, job.running))
        elif isinstance(job, _Drop):
            if ring is None:
                shutil.rmtree(self.folder(job.step), ignore_errors=True)
                with suppress(OSError):  # other processes have it, too
                    self.folder(job.step).parent.rmdir()
            else:
                self._forget(ring.drop())
        elif isinstance(job, File):
            if ring is None:
                self._write(job)
            else:
                ring.hold(job)
        elif ring is None:
            _complete(job)
            _take_encoded(job)
            self._write(job)
        elif job.finished:
            _complete(job)
            _take_replayed(job)
            fired = ring.end(job)
            while len(ring.kept) > ring.keep_last:
                self._forget(ring.kept.popleft().files)
            if fired is not None:
                self._let_go(ring, fired)

    def _let_go(self, ring: Ring, fired: Flushed) -> None:
        """Write all that the ring keeps, the oldest step first."""
        ring.tell(fired, self.dump_path)
        while ring.kept:
            kept = ring.kept.popleft()
            ring.has_fired = True
            for file in kept.files:
                self._write(file)
            kept.step.flushed = fired
            self._write(kept.step)

    def _make_room(self, size: int) -> None:
        """Drop the oldest steps for `size` bytes more, unless that can never be enough."""
        ring = self._ring
        if ring is None or self.written - self._kept + size > self.max_bytes:
            return
        while ring.kept and self.written + size > self.max_bytes:
            if not self._short:
                self._short = True
                log.warning(
                    "fewer than keep_last (%d) steps are kept, because more would pass max_bytes (%d)",
                    ring.keep_last,
                    self.max_bytes,
                )
            self._forget(ring.kept.popleft().files)

    def _forget(self, files: Iterable[File]) -> None:
        """Let go of files of the ring; the bytes that no step needs any more are free again."""
        with self._room:
            for file in files:
                saved = file.saved
                saved.wanted -= 1
                if not saved.wanted and saved.value is not None:
                    saved.value = None
                    self.written -= saved.size
                    self._kept -= saved.size

    def _write(self, job: File | Step) -> None:
        if self.failed is not None:
            return
        try:
            if isinstance(job, Step):
                self._write_step(job)
            else:
                self._write_file(job)
        except OSError as error:
            self.failed = error
            log.error(
                "msprobe_graph stopped writing to %s (%s); what was captured since is lost", self.dump_path, error
            )

    def _write_file(self, file: File) -> None:
        path = self.tensor_file(file.step, file.name)
        if not path.parent.exists():
            self._begin(path.parent.parent, file.step)
            path.parent.mkdir()
        saved = file.saved
        if saved.value is not None:
            try:
                _save_tensor(saved.value, path)
                saved.path = path
            finally:
                saved.value = None
            if self._ring is not None:
                with self._room:
                    self._kept -= saved.size
        elif saved.path is not None:
            try:
                os.link(saved.path, path)
            except OSError:  # a file system without hard links
                shutil.copyfile(saved.path, path)

    def _begin(self, folder: Path, step: int) -> None:
        """Make the step's folder, with a manifest that says that the step is not finished."""
        if not folder.exists():
            folder.mkdir(parents=True)
            write_whole(folder / "manifest.json", self._manifests.encode(Step(step)))

    def _write_step(self, step: Step) -> None:
        folder = self.folder(step.number)
        begun = folder.exists()
        head = self._head(folder)
        files = {
            "dump.json": document(head, [*(block.lines or b"" for block in step.blocks), entry_lines(step.entries)]),
            "stack.json": self._stacks.encode(step.all_entries),
            "construct.json": self._tree.encode(self._construct(step)),
        }
        if step.saved:
            files["debug.json"] = document(head, [lines(step.saved.items())])
        with self._room:
            self.written += sum(map(len, files.values()))
        if self.full:
            step.holes.append(Hole("later steps", f"max_bytes ({self.max_bytes}) is reached"))
        files["manifest.json"] = self._manifests.encode(step)
        if not begun:
            write_folder(folder, files)
            return
        for name, content in files.items():
            write_whole(folder / name, content)

    def _construct(self, step: Step) -> dict[str, str | None]:
        """Each entry's parent; empty at the levels that know no modules, as msProbe's is."""
        if self.provenance.level not in ("L0", "mix"):
            return {}
        return {entry.name: entry.parent for entry in step.all_entries if entry.nested}

    def _head(self, folder: Path) -> dict[str, str | None]:
        tensors = folder / TENSOR_FOLDER
        return {
            "task": self.provenance.task,
            "level": self.provenance.level,
            "framework": "pytorch",
            "dump_data_dir": str(tensors) if tensors.exists() else None,
        }


def _complete(step: Step) -> None:
    """Fill in the statistics of all records."""
    if step.rows is None:
        return
    statistics = step.rows.fetch()
    again = 0
    for row, record in step.records.items():
        found = statistics[row]
        if found is None:
            refuse(record, NOT_REPLAYED)
        else:
            complete(record, found)
            again += found.replayed is not None and found.replayed.times > 1
    for measured, other, shape in step.shared:
        share(measured, other, shape)
    if again:
        step.holes.append(Hole(f"{again} values", OVERRUN))
    step.measured = [*step.records.values(), *(other for _, other, _ in step.shared)]


def _take_replayed(step: Step) -> None:
    """Put the entries of what was replayed in front of the others."""
    blocks = [block for replay in step.replays if (block := replay.complete()) is not None]
    _add(blocks, step)
    step.entries[:0] = [entry for block in blocks for entry in block.entries]
    step.measured += [record for block in blocks for record in block.measured]


def _take_encoded(step: Step) -> None:
    """The same for a step that is written at once."""
    step.blocks = [block for replay in step.replays if (block := replay.encode()) is not None]
    _add(step.blocks, step)


def _add(blocks: Iterable[Block], step: Step) -> None:
    for block in blocks:
        step.holes += block.holes
        step.graphs.update(block.graphs)


def _save_tensor(value: torch.Tensor, path: Path) -> None:
    """torch.save, which makes a RuntimeError of a disk that refuses."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise OSError(f"torch.save could not write {path}: {error}".partition("\n")[0]) from error


def _spare_bytes(dump_path: Path, in_memory: bool) -> int:
    """What a dump may take when nobody says: four fifths of the free disk, of the free memory half."""
    on_disk = shutil.disk_usage(dump_path).free * 4 // 5
    memory = free_memory() if in_memory else None
    return on_disk if memory is None else min(on_disk, memory // 2)
