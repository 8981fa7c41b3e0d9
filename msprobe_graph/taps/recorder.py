"""The one path from a tap to the writer: values become records, records become entries, entries become a step.

Eager hooks and graph taps both end here. Everything is read at once, so that a later in-place change can't alter what
was recorded; a value that was measured already in this step, and has not changed since, is not measured again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch

from msprobe_graph.config import Settings, Slice
from msprobe_graph.dump.encode import describe
from msprobe_graph.dump.records import FULL, Entry, Hole, Request, Shared, Step, TensorRecord
from msprobe_graph.dump.writer import Writer

from .alike import AlikeInStep, Text
from .checksum import crc32, xor_checksum
from .copied import Copied, CopiedInStep
from .likeness import MAX_DEPTH, Likeness, Table, anything, contents, extension, is_weight, likeness
from .measured import Known, Measured
from .padding import Padding
from .replayed import ReplayedCall, ReplayedValue, ReplayInStep
from .row_memory import RowMemory
from .rows import Rows
from .unmeasurable import Unmeasurable, refuse_captured

if TYPE_CHECKING:
    from .arrival import Slot
    from .launches import LaunchedRows
    from .rows_in_graphs import RowsInGraphs

_DTYPES = {value: str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Recorder:
    """Collects one step at a time.

    `cut` holds the slices that apply to every tensor of the running step (the configuration's, and one request's rows),
    once `padding` is off.
    """

    def __init__(self, settings: Settings, writer: Writer) -> None:
        self.cut: Sequence[Slice] = settings.slice
        self.padding: Padding | None = None
        self._checksum = {"md5": crc32, "xor": xor_checksum, "statistics": None}[settings.summary_mode]
        self._measures = settings.summary_mode != "xor"
        self._writer = writer
        self.repeats = settings.keep_last is None
        """Whether records may be filled in anew, as those of a step that was written."""
        plain = settings.task == "statistics" and not settings.tensor_list and self._checksum is None
        self._extension = extension() if self.repeats and plain else None
        self._without_gradients = "backward" in settings.data_mode
        self._launches_on: torch.device | None = None
        """A GPU with tensors of such calls."""
        self._launching: LaunchedRows | None = None
        """Those that the last step with such tensors has used."""
        self._texts: list[Text] = []
        self._row_memory = RowMemory()
        self.forget_calls: Callable[[], None] = lambda: None
        """To be called when what is kept of earlier calls holds no longer; whoever keeps it puts it here."""
        self.epoch = object()
        """Another one whenever `forget_calls` is called."""
        self.run = 0
        """Counts the steps that were begun, those that were dropped included."""
        self.forget()
        self.begin(0)

    def forget(self) -> None:
        """What the running step has measured will not be known: it is to be measured again."""
        self._measured = Measured(self._extension is None, self._forget_calls)
        self._forget_calls()

    def _forget_calls(self) -> None:
        self.epoch = object()
        self.forget_calls()

    def begin(self, number: int) -> None:
        """Start step `number` with nothing in it."""
        self.run += 1
        self._number = number
        self._rows = Rows(self._row_memory)
        self._records: dict[int, TensorRecord] = {}
        self.shared: list[Shared] = []
        """Records that have their statistics from others."""
        self._shared_again: list[Shared] = []
        """The same, of calls that are like those of earlier steps."""
        self._launched: LaunchedRows | None = None
        """The part of it that is on a GPU."""
        self.table: Table | None = None
        """That, while such calls are looked for; else each is described anew."""
        self._copied: defaultdict[RowsInGraphs, list[Copied]] = defaultdict(list)
        self.replays: list[ReplayedCall] = []
        """The calls that CUDA graphs may have replayed as a whole."""
        self._replayed_now: ReplayedCall | None = None
        """The one of them that is being recorded."""
        self._measured.begin()
        self._table: Table | None = None
        """What is measured of calls that are like those of earlier steps."""
        if self._extension is not None:
            self._table = self._extension.Table(self._without_gradients, self._measured.probes())
        self.entries: dict[str, Entry] = {}
        """By name, in execution order."""
        self.holes: list[Hole] = []
        self.saved: dict[str, Any] = {}
        self.requests: list[Request] = []
        self.graphs: dict[int, Callable[[], dict[str, Any]]] = {}
        """By id: what describes, when the step is over, a compiled graph that ran in it."""

    def renumber(self, number: int) -> None:
        """The running step, in which there is nothing yet, is step `number`."""
        self._number = number

    def go_on(self, cut: Sequence[Slice], requests: Sequence[Request] = (), padding: Padding | None = None) -> None:
        """The running step goes on, with these requests in its batch."""
        self.cut, self.requests, self.padding = cut, list(requests), padding
        self.table = None if cut or padding is not None else self._table
        if self.table is not None and self._launched is None and self._launches_on is not None:
            from .launching import on_device

            with on_device(self._launches_on):
                launched = self._launched_rows()
            launched.begin(self.table)
            self._launched = launched

    def _launched_rows(self) -> LaunchedRows:
        """Those of the current device and stream."""
        from .launches import LaunchedRows

        if self._launching is None or not self._launching.here():
            if self._launching is not None:
                self._launching.leave()
            self._launching = LaunchedRows(self._row_memory)
        return self._launching

    def seal(self, finished: bool) -> None:
        """See `Rows.seal`; to be called before `as_step`."""
        self._rows.seal(finished, [call.graph for call in self.replays])
        if self._launched is not None:
            self._launched.seal(finished)

    def as_step(
        self, finished: bool, expected: int, captured: int, late: Sequence[Entry], holes: Sequence[Hole]
    ) -> Step:
        """The step as it stands; `late` entries and `holes` are those that only its end tells."""
        rows = self._rows
        return Step(
            number=self._number,
            entries=[*self.entries.values(), *late],
            rows=rows if self._measures else None,
            records=dict(self._records),
            shared=list(self.shared),
            alike=self._alike_in_step(),
            replays=[ReplayInStep(call, rows.arrival(call.graph)) for call in self.replays] if finished else [],
            copies=[CopiedInStep(self._number, values, rows.arrival(graph)) for graph, values in self._copied.items()],
            arriving=rows.arriving,
            holes=[*self.holes, *holes],
            requests=list(self.requests),
            graphs={graph: describe_graph() for graph, describe_graph in self.graphs.items()},
            saved=dict(self.saved),
            expected=expected,
            captured=captured,
            finished=finished,
        )

    def _alike_in_step(self) -> AlikeInStep | None:
        calls = [] if self._table is None else self._table.calls()
        if self._table is None or not calls:
            return None
        launched = None if self._launched is None else self._launched.table()
        return AlikeInStep(self._table.contents(), launched, calls, self._shared_again, self._texts)

    def value(self, value: Any, stem: str | None, depth: int = 0) -> Any:
        """`value` with its tensors measured. `stem` is the start of their file names, None when they are not saved."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, stem)
        children = contents(value) if depth < MAX_DEPTH else None
        if isinstance(children, Mapping):
            return {
                str(name): self.value(item, None if stem is None else f"{stem}.{name}", depth + 1)
                for name, item in children.items()
            }
        if children is not None:
            return [
                self.value(item, None if stem is None else f"{stem}.{index}", depth + 1)
                for index, item in enumerate(children)
            ]
        return describe(value)

    def likeness(self, values: object, described: object, records: object) -> Likeness | None:
        """What later calls' values may be like: see `likeness.likeness`. None where nobody will ask."""
        if self.table is None:
            return None
        found = likeness(values, described, records)
        if found is not None and found.gpu is not None:
            self._launches_on = found.gpu
        return found

    def share_again(self, shared: Sequence[Shared]) -> None:
        """Records of a call that is like an earlier one have their statistics from others of its records."""
        self._shared_again += shared

    def unread(self) -> Likeness | None:
        """The same of values that are not recorded."""
        return None if self.table is None else anything(tuple)

    def weights(self, parameters: Mapping[str, torch.Tensor | None]) -> dict[str, TensorRecord]:
        """The records of a module's own parameters, which are not saved: `value` of each in fewer steps, as nearly all
        of them are known."""
        whole = not self.cut and self.padding is None
        records = {}
        for name, weight in parameters.items():
            if weight is not None:
                known = self._measured.weight(weight) if whole else None
                record = None if known is None else known.record
                if record is None or record.requires_grad != weight.requires_grad:
                    record = self._tensor(weight, None)
                records[name] = record
        return records

    def passing(self, tensor: torch.Tensor, stem: str | None, same: TensorRecord | None) -> TensorRecord:
        """The record of a tensor that exists for this moment only, such as a compiled program's buffer.

        same: the record of a tensor with the same values, in this order or another: then it is not measured again.
        """
        partly = self.padding is not None or bool(self.cut)  # which depends on the shape, not on the values alone
        tensor = self._part(tensor)
        if same is None or self._checksum is not None or partly:
            record = self._read(tensor, stem)
        else:
            record = TensorRecord("torch.Tensor", same.dtype, tensor.shape, None, None, None, None, False)
            record.reason = same.reason
            self.shared.append((same, record, None))
        if stem is not None and record.reason is msgspec.UNSET and self._save(tensor, None, f"{stem}.pt"):
            record.data_name = f"{stem}.pt"
        return record

    def replayed(self, graph: RowsInGraphs, slots: Sequence[Slot], dtype: torch.dtype) -> TensorRecord:
        """The record of a value that a CUDA graph measures when it is replayed."""
        record = TensorRecord("torch.Tensor", _DTYPES[dtype], None, None, None, None, None, False)
        if self._replayed_now is None:
            self._records[self._rows.reserve(graph, slots, dtype)] = record
        else:
            self._replayed_now.values.append(ReplayedValue(record, slots, dtype))
        return record

    def copied(self, graph: RowsInGraphs, value: Copied) -> None:
        """Have files made of a value that a CUDA graph copies when it is replayed."""
        self._rows.want_copies(graph, value.slots)
        self._copied[graph].append(value)
        if self._replayed_now is not None:
            self._replayed_now.saved = True

    def view_of(self, record: TensorRecord, shape: tuple[int | None, ...] | Literal["same"]) -> TensorRecord:
        """The record of all elements of another one's value, in a shape of which one size may be open."""
        view = TensorRecord("torch.Tensor", record.dtype, None, None, None, None, None, False)
        self.shared.append((record, view, shape))
        return view

    @contextmanager
    def if_replayed(self, graph: RowsInGraphs, slots: Sequence[Slot]) -> Iterator[ReplayedCall]:
        """What is recorded inside counts only if one of the slots turns out to have been written.

        What is given may be appended to `replays` in later steps, for the same entries with their values, but not
        where a ring keeps them, as their records would change.
        """
        call = self._replayed_now = ReplayedCall(graph, slots)
        self.replays.append(call)
        outside = self.entries, self.holes, self.shared, self.graphs
        self.entries, self.holes, self.shared, self.graphs = call.entries, call.holes, call.shared, call.graphs
        try:
            yield call
        finally:
            self.entries, self.holes, self.shared, self.graphs = outside
            self._replayed_now = None

    def _tensor(self, tensor: torch.Tensor, stem: str | None) -> TensorRecord:
        if self.cut or self.padding is not None:
            tensor = self._part(tensor)
        known = self._measured.lookup(tensor)
        if known is not None and stem is None:
            before = known.record
            if before is None or before.requires_grad != tensor.requires_grad:
                record = self._read(tensor, stem)
                known.record = record if record.reason is msgspec.UNSET else None
            elif self._table is not None and not is_weight(tensor):
                # Calls that are like this one may be given another tensor.
                record = msgspec.structs.replace(before)
                self.shared.append((before, record, None))
            else:
                record = before
            return record
        record = self._read(tensor, stem)
        if stem is not None and record.reason is msgspec.UNSET and self._save(tensor, known, f"{stem}.pt"):
            record.data_name = f"{stem}.pt"
        return record

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is to be looked at of `tensor`: all of it, as a rule."""
        if self.padding is not None:
            tensor = self.padding.cut(tensor)
        return _sliced(tensor, self.cut) if self.cut else tensor

    def _read(self, tensor: torch.Tensor, stem: str | None) -> TensorRecord:
        record = TensorRecord("torch.Tensor", _DTYPES[tensor.dtype], None, None, None, None, None, tensor.requires_grad)
        try:
            refuse_captured(tensor)
            if self._measures:
                self._records[self._rows.add(tensor)] = record
            if self._checksum is not None:
                record.md5 = self._checksum(tensor)
        except Unmeasurable as refusal:
            record.reason = str(refusal)
            self.holes.append(Hole(stem or "a tensor", record.reason))
            return record
        record.shape = tensor.shape
        return record

    def _save(self, tensor: torch.Tensor, known: Known | None, name: str) -> bool:
        """Hand a copy of the values to the writer; False (and a hole) when max_bytes leaves no room for it."""
        if known is not None and known.saved is not None and self._writer.save_again(self._number, name, known.saved):
            return True
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        saved = self._writer.save(self._number, name, copy)
        if saved is None:
            self.holes.append(Hole(name, FULL))
            return False
        if known is not None:
            known.saved = saved
        return True


def _sliced(tensor: torch.Tensor, cut: Sequence[Slice]) -> torch.Tensor:
    """`tensor` with each slice applied along its dimension; those of another length there, or too few dimensions, are
    whole."""
    index = [slice(None)] * tensor.dim()
    for part in cut:
        if part.dim < tensor.dim() and part.size in (None, tensor.shape[part.dim]):
            index[part.dim] = slice(part.begin, part.end)
    return tensor[tuple(index)]
