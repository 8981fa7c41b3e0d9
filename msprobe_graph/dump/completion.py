"""What a step's records wait for: statistics, which are read when the step is over, and what was replayed in it."""

from __future__ import annotations

from collections.abc import Iterable

from .encode import complete, entry_lines, refuse, share
from .records import NOT_REPLAYED, OVERRUN, Block, Hole, Step
from .saved import Sink


def complete_step(step: Step, sink: Sink) -> None:
    """Fill in all records, and give `sink` the files that come of them. The entries of what was replayed come to stand
    in front of the others."""
    _fill_in(step)
    blocks = [block for replay in step.replays if (block := replay.complete()) is not None]
    _add(blocks, step, sink)
    step.entries[:0] = [entry for block in blocks for entry in block.entries]
    step.measured += [record for block in blocks for record in block.measured]


def encode_step(step: Step, sink: Sink) -> None:
    """The same for a step that is written at once: what was replayed is encoded (`blocks`), as a rule without its
    records."""
    _fill_in(step)
    blocks = [block for replay in step.replays if (block := replay.encode()) is not None]
    _add(blocks, step, sink)
    step.blocks = [
        block if block.lines is not None else block._replace(lines=entry_lines(block.entries)) for block in blocks
    ]


def _fill_in(step: Step) -> None:
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


def _add(blocks: Iterable[Block], step: Step, sink: Sink) -> None:
    for block in blocks:
        step.holes += block.holes
        step.graphs.update(block.graphs)
    for copies in step.copies:
        step.holes += copies.save(sink)
    step.rows, step.replays, step.copies = None, [], []  # and the memory in which it all came
