"""The one writer: a background thread that turns steps into files, off the hot path.

Steps and tensors are handed over in order and written in order. With a ring, steps go into it in place of the files,
and from there into files when something fires.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from .boundary import Boundary
from .budget import Budget, spare_bytes
from .forms import Forms
from .lane import Lane, lanes
from .manifest import Provenance
from .records import Flushed, Step
from .ring import Ring
from .ring_files import RingFiles
from .saved import File, Saved
from .step_files import StepFiles

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

    `max_bytes` bounds what is written in all; once it is reached `budget` is full and tensors are no longer taken (the
    step that is being captured is still written). Once `files` have failed everything handed over is dropped. With a
    `ring` only what it lets go is written.
    """

    def __init__(
        self,
        dump_path: Path,
        provenance: Provenance,
        boundary: Boundary,
        max_bytes: int | None = None,
        ring: Ring | None = None,
    ) -> None:
        self.budget = Budget(max_bytes if max_bytes is not None else spare_bytes(dump_path, in_memory=ring is not None))
        self.files = StepFiles(dump_path, provenance, self.budget)
        self._ring = None if ring is None else RingFiles(ring, self.files, self.budget)
        self._lane: Lane | None = None
        """Takes the steps of known forms."""
        if ring is None and lanes():
            self.files.forms = Forms()
            self._lane = Lane(self.files.forms, self.files.path, self.budget, self._put)
        self._queued: int | None = None
        """The last step of which something went into the queue, a draft or that it was dropped: what comes of it must
        not overtake that."""
        self._boundary = boundary
        self._path = str(dump_path)
        # A SimpleQueue, because fire() puts into it from a signal handler, in the middle of anything.
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._queued_bytes = 0
        self._queued_steps = 0
        self._draft: Callable[[], Step] | None = None
        self._drafted = False
        """A draft was taken since `undraft` was called, be it asked for by now or not."""
        self.pid = os.getpid()
        """The process in which the writer's thread runs: in one forked from it there is none."""
        # Started here and not when there is work: at the interpreter's exit, when the last step comes, no thread
        # starts.
        threading.Thread(target=self._run, name="msprobe_graph writer", daemon=True).start()

    def save(self, step: int, name: str, value: torch.Tensor) -> Saved | None:
        """Take a private copy of a tensor to be written as `name`; waits while QUEUED_BYTES are taken.

        None when it is not taken because `max_bytes` is reached.
        """
        size = value.untyped_storage().nbytes()
        if self._ring is not None and not self.budget.has(size):
            self._drain(room=size)
        if not self.budget.take(size, kept=self._ring is not None):
            return None
        with self._room:
            self._room.wait_for(lambda: self._has_room(size))
            self._queued_bytes += size
        saved = Saved(value, size)
        self._jobs.put(File(step, name, saved, queued=size))
        return saved

    def save_again(self, step: int, name: str, saved: Saved) -> bool:
        """Like `save`, for values that were handed over before: the two become one file on disk.

        False when they are there no longer, because the steps that had them left the ring, or their file is gone.
        """
        if not saved.want():
            return False
        self._jobs.put(File(step, name, saved))
        return True

    def draft(self, step: Callable[[], Step]) -> None:
        """Take a step that may go on. It is asked for, on the writer's thread, and written, as unfinished, when nothing
        else has come for DRAFT_SECONDS. A ring has no use for it."""
        if self._ring is None:
            self._drafted = True
            self._draft = step
            self._jobs.put(_Wake())

    def undraft(self) -> None:
        """Call this before the step goes on or ends: the draft is asked no more, nor is it being asked when this
        returns."""
        if self._drafted:
            with self._room:
                self._draft, self._drafted = None, False

    def submit(self, step: Step) -> None:
        """Take a step. One that is not finished may be submitted again later, with more entries at its end; a ring has
        no use for it."""
        if self.pid != os.getpid():
            return
        lane = None if self.files.failed is not None or step.number == self._queued else self._lane
        if lane is not None and lane.take(step):
            lane.wait(QUEUED_STEPS)
            return
        self._queued = step.number
        self._put(step)

    def _put(self, step: Step) -> None:
        size = step.arriving
        with self._room:
            self._room.wait_for(lambda: self._queued_steps < QUEUED_STEPS and self._has_room(size))
            self._queued_steps += 1
            self._queued_bytes += size
        self._jobs.put(step)

    def drop(self, step: int) -> None:
        """Forget what has come of a step that runs, as if it had not begun."""
        self._queued = step
        self._jobs.put(_Drop(step))

    def fire(self, flushed: Flushed, running: bool) -> None:
        """Have all that the ring keeps written and, if its step is still `running`, that one too when it ends. May be
        called in a signal handler: it doesn't wait."""
        self._jobs.put(_Fire(flushed, running))

    def wait(self, behind: int) -> None:
        """Return when at most so many of the steps handed over are not on disk yet, or in the ring."""
        # In this order: a step that the lane does not write is in the queue before it is out of the lane.
        while (in_lane := self._in_lane) + self._queued_steps > behind and self.pid == os.getpid():
            if self._lane is not None and in_lane:
                self._lane.wait(in_lane - 1)  # not asked again: the lane may have settled one meanwhile
            else:
                with self._room:
                    self._room.wait_for(lambda: self._queued_steps <= behind)

    def flush(self) -> None:
        """Return when all that was handed over is on disk or in the ring (or, after a failure, dropped)."""
        if self.pid == os.getpid():
            if self._lane is not None:
                self._lane.wait(0)
            self._drain()

    def close(self) -> None:
        """The end: flush, and say so when a ring has kept all for itself."""
        self.flush()
        if self._ring is not None:
            self._ring.close()

    @property
    def _in_lane(self) -> int:
        """How many steps are there."""
        return 0 if self._lane is None else self._lane.waiting

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more may wait to be written."""
        return size == 0 or self._queued_bytes == 0 or self._queued_bytes + size <= QUEUED_BYTES

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
                with self._room:  # undraft() waits, so that the step can't go on meanwhile
                    draft, self._draft = self._draft, None
                    step = self._boundary.attempt(self._path, draft) if draft is not None else None
                    if step is not None:
                        self._queued = step.number
                        self._queued_steps += 1
                        return step
        return self._jobs.get()

    def _run(self) -> None:
        while True:
            job = self._next()
            if isinstance(job, _Flush):
                if self._ring is not None:
                    self._ring.make_room(job.room)
                job.done.set()
            elif not isinstance(job, _Wake):
                if self.files.failed is None:
                    self._boundary.attempt(self._path, self._take, job)
                self._done(job)

    def _done(self, job: File | Step | _Drop | _Fire) -> None:
        with self._room:
            if isinstance(job, Step):
                self._queued_steps -= 1
                self._queued_bytes -= job.arriving
            elif isinstance(job, File):
                self._queued_bytes -= job.queued
                if self.files.failed is not None:
                    job.saved.value = None
            self._room.notify_all()

    def _take(self, job: File | Step | _Drop | _Fire) -> None:
        sink = self.files if self._ring is None else self._ring
        if isinstance(job, _Fire):
            if self._ring is not None:
                self._ring.fire(job.flushed, job.running)
        elif isinstance(job, _Drop):
            sink.drop(job.step)
        elif isinstance(job, File):
            sink.take_file(job)
        else:
            sink.take_step(job)
