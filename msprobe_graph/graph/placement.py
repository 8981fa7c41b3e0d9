"""Where in the compiled program the values are tapped that it has in memory: between the functions that are generated,
and where many values can share one tap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from .inductor_compat import Buffered, Schedule

TOGETHER = 32
"""So many values share a tap on a device, where a call of a kernel costs more than to read a small value. They are kept
in memory until then."""
ROUND = 8
"""A CUDA graph may measure together what so many taps were given, which costs one call for all of them. What stands is
kept in memory until then."""


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
    """Which of the values, that are tapped at `places`, nothing overwrites before taps on their device begin another
    ROUND, or before the end where none does: by id that place. Of GPUs only: others measure each value at once."""
    found: dict[int, int] = {}
    for device in {value.device for value in values.values() if value.device.type == "cuda"}:
        ids = [id for id, value in values.items() if value.device == device]
        tapped = sorted({places[id] for id in ids})
        ends = [*tapped[ROUND::ROUND], len(schedule.nodes)]
        until = {place: ends[number // ROUND] for number, place in enumerate(tapped)}
        ends_at = {id: until[places[id]] for id in ids if not values[id].foreign}
        found.update((id, place) for id, place in ends_at.items() if values[id].end >= place)
    return found


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
