"""Where in the compiled program the values are tapped that it has in memory: between the functions that are generated,
and where many values can share one tap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from .inductor_compat import Buffered, Schedule

TOGETHER = 32
"""So many values share a tap on a device, where a call of a kernel costs more than to read a small value. They are kept
in memory until then."""
STANDING = 64
"""So many values may wait to be measured together by a CUDA graph, which then costs one launch for all of them. They
are kept in memory until then, whether there is a graph or not."""


def places(schedule: Schedule, values: Mapping[int, Buffered]) -> dict[int, int]:
    """A place for each of the values, by id. Those that can be tapped nowhere without splitting a function are left
    out."""
    found: dict[int, int] = {}
    devices: dict[torch.device, list[int]] = {}
    for id, value in values.items():
        devices.setdefault(value.device, []).append(id)
    for device, ids in devices.items():
        groups = ([id] for id in ids) if device.type == "cpu" else _groups(values, ids)
        for group in groups:
            found.update(_together(schedule, values, group))
    return found


def standing(schedule: Schedule, values: Mapping[int, Buffered], places: Mapping[int, int]) -> dict[int, int]:
    """Which of the values, that are tapped at `places`, nothing overwrites before their round is over: by id the place
    of the tap that begins another round of STANDING values on their device, or of the end. Of GPUs only: others measure
    each value at once."""
    found: dict[int, int] = {}
    for device in {value.device for value in values.values() if value.device.type == "cuda"}:
        until = _rounds([places[id] for id, value in values.items() if value.device == device], len(schedule.nodes))
        for id, value in values.items():
            if value.device == device and not value.foreign and value.end >= until[places[id]]:
                found[id] = until[places[id]]
    return found


def _rounds(tapped: Sequence[int], end: int) -> dict[int, int]:
    """By place, where its round is over; `tapped` has the place of each value."""
    rounds: list[list[int]] = [[]]
    count = 0
    for place, together in sorted(Counter(tapped).items()):
        if count and count + together > STANDING:
            rounds.append([])
            count = 0
        rounds[-1].append(place)
        count += together
    ends = [*(following[0] for following in rounds[1:]), end]
    return {place: over for round, over in zip(rounds, ends, strict=True) for place in round}


def _groups(values: Mapping[int, Buffered], ids: Iterable[int]) -> Iterator[list[int]]:
    """Values that are all there at one time, in the order in which they come to be."""
    group: list[int] = []
    end = 0
    for id in sorted(ids, key=lambda id: values[id].begin):
        value = values[id]
        if group and (value.begin > end or len(group) == TOGETHER):
            yield group
            group = []
        end = min(end, value.end) if group else value.end
        group.append(id)
    if group:
        yield group


def _together(schedule: Schedule, values: Mapping[int, Buffered], group: list[int]) -> Iterator[tuple[int, int]]:
    """As early as possible: on a CPU a call costs less than a cold cache, elsewhere memory is held for it."""
    begin = max(values[id].begin for id in group)
    end = min(values[id].end for id in group)
    place = next((place for place in range(begin, end + 1) if schedule.is_free(place)), None)
    if place is not None:
        yield from ((id, place) for id in group)
    elif len(group) > 1:
        for id in group:
            yield from _together(schedule, values, [id])
