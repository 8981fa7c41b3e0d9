"""What a step's records wait for: statistics, which are read when the step is over, and what was replayed in it."""

from __future__ import annotations

from collections.abc import Iterable

from .encode import complete, refuse, share
from .records import NOT_REPLAYED, OVERRUN, Block, Hole, Step


def complete_step(step: Step) -> None:
    """Fill in all records. The entries of what was replayed come to stand in front of the others."""
    _fill_in(step)
    blocks = [block for replay in step.replays if (block := replay.complete()) is not None]
    _add(blocks, step)
    step.entries[:0] = [entry for block in blocks for entry in block.entries]
    step.measured += [record for block in blocks for record in block.measured]


def encode_step(step: Step) -> None:
    """The same for a step that is written at once: what was replayed is encoded, without its records (`blocks`)."""
    _fill_in(step)
    step.blocks = [block for replay in step.replays if (block := replay.encode()) is not None]
    _add(step.blocks, step)


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


def _add(blocks: Iterable[Block], step: Step) -> None:
    for block in blocks:
        step.holes += block.holes
        step.graphs.update(block.graphs)
