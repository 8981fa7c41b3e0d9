"""Steps that go through a ring on their way to the files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from .budget import Budget
from .completion import complete_step
from .records import Flushed, Step
from .ring import Ring
from .saved import File, same_files
from .step_files import StepFiles

log = logging.getLogger("msprobe_graph")


class RingFiles:
    """Gives `files` what `ring` lets go, and nothing else.

    The tensors in the ring count in `budget`, and its oldest steps are dropped for newer ones to have room.
    """

    def __init__(self, ring: Ring, files: StepFiles, budget: Budget) -> None:
        self._ring = ring
        self._files = files
        self._budget = budget
        self._short = False
        """Steps had to be dropped to make room."""

    def take_step(self, step: Step) -> None:
        """Keep a step that is finished."""
        if not step.finished:
            return
        complete_step(step, self)
        ring = self._ring
        fired = ring.end(step)
        while len(ring.kept) > ring.keep_last:
            self._forget(ring.kept.popleft().files)
        if fired is not None:
            self._let_go(fired)

    def take_file(self, file: File) -> None:
        """Keep a file of the step that runs."""
        self._ring.hold(file)

    def keep(self, step: int, names: Sequence[str], value: torch.Tensor) -> bool:
        """See `saved.Sink`."""
        if not self._budget.has(value.nbytes):
            self.make_room(value.nbytes)
        if not self._budget.take(value.nbytes, kept=True):
            return False
        for file in same_files(step, names, value):
            self._ring.hold(file)
        return True

    def drop(self, step: int) -> None:
        """Forget the files of `step`, which runs."""
        self._forget(self._ring.drop())

    def fire(self, flushed: Flushed, running: bool) -> None:
        """See `Writer.fire`."""
        self._let_go(self._ring.fire(flushed, running))

    def make_room(self, size: int) -> None:
        """Drop the oldest steps for `size` bytes more, unless that can never be enough."""
        if not self._budget.could_have(size):
            return
        ring = self._ring
        while ring.kept and not self._budget.has(size):
            if not self._short:
                self._short = True
                log.warning(
                    "fewer than keep_last (%d) steps are kept, because more would pass max_bytes (%d)",
                    ring.keep_last,
                    self._budget.limit,
                )
            self._forget(ring.kept.popleft().files)

    def close(self) -> None:
        """Say so when the ring has kept all for itself."""
        ring = self._ring
        if ring.kept and not ring.has_fired:
            count = len(ring.kept)
            log.warning(
                "%s kept and none of %s fired, so nothing was written to %s",
                "1 step was" if count == 1 else f"{count} steps were",
                ", ".join(ring.flush_on),
                self._files.dump_path,
            )

    def _let_go(self, fired: Flushed) -> None:
        """Write all that the ring keeps, the oldest step first."""
        ring = self._ring
        ring.tell(fired, self._files.dump_path)
        while ring.kept:
            kept = ring.kept.popleft()
            ring.has_fired = True
            for file in kept.files:
                if file.saved.value is not None:
                    self._budget.spend(file.saved.size)
                self._files.write(file)
            kept.step.flushed = fired
            self._files.write(kept.step)

    def _forget(self, files: Iterable[File]) -> None:
        """Let go of files of the ring; the bytes that no step needs any more are free again."""
        self._budget.give_back(sum(file.saved.unwant() for file in files))
