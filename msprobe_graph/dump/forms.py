"""What the files of steps have in common that differ in nothing but numbers, so that only these are still to be made.

From step to step most of a dump is the same text. The first time that a step comes again, its text is kept, with holes
where the numbers stand: a `Form`. writing/lane.h fills it in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .encode import same_objects
from .manifest import Frame
from .records import Arriving, Entry, Hole, Step
from .template import Filled, Template, Text

KNOWN = 32
"""So many steps are known by what they have in common: one for each number of rows in a batch, as a rule."""
PATH_BYTES = 4096

Parts = Sequence[bytes | Filled]
"""A file."""


class Likely(NamedTuple):
    """What can be told of a step before the device has answered: steps that are equal in this are of one form, if the
    device has written the same slots."""

    entries: Sequence[Entry]
    replays: Sequence[object]
    alike: object
    holes: Sequence[Hole]
    sites: tuple[int, int]
    graphs: Mapping[int, object]

    @classmethod
    def of(cls, step: Step) -> Likely | None:
        """None of a step that may come only once: it is not finished, or has records or files of its own."""
        if not step.finished or step.records or step.shared or step.saved or step.copies or step.flushed is not None:
            return None
        replays = [replay.form for replay in step.replays]
        alike = None if step.alike is None else step.alike.form
        return cls(step.entries, replays, alike, list(step.holes), (step.expected, step.captured), dict(step.graphs))

    def is_like(self, other: Likely) -> bool:
        return same_objects(self.entries, other.entries) and self[1:] == other[1:]


def tables(step: Step) -> list[Arriving]:
    """Where a step's numbers come to be, in an order that depends on its form alone."""
    arrivals = {id(replay.arrival): replay.arrival for replay in step.replays if replay.arrival is not None}
    return [*arrivals.values(), *(() if step.alike is None else step.alike.tables)]


class Form:
    """Of steps that are like one that was written."""

    def __init__(self, files: Mapping[str, Parts], arrived: Sequence[Arriving], frame: Frame) -> None:
        """`files` are that step's, but for the manifest, of which there is the `frame`. `arrived`: where its numbers
        were."""
        self.kinds = _kinds(arrived)
        self._kept: list[object] = [frame]
        """What the structures point at."""
        self.room = 0
        """Bytes that a step may take, but for its manifest."""
        made = []
        for name, parts in files.items():
            templates = list(_templates(parts, arrived))
            texts = self._array(Text, [template.text(first) for template, first in templates])
            encoded = name.encode()
            self._kept += templates, encoded
            room = sum(template.room for template, _ in templates)
            self.room += room
            lasting = all(isinstance(part, bytes) for part in parts)
            made.append(_File(encoded, texts, len(templates), room, lasting))
        written = [
            _Written(self._bytes(fired), self._bytes(tags), len(fired) // 8, table)
            for table, (fired, tags) in self.kinds
        ]
        last = ctypes.create_string_buffer(PATH_BYTES)
        self._kept.append(last)
        native = _Form(
            self._array(_File, made),
            len(made),
            self._array(_Written, written),
            len(written),
            *frame,
            ctypes.addressof(last),
            PATH_BYTES,
        )
        self._kept.append(native)
        self.address = ctypes.addressof(native)
        """Of the structure that tells all of it."""

    def _array(self, kind: type[ctypes.Structure], items: Sequence[ctypes.Structure]) -> int:
        array = (kind * len(items))(*items)
        self._kept.append(array)
        return ctypes.addressof(array)

    def _bytes(self, content: bytes) -> int:
        self._kept.append(content)
        return ctypes.cast(ctypes.c_char_p(content), ctypes.c_void_p).value or 0


class Candidates:
    """Forms that a step may have, which its slots will tell."""

    def __init__(self, forms: Sequence[Form]) -> None:
        self.forms = forms
        self.room = max((form.room for form in forms), default=0)
        """As `Form.room`, of the largest."""
        self.addresses = (ctypes.c_void_p * len(forms))(*(form.address for form in forms))
        """Theirs."""


class Forms:
    """Those of the last steps. Learnt by one thread, asked by another."""

    def __init__(self) -> None:
        self._known: list[tuple[Likely, Candidates]] = []
        """The last one in front; a new list whenever that changes. No forms of what has come only once."""

    def find(self, step: Step) -> Candidates | None:
        """Those that the step may have; None where there are none."""
        likely = Likely.of(step)
        found = None if likely is None else self._of(likely)
        return found if found is not None and found.forms else None

    def learn(self, likely: Likely, arrived: Sequence[Arriving], make: Callable[[], Form | None]) -> None:
        """A step was written, with numbers that were there; `make` gives its form."""
        known = self._of(likely)
        if known is None:
            known = Candidates([])
        elif all(form.kinds != _kinds(arrived) for form in known.forms):
            made = make()
            known = known if made is None else Candidates([made, *known.forms[: KNOWN - 1]])
        rest = [pair for pair in self._known if not likely.is_like(pair[0])]
        self._known = [(likely, known), *rest[: KNOWN - 1]]

    def _of(self, likely: Likely) -> Candidates | None:
        for known, candidates in self._known:
            if likely.is_like(known):
                return candidates
        return None


def _kinds(arrived: Sequence[Arriving]) -> list[tuple[int, tuple[bytes, bytes]]]:
    return [(number, table.kind) for number, table in enumerate(arrived) if table.kind is not None]


def _templates(parts: Parts, arrived: Sequence[Arriving]) -> Iterator[tuple[Template, int]]:
    """Each with the number of its first table."""
    numbers = {id(table): number for number, table in enumerate(arrived)}
    for part in parts:
        if isinstance(part, bytes):
            yield Template(part), 0
        else:
            yield part.template, numbers[id(part.tables[0])]


class _File(ctypes.Structure):
    """These four are as writing/lane.h has them."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("texts", ctypes.c_void_p),
        ("text_count", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("lasting", ctypes.c_int32),
    )


class _Written(ctypes.Structure):
    _fields_ = (
        ("fired", ctypes.c_void_p),
        ("tags", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("table", ctypes.c_int32),
    )


class _Form(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_void_p),
        ("file_count", ctypes.c_int64),
        ("written", ctypes.c_void_p),
        ("written_count", ctypes.c_int64),
        ("begin", ctypes.c_char_p),
        ("between", ctypes.c_char_p),
        ("end", ctypes.c_char_p),
        ("last", ctypes.c_void_p),
        ("last_room", ctypes.c_int64),
    )
