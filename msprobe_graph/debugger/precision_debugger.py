"""PrecisionDebugger: start, stop and step of a capture, as users and serving frameworks call them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any

from torch import nn

from msprobe_graph.config import load_settings
from msprobe_graph.dump.records import Request

from .session import Session
from .token_range import TokenRange

log = logging.getLogger("msprobe_graph")


class PrecisionDebugger:
    """Captures a model, step by step, into dumps.

    ::

        debugger = PrecisionDebugger("config.json")
        for batch in batches:
            with debugger.start(model):       # or: debugger.start(model) ... debugger.stop(); debugger.step()
                model(batch)

    A step is what lies between two step() calls. Steps are counted while capture is off too, so that the numbers of
    two runs mean the same. The other arguments of the constructor override the config file, which may be left out when
    `dump_path` is given. `run` is a name for the run that its processes share, for those that aren't ranks of one
    torch.distributed world on one host. Raises ConfigError when a setting is wrong, before anything runs.
    """

    def __init__(
        self,
        config_path: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        task: str | None = None,
        dump_path: str | None = None,
        level: str | None = None,
        step: list[int | str] | None = None,
        *,
        run: str | None = None,
    ) -> None:
        settings = load_settings(config_path or {}, task=task, dump_path=dump_path, level=level, step=step)
        self.session = Session(settings, run)
        self._models: dict[str, nn.Module] = {}
        self._tokens: TokenRange | None = None

    def start(
        self,
        model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module] | None = None,
        token_range: Sequence[int] | None = None,
        rank_id: int | None = None,
        scheduled_tokens: Mapping[str, int] | Sequence[Request] | None = None,
        padded_rows: int | None = None,
    ) -> PrecisionDebugger:
        """Capture from here on, until stop(). Used as a context manager, its end is stop() and step().

        model: the module, or modules, whose calls are captured. Needed at levels L0 and mix; at L1 and L2 it tells in
        which
            module a call stands. It may be left out when an earlier start() named it. Parts of a model are given by
            their qualified names: {"model.layers": ..., "lm_head": ...}.
        token_range: [first, last]: within this start and stop, only these forwards of the model, counted from 0.
        rank_id: this process's rank, where torch.distributed doesn't know it.
        scheduled_tokens: {request: rows}, in the order in which the requests' rows stand in the batch; or a list of
            dump.records.Request, in that order, which tell more.
        padded_rows: how many rows the model runs with, where that is more than were scheduled. The last ones are
            padding and left out of every tensor with that many rows, but for parameters and buffers of the model.

        Raises TypeError or ValueError, one sentence, for arguments that can't be used.
        """
        if model is not None:
            self._models = _by_prefix(model)
        level = self.session.settings.level
        if not self._models and (level in ("L0", "mix") or token_range is not None):
            why = f"at level {level}" if token_range is None else "to count its forwards for token_range"
            raise ValueError(f"start() needs the model {why}: start(model) or start([model, ...])")
        forwards = None if token_range is None else _forwards(token_range)
        if rank_id is not None:
            self.session.rank = rank_id
        if not self.session.wanted():
            self.session.leave()
        elif level != "debug":
            self.session.resume(self._models, _in_order(scheduled_tokens or ()), padded_rows)
            if forwards is not None and self.session.capture is not None:
                self._tokens = TokenRange(next(iter(self._models.values())), self.session.capture, forwards)
        return self

    @property
    def capturing(self) -> bool:
        """Whether what runs now is captured: between start() and stop(), unless the settings leave this step or rank
        out."""
        return self.session.capturing

    def stop(self) -> None:
        """Capture nothing until the next start()."""
        if self._tokens is not None:
            self._tokens.remove()
            self._tokens = None
        self.session.pause()

    def step(self, dump: bool = True) -> None:
        """The step is over: its dump is written, and what comes next belongs to the next step.

        dump: False if it was none: a dummy run, say. What was captured is forgotten, and the next step gets its number.
        """
        running = self.session.capturing
        if dump:
            self.session.next_step()
        else:
            self.session.drop_step()
        if running:
            self.start()

    def save(self, variable: Any, name: str, save_backward: bool = True) -> None:
        """At level "debug": record `variable`, a tensor or a nest of them, in the step's debug.json as
        ``{name}.{call}.debug``; with `save_backward` also the gradients that a backward pass gives of it before the
        step is over, as ``{name}_grad.{call}.debug``."""
        if self.session.settings.level == "debug" and self.session.wanted():
            self.session.save(name, variable, save_backward)

    def flush(self) -> None:
        """Return when everything captured so far is on disk; a step that still runs is written as unfinished."""
        self.session.flush()

    def flush_kept(self) -> None:
        """With keep_last, and "rpc" in flush_on: write the steps that are kept, and return when they are on disk. A
        step that runs is written when it ends.

        flush() doesn't do that: it is called after every step where each must be on disk before its results go out.
        """
        if "rpc" not in self.session.settings.flush_on:
            log.warning('flush_kept() does nothing, because flush_on in the config does not have "rpc"')
        self.session.fire("rpc")
        self.session.flush()

    def __enter__(self) -> PrecisionDebugger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.step()
        self.flush()


def _by_prefix(model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The models by the prefix of their modules' names: none for a single one, their index for those in a list."""
    if isinstance(model, nn.Module):
        return {"": model}
    if not isinstance(model, (Sequence, Mapping)):
        raise TypeError(f"start() got a {type(model).__name__} as model; it takes an nn.Module or a list of them")
    models = dict(model) if isinstance(model, Mapping) else {str(i): each for i, each in enumerate(model)}
    for each in models.values():
        if not isinstance(each, nn.Module):
            raise TypeError(f"start() got a {type(each).__name__} as model; it takes an nn.Module or a list of them")
    return models


def _in_order(scheduled_tokens: Mapping[str, int] | Sequence[Request]) -> Sequence[Request]:
    """The requests of a batch, which holds their rows one after the other in the order given."""
    if not isinstance(scheduled_tokens, Mapping):
        return scheduled_tokens
    ends = accumulate(scheduled_tokens.values())
    return [Request(name, end - rows, end) for (name, rows), end in zip(scheduled_tokens.items(), ends, strict=True)]


def _forwards(token_range: Sequence[int]) -> range:
    """The forwards from the first to the last of `token_range`, both included."""
    try:
        first, last = token_range
        if 0 <= first <= last:
            return range(first, last + 1)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"start() got token_range {token_range!r}; it takes two numbers, [first, last], with 0 <= first <= last"
    )
