"""A capture session: steps, their gates and limits, and the way from a capture to the writer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from msprobe_graph.config import ConfigError, ConfigWatch, Settings, entry_matcher
from msprobe_graph.config.operators import OperatorTable
from msprobe_graph.dump.boundary import Boundary
from msprobe_graph.dump.folder import claim, run_identity
from msprobe_graph.dump.manifest import Provenance
from msprobe_graph.dump.records import Flushed, Hole, Request, Step
from msprobe_graph.dump.ring import Ring
from msprobe_graph.dump.writer import Writer
from msprobe_graph.eager._compat import compiled_inside
from msprobe_graph.eager.capture import EagerCapture
from msprobe_graph.eager.context import Context
from msprobe_graph.graph.replay import Replays
from msprobe_graph.graph.saving import Saving
from msprobe_graph.graph.watch import Watch
from msprobe_graph.taps.padding import Padding
from msprobe_graph.taps.recorder import Recorder
from msprobe_graph.version import __version__

from . import sessions, user_signal
from .request_rows import rows_that_count, slices
from .saved_gradients import await_gradients

log = logging.getLogger("msprobe_graph")

GRAPHS = "CUDA graphs"


class Session:
    """Captures steps as `settings` say. Nothing is opened, and no folder made, before the first step that is wanted."""

    def __init__(self, settings: Settings, run: str | None = None, debugged: bool = True) -> None:
        """`run` names the run in place of what run_identity finds out; the environment goes before both. `debugged`:
        whether a PrecisionDebugger starts and stops it; without one all is one step (`follow`)."""
        self.settings = settings
        self.debugged = debugged
        self.operators = _operators(settings)
        self._run = run
        self.step = 0
        """The running step. Counts while capture is off, too."""
        self.rank: int | None = None
        """This process's rank where torch.distributed doesn't know it."""
        self.capturing = False
        self.capture: EagerCapture | None = None
        self._watch = ConfigWatch(settings)
        self.boundary = Boundary()
        """Where failures of this capture end."""
        plain = not settings.slice and settings.summary_mode == "statistics"
        saves = settings.task == "tensor" or bool(settings.tensor_list)
        self.replays = Replays(self.boundary, plain, Saving(settings, self.operators) if saves else None)
        """Follows what is replayed as a CUDA graph."""
        self.sharding: dict[str, Any] = {}
        """See `Provenance.sharding`; to be told before the first step."""
        self.out_of_reach: list[Hole] = []
        """What no step can hold; in every manifest."""
        self._recorder: Recorder | None = None
        self._writer: Writer | None = None
        self._dirty = False
        """The running step has something that was not yet handed over as finished."""
        self._captured_steps = 0
        self._ended = False
        self._unwatch_signal: Callable[[], None] = lambda: None
        self._nth = sessions.register(self, settings.dump_path)

    def wanted(self) -> bool:
        """Whether the running step is to be captured on this rank, now."""
        settings = self.settings
        if self._ended or not (self._dirty or self._watch.enabled()):  # a step that was begun is captured to its end
            return False
        if self._writer is not None and self._writer.pid != os.getpid():
            self._end("this process was forked from the one that captures", logging.WARNING)
            return False
        if settings.rank and (self._process_rank() or 0) not in settings.rank:
            return False
        if settings.step and self.step not in settings.step:
            if self.step > max(settings.step):
                self._end(f"step {self.step} is behind the last one asked for")
            return False
        if self._at_max_steps():
            self._end(f"max_steps ({settings.max_steps}) is reached", logging.WARNING)
            return False
        if self._writer is not None and self._writer.budget.full:
            self._end(f"max_bytes ({self._writer.budget.limit}) is reached", logging.WARNING)
            return False
        return True

    def attend(self, models: Mapping[str, nn.Module]) -> bool:
        """Put hooks on the models for `resume`, which then may be called when one of them runs already. False when
        dump_path can't be written."""
        opened = self._opened(models)
        if opened is not None:
            opened[1].watch(models)
        return opened is not None

    def resume(
        self, models: Mapping[str, nn.Module], requests: Sequence[Request] = (), padded_rows: int | None = None
    ) -> None:
        """Capture the models, given by the prefix of their modules' names, from here on. `requests` are those of the
        batch in the order of their rows, which may have been padded to `padded_rows`."""
        opened = self._opened(models)
        if opened is None:
            return
        recorder, capture = opened
        cut = slices(self.settings, requests)
        if cut is None:
            self.fire("request")
            self.rest()
            return
        padding = None
        if requests and padded_rows is not None and padded_rows > requests[-1].end:
            padding = Padding(requests[-1].end, padded_rows, models.values())
        recorder.go_on(cut, requests, padding)
        capture.watch(models)
        self._dirty = self.capturing = True
        capture.start()
        self.boundary.attempt(GRAPHS, self.replays.switch, True, *rows_that_count(requests, cut))

    def follow(self, running: Sequence[nn.Module]) -> None:
        """Capture the compiled graphs of the outermost of the modules that are `running`, innermost first, and the
        modules that run eagerly between them, from here on.

        What runs now is counted as called, but its call is not seen.
        """
        models = dict(zip([""], reversed(running), strict=False))
        opened = self._opened(models) if self.wanted() else None
        if opened is not None:
            _, capture = opened
            capture.watch(models, running)
            self._dirty = self.capturing = True
            capture.context.on = True
            self.boundary.attempt(GRAPHS, self.replays.switch, True)

    def context(self) -> Context | None:
        """What compiled graphs record with; None while nothing is captured."""
        return self.capture.context if self.capturing and self.capture is not None else None

    def watch(self, running: Callable[[], Context | None]) -> Watch:
        """This capture, for graphs that are compiled under it; `running` gives what captures at run time."""
        return Watch(self.settings, self.operators, self.boundary, self.replays, running)

    def hush(self) -> None:
        """Capture nothing until `go_on`, `resume` or the step's end, which come soon and before a CUDA graph is
        replayed."""
        if self.capture is not None:
            self.capture.stop()
        self.capturing = False

    def go_on(self) -> None:
        """Capture as before `hush`, within the same step."""
        if self._dirty and self.capture is not None:
            self.capturing = True
            self.capture.start()

    def rest(self) -> None:
        """What CUDA graphs replay until `resume` is nobody's."""
        if self.replays.measuring:
            self.boundary.attempt(GRAPHS, self.replays.switch, False)

    def pause(self) -> None:
        """Capture nothing until `resume`. Unless the step soon ends, what it has so far is written as unfinished."""
        if self.capturing and self._writer is not None:
            self.hush()
            self.rest()
            self._writer.draft(partial(self._as_step, finished=False))

    def next_step(self, at_once: bool = False) -> None:
        """The running step is over. at_once: no CUDA graph is replayed before `resume` or `rest`."""
        self._undraft()
        self.hush()
        if self._dirty and self._writer is not None and self.capture is not None and self._recorder is not None:
            self._captured_steps += 1
            self.replays.record(self.capture.context)
            self._writer.submit(self._as_step(finished=True))
            if not at_once:
                self.rest()
        self.step += 1
        self._begin_step()

    def forget_weights(self) -> None:
        """Weights may have been written to by what no version counter counts. To be called between steps."""
        if self._recorder is not None:
            self._recorder.forget()

    def drop_step(self) -> None:
        """What the running step has captured is forgotten, and captured anew under the same number."""
        self.pause()
        self._undraft()
        if self._dirty and self._writer is not None and self._recorder is not None:
            self._writer.drop(self.step)
            self._recorder.forget()
        self.boundary.attempt(GRAPHS, self.replays.forget)
        self._begin_step()

    def _undraft(self) -> None:
        """What the running step has so far is not to be written now: it goes on, or ends."""
        if self._writer is not None:
            self._writer.undraft()

    def _begin_step(self) -> None:
        untouched, self._dirty = not self._dirty, False
        if self.capture is not None and self._recorder is not None:
            if untouched:  # as all are while capture is off
                self._recorder.renumber(self.step)
            else:
                self._recorder.begin(self.step)
            self.capture.begin_step(self.step)
            self.boundary.holes.clear()

    def save(self, name: str, value: Any, gradients: bool) -> None:
        """Record `value` in the step's debug.json as ``{name}.{call}.debug`` and, if asked for, its `gradients` as
        ``{name}_grad.{call}.debug``, those that come before the step is over."""
        opened = self._opened({})
        if opened is None:
            return
        recorder, _ = opened
        call = sum(entry.rsplit(".", 2)[0] == name for entry in recorder.saved)
        entry = f"{name}.{call}.debug"
        stem = entry if self.settings.task == "tensor" else None
        recorder.saved[entry] = self.boundary.attempt(entry, recorder.value, value, stem)
        self._dirty = True
        if gradients:
            entry = f"{name}_grad.{call}.debug"
            record = partial(self._record_gradient, self.step)
            if not self.boundary.attempt(entry, await_gradients, value, recorder.saved, entry, entry, record):
                del recorder.saved[entry]

    def _record_gradient(self, step: int, gradient: torch.Tensor, stem: str) -> Any:
        """The record of a gradient of what was saved in `step`; None when that is over, or it fails."""
        if step != self.step or self._recorder is None:
            return None
        self._undraft()
        return self.boundary.attempt(
            stem, self._recorder.value, gradient, stem if self.settings.task == "tensor" else None
        )

    def leave(self) -> None:
        """Take every hook and mode of ours away; `resume` puts them back."""
        self.pause()
        self.rest()
        if self.capture is not None:
            self.capture.remove()

    def flush(self) -> None:
        """Return when everything captured so far is on disk; a step that still runs is written as unfinished."""
        if self._writer is not None:
            if self._dirty:
                self._undraft()
                self._writer.submit(self._as_step(finished=False))
            self._writer.flush()

    def wait(self, behind: int) -> None:
        """Return when at most so many of the steps that are over are not on disk yet."""
        if self._writer is not None:
            self._writer.wait(behind)

    def fire(self, trigger: str) -> None:
        """Have the steps that are kept written if `trigger` is in flush_on, and the one that runs when it ends."""
        if self._writer is not None and trigger in self.settings.flush_on:
            named = (self.settings.request_id or "",) if trigger == "request" else ()
            running = self._dirty
            self._writer.fire(Flushed(trigger, self.step if running else self.step - 1, requests=named), running)

    def close(self) -> None:
        """The end: the running step is finished, everything is on disk, and what is missing is said."""
        self._end("the session was closed")
        if self._dirty and not self._idle():
            self.next_step()
        self._unwatch_signal()
        self.fire("request")
        if self._writer is not None:
            self._writer.close()
        if self.boundary.failures:
            log.error(
                "%d taps failed during capture; the manifests in %s list them",
                self.boundary.failures,
                self.settings.dump_path,
            )

    def _end(self, reason: str, level: int = logging.INFO) -> None:
        if not self._ended:
            self._ended = True
            self.leave()
            log.log(level, "capture into %s has ended: %s", self.settings.dump_path, reason)

    def _idle(self) -> bool:
        """Whether the running step only began because the last one ended."""
        unused = self._recorder is None or not (self._recorder.entries or self._recorder.saved)
        return unused and self._captured_steps > 0 and not self.replays.regions

    def _at_max_steps(self) -> bool:
        return self.settings.max_steps is not None and self._captured_steps >= self.settings.max_steps

    def _opened(self, models: Mapping[str, nn.Module]) -> tuple[Recorder, EagerCapture] | None:
        """What the running step is captured with, which now goes on. None when dump_path can't be written: then capture
        has ended, and the model goes on."""
        self._undraft()
        if self._recorder is None or self.capture is None:
            try:
                writer = self._writer = self._open_writer(models)
            except OSError as error:
                self._end(f"it can't be written to ({error})", logging.ERROR)
                return None
            self._recorder = Recorder(self.settings, writer)
            self._recorder.begin(self.step)
            self.capture = EagerCapture(self.settings, self._recorder, self.boundary, self.operators)
            self.capture.begin_step(self.step)
            if self.replays.saving is not None:
                self.replays.saving.paths = self.capture.context.paths
            if "signal" in self.settings.flush_on:
                self._unwatch_signal = user_signal.watch(partial(self.fire, "signal"))
        return self._recorder, self.capture

    def _open_writer(self, models: Mapping[str, nn.Module]) -> Writer:
        dump_path = Path(self.settings.dump_path)
        run = run_identity(_world_size(), self._nth, self._run)
        moved = claim(dump_path, run)
        if moved is not None:
            log.warning("%s holds an earlier run's steps; they were moved to %s", dump_path, moved)
        rank = self._process_rank()
        provenance = Provenance(
            process=f"proc{os.getpid()}" if rank is None else f"rank{rank}",
            device=_device(models.values()),
            package=__version__,
            model=", ".join(type(compiled_inside(model) or model).__name__ for model in models.values()) or None,
            task=self.settings.task,
            level=self.settings.level,
            run=run,
            sharding=self.sharding,
            config={name: _jsonable(value) for name, value in msgspec.structs.asdict(self.settings).items()},
        )
        log.info("capture into %s", dump_path)
        return Writer(dump_path, provenance, self.boundary, self.settings.max_bytes, _ring(self.settings))

    def _as_step(self, finished: bool) -> Step:
        assert self._recorder is not None
        assert self.capture is not None
        self.boundary.attempt("statistics on a GPU", self._recorder.seal, finished)
        expected, captured, holes = self.capture.sites()
        if self._at_max_steps():
            holes.append(Hole("later steps", f"max_steps ({self.settings.max_steps}) is reached"))
        step = self._recorder.as_step(
            finished, expected, captured, self.capture.rest(), [*holes, *self.out_of_reach, *self.boundary.holes]
        )
        if finished and not (step.entries or step.replays or step.saved):
            log.warning(
                "step %d of %s captured nothing; its manifest says what was expected",
                step.number,
                self.settings.dump_path,
            )
        return step

    def _process_rank(self) -> int | None:
        if self.rank is not None:
            return self.rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        return None


def _operators(settings: Settings) -> OperatorTable:
    try:
        return OperatorTable(settings.operators, settings.custom_op_namespaces)
    except ValueError as error:
        raise ConfigError(f"{settings.source}: {error}") from error


def _ring(settings: Settings) -> Ring | None:
    if settings.keep_last is None:
        return None
    chosen = entry_matcher(settings.flush_sites) if settings.flush_sites else lambda name: True
    return Ring(settings.keep_last, settings.flush_on, chosen)


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _device(models: Iterable[nn.Module]) -> str:
    """The type of the device that holds the first parameter."""
    return next((parameter.device.type for model in models for parameter in model.parameters()), "cpu")


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value
