"""Tensors as a table, a row for each.

::

        entry                        position      shape    dtype      max    min    mean    norm    NaN    +Inf    -Inf  why
    --  ---------------------------  ------------  -------  -------  -----  -----  ------  ------  -----  ------  ------  ---
        Functional.linear.0.forward  input_args.0  [2, 4]   float32    1.5   -0.5    0.25     1.9      0       0       0
    !!  Tensor.div.0.forward         output.0      [2, 4]   float32    nan    nan     nan     nan      4       0       0  makes the first NaN
"""  # noqa: E501

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tabulate import tabulate

from msprobe_graph.analysis.suspicion import Suspicion
from msprobe_graph.dump.reader import TensorAt

SHORTEST_NAME = 32
"""Entry names are not cut below this, however narrow the terminal is."""

_FIELDS = {
    "max": "Max",
    "min": "Min",
    "mean": "Mean",
    "norm": "Norm",
    "NaN": "nan_count",
    "+Inf": "posinf_count",
    "-Inf": "neginf_count",
    "md5": "md5",
}


def table(found: Sequence[tuple[TensorAt, Suspicion | None]]) -> Iterator[str]:
    """The lines of the table of all `found`, of which there must be one.

    In a terminal too narrow for it, long entry names are cut in the middle; elsewhere nothing is.
    """
    fields = dict(_FIELDS)
    if not any("md5" in tensor.record for tensor, _ in found):
        del fields["md5"]
    head = ["", "entry", "position", "shape", "dtype", *fields, "why"]
    rows = [_row(tensor, suspicion, fields.values()) for tensor, suspicion in found]
    alignment = ["left"] * 5 + ["right"] * len(fields) + ["left"]
    # tabulate takes 80 us a row, too long for the 40,000 rows that a step may have: it lays out one row that holds the
    # widest cell of each column, and the others are put below in the same widths.
    widest = [max(column, key=len) for column in zip(*rows, strict=True)]
    if sys.stdout.isatty():
        spare = shutil.get_terminal_size().columns - len(_layout(head, widest, alignment)[0])
        room = max(SHORTEST_NAME, len(widest[1]) + spare)
        for row in (*rows, widest):
            row[1] = _cut(row[1], room)
    heading, rule = _layout(head, widest, alignment)
    yield heading
    yield rule
    sides = {"left": "<", "right": ">"}
    cells = (f"{{:{sides[side]}{len(dashes)}}}" for side, dashes in zip(alignment, rule.split(), strict=True))
    line = "  ".join(cells).format
    for row in rows:
        yield line(*row).rstrip()


def _layout(head: list[str], widest: list[str], alignment: list[str]) -> tuple[str, str]:
    """The heading and the rule below it."""
    heading, rule, _ = tabulate([widest], head, "simple", colalign=alignment, disable_numparse=True).splitlines()
    return heading, rule


def _row(tensor: TensorAt, suspicion: Suspicion | None, fields: Iterable[str]) -> list[str]:
    record = tensor.record
    mark = "" if suspicion is None else "!!" if suspicion.origin else "!"
    why = suspicion.reason if suspicion else " ".join(record.get("reason", "").split())
    statistics = [_text(record.get(field)) for field in fields]
    dtype = record["dtype"].removeprefix("torch.")
    return [mark, tensor.entry, tensor.position, _text(record["shape"]), dtype, *statistics, why]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if type(value) is float else str(value)


def _cut(name: str, room: int) -> str:
    """`name` without its middle, where it is longer than `room`."""
    if len(name) <= room:
        return name
    end = (room - 3) // 2
    return f"{name[: room - 3 - end]}...{name[-end:]}"
