"""Rows that Triton kernels measure inside CUDA graphs, at each replay, against float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

from msprobe_graph.taps import Statistics, graph_rows
from msprobe_graph.taps.arrival import Arrival, Slot, Written
from msprobe_graph.taps.device import Accelerator, of
from msprobe_graph.taps.graph_copies import GraphCopies
from msprobe_graph.taps.graph_rows import GraphRows
from msprobe_graph.taps.triton_rows import KINDS, TritonRows

from .gpu_rows import BLOCK, DEVICE, FEW, VIEWS, View, bits, check, every_dtype, few_dtypes, numbers, statistics

pytestmark = pytest.mark.gpu


class Graph:
    """A CUDA graph that measures tensors, and the slots that it does so into."""

    def __init__(
        self,
        rows: GraphRows,
        tensors: Sequence[torch.Tensor],
        padded: int | None = None,
        shared: Sequence[Slot] = (),
        copied: Sequence[int] = (),
    ) -> None:
        """`shared`: slots that each of the tensors may use. `copied`: which of them are copied, too."""
        assert all(rows.takes(tensor) for tensor in tensors)
        rows.prepare(tensors)
        self.tensors = tensors  # their memory is what a replay reads
        self._graph = torch.cuda.CUDAGraph()
        # torch's own stream to capture in is one for all devices
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):
            self.slots = rows.measure([(shared, tensor) for tensor in tensors], padded, copied)

    def replay(self) -> None:
        self._graph.replay()


class Step:
    """One step: graphs are replayed while it runs, and the slots are read when it is over."""

    def __init__(self, rows: GraphRows, *graphs: Graph, begin: int = 0, end: int = -1) -> None:
        rows.switch(True, begin, end)
        for graph in graphs:
            graph.replay()
        rows.switch(False)
        arrival = rows.arrive([slot for graph in graphs for slot in graph.slots])
        assert arrival is not None
        self.arrival: Arrival = arrival

    def __getitem__(self, slot: Slot) -> Written:
        found = self.arrival.first([slot])
        assert found is not None
        return found


def check_replayed(found: Written, tensor: torch.Tensor) -> None:
    assert found.fired == 1
    assert found.shape == tuple(tensor.shape)
    check(found.row, tensor)


@every_dtype
def test_a_graph_measures_every_dtype_and_layout(dtype: torch.dtype) -> None:
    rows = GraphRows(DEVICE)
    there = numbers(dtype, 40, 90)
    here = there.to(DEVICE)
    graph = Graph(rows, [view(here) for view in VIEWS.values()])
    step = Step(rows, graph)
    for slot, view in zip(graph.slots, VIEWS.values(), strict=True):
        check_replayed(step[slot], view(there))


def test_a_graph_measures_values_of_all_dtypes_and_sizes_as_they_are_then() -> None:
    rows = GraphRows(DEVICE)
    shapes = [(), (1,), (BLOCK + 1,), (70, 500)]
    places = [torch.empty(shape, dtype=dtype, device=DEVICE) for dtype in KINDS for shape in shapes]
    graph = Graph(rows, places)
    assert len(set(graph.slots)) == len(places)
    for make in (numbers, bits, numbers):
        values = [(numbers if place.dtype is torch.bool else make)(place.dtype, *place.shape) for place in places]
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        step = Step(rows, graph)
        for slot, value in zip(graph.slots, values, strict=True):
            check_replayed(step[slot], value)


def test_replays_give_the_same_bits() -> None:
    rows = GraphRows(DEVICE)
    tensors = [view(numbers(dtype, 700, 900).to(DEVICE)) for dtype in FEW for view in (lambda x: x, torch.t)]
    graph = Graph(rows, tensors)
    one, other = Step(rows, graph), Step(rows, graph)
    assert [one[slot] for slot in graph.slots] == [other[slot] for slot in graph.slots]


def test_what_a_graph_does_not_take() -> None:
    rows = GraphRows(DEVICE)
    x = torch.ones(2, 3, 4, 5, 6, device=DEVICE)
    assert rows.takes(x)
    assert not rows.takes(x.permute(4, 2, 0, 3, 1))
    assert not rows.takes(x[:0])
    assert not rows.takes(x.to(torch.complex64))
    assert not rows.takes(torch.tensor([1j], device=DEVICE).conj().imag)
    assert not rows.takes(torch.ones(3, device="meta"))
    assert not rows.takes(1.0)


BATCHES: dict[str, View] = {  # of 24 rows, out of a matrix of 48 by 896
    "dense": lambda x: x[:24],
    "unaligned": lambda x: x.reshape(-1)[1 : 1 + 24 * 895].reshape(24, 895),
    "every other row": lambda x: x[::2],
    "columns": lambda x: x[:24, 5:300],
    "columns of whole runs": lambda x: x[:24, 128:512],
    "transposed": lambda x: x.t()[:24],
    "three dimensions": lambda x: x[:24].reshape(24, 14, 64).transpose(1, 2),
    "a column": lambda x: x[:24, 0],
}


@few_dtypes
@pytest.mark.parametrize(("begin", "end"), [(0, -1), (0, 24), (0, 17), (5, 6), (3, 20), (23, 24), (9, 100)])
def test_rows_of_a_batch(dtype: torch.dtype, begin: int, end: int) -> None:
    rows = GraphRows(DEVICE)
    there = numbers(dtype, 48, 896)
    here = there.to(DEVICE)
    graph = Graph(rows, [batch(here) for batch in BATCHES.values()], padded=24)
    step = Step(rows, graph, begin=begin, end=end)
    for slot, batch in zip(graph.slots, BATCHES.values(), strict=True):
        check_replayed(step[slot], batch(there)[begin : end if end >= 0 else None])


def test_what_pads_a_batch_is_not_seen() -> None:
    rows = GraphRows(DEVICE)
    there = torch.full((8, 896), math.nan)
    there[:3] = numbers(torch.float32, 3, 896)
    graph = Graph(rows, [there.to(DEVICE), there.to(DEVICE)[:7], torch.tensor(2.0, device=DEVICE)], padded=8)
    batch, other, scalar = (Step(rows, graph, end=3)[slot] for slot in graph.slots)
    check_replayed(batch, there[:3])
    check_replayed(other, there[:7])
    check_replayed(scalar, torch.tensor(2.0))


def test_no_row_of_a_batch() -> None:
    rows = GraphRows(DEVICE)
    graph = Graph(rows, [torch.ones(8, 5, device=DEVICE)], padded=8)
    (slot,) = graph.slots
    found = Step(rows, graph, begin=8, end=12)[slot]
    assert (found.fired, found.shape) == (1, (0, 5))
    assert statistics(found.row, torch.float32) == Statistics(None, None, None, None)


@pytest.mark.parametrize("sizes", [(512, 16, 1), (1, 16, 512), (16, 512, 1)])
def test_graphs_of_several_sizes_share_slots(sizes: tuple[int, ...]) -> None:
    rows = GraphRows(DEVICE)
    there = {size: numbers(torch.bfloat16, size, 2 * BLOCK) for size in sizes}
    shared: list[Slot] = []
    graphs: dict[int, Graph] = {}
    for size, tensor in there.items():
        graph = Graph(rows, [tensor.to(DEVICE)], padded=size, shared=shared)
        (slot,) = graph.slots
        graphs[size] = graph
        if slot not in shared:
            shared.append(slot)
    rising = sum(size == max(sizes[: at + 1]) for at, size in enumerate(sizes))
    assert len(shared) == rising  # one that is smaller than an earlier one needs no slot of its own
    for size in (*sizes, *reversed(sizes)):
        (slot,) = graphs[size].slots
        step = Step(rows, graphs[size], end=max(1, size - 3))
        check_replayed(step[slot], there[size][: max(1, size - 3)])
        assert [other for other in shared if step.arrival.first([other]) is not None] == [slot]


def test_what_is_laid_out_beside_a_capture_is_never_part_of_it() -> None:
    """torch hands out 32 streams in turn: one of these is the one in which torch.cuda.graph captures."""
    tensor = numbers(torch.float32, 3, BLOCK)
    for _ in range(33):
        rows = GraphRows(DEVICE)
        small = Graph(rows, [tensor[:1].to(DEVICE)])
        large = Graph(rows, [tensor.to(DEVICE)], shared=small.slots)
        step = Step(rows, small)
        check_replayed(step[small.slots[0]], tensor[:1])
        assert step.arrival.first(large.slots) is None


def test_switched_off_nothing_is_measured() -> None:
    rows = GraphRows(DEVICE)
    assert rows.arrive() is None
    graph = Graph(rows, [torch.ones(5, device=DEVICE)])
    (slot,) = graph.slots
    graph.replay()
    assert Step(rows).arrival.first([slot]) is None
    assert Step(rows, graph)[slot].fired == 1
    graph.replay()
    assert Step(rows).arrival.first([slot]) is None


def test_what_is_kept_is_measured_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_rows, "TOGETHER", 1 << 16)
    monkeypatch.setattr(graph_rows, "MOST_STANDING", 1 << 17)
    rows = GraphRows(DEVICE)
    there = [numbers(dtype, 8, 16 * size) for size in (1, 3, 100, 500) for dtype in FEW]
    here = [tensor.to(DEVICE) for tensor in there]
    kept_ids = range(4, 4 + len(here))
    large, odd = torch.ones(graph_rows.SMALL, device=DEVICE), torch.ones(3, device=DEVICE)
    values = {0: 3, 1: large, 2: odd, 3: here[0].t(), **dict(zip(kept_ids, here, strict=True)), 1000: here[0]}
    rows.prepare(here)
    slots: list[Slot] = []
    graph = torch.cuda.CUDAGraph()
    stands, kept_view = torch.full((4, 8), 3.0, device=DEVICE), torch.empty(0)
    with torch.cuda.graph(graph):
        rows.measure([((), stands)], None, standing=True)
        kept_view = rows.keep({0: stands.view(32), 1: stands[:2]})[0]
        kept = rows.keep(values)
        for tensor in here:
            tensor.zero_()
        for number in kept_ids:
            slots += rows.measure([((), kept[number])], None, standing=True)
        rows.join()
    assert kept_view.data_ptr() == stands.data_ptr()
    assert kept.keys() == {*kept_ids, 1000}
    assert kept[1000] is kept[4]
    for tensor, value in zip(here, there, strict=True):
        tensor.copy_(value)
    rows.switch(True)
    graph.replay()
    arrival = rows.arrive()
    assert arrival is not None
    for slot, tensor in zip(slots, there, strict=True):
        found = arrival.first([slot])
        assert found is not None
        check_replayed(found, tensor)


def test_an_overrun_is_counted_anew_in_each_step() -> None:
    rows = GraphRows(DEVICE)
    x = torch.ones(3, BLOCK, device=DEVICE)
    graph = Graph(rows, [x])
    (slot,) = graph.slots
    rows.switch(True)
    for value in (5.0, 6.0, 7.0):
        x.fill_(value)
        graph.replay()
    found = Step(rows)[slot]
    assert found.fired == 3
    check(found.row, torch.full((3, BLOCK), 7.0))
    assert Step(rows, graph)[slot].fired == 1


def test_there_is_no_room_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_rows, "ROWS", 8)
    monkeypatch.setattr(graph_rows, "VALUES", 4)
    x = torch.ones(5, device=DEVICE)
    rows = GraphRows(DEVICE)
    (slot,) = rows.measure([([], x)], None)
    with pytest.raises(MemoryError, match="more than 8 rows"):
        rows.measure([([], torch.ones(9 * BLOCK, device=DEVICE))], None)
    with pytest.raises(MemoryError, match="4 values have no room: there are more than 4,"):
        rows.measure([([slot], x)] * 4, None)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_each_device_has_its_rows() -> None:
    there = numbers(torch.float32, 3, BLOCK)
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        with torch.cuda.device(device):
            rows = GraphRows(device)
            graph = Graph(rows, [there.to(device)])
            (slot,) = graph.slots
            check_replayed(Step(rows, graph)[slot], there)
            alone = TritonRows(device)
            alone.add(there.to(device))
            check(alone.fetch()[0], there)


# ---- copies -------------------------------------------------------------------------------------------


def copying_rows(size: int = 1 << 26) -> GraphRows:
    adapter = of(DEVICE)
    assert isinstance(adapter, Accelerator)
    return GraphRows(DEVICE, GraphCopies(adapter, size))


def check_copied(step: Step, slot: Slot, expected: torch.Tensor) -> None:
    found = step.arrival.copy(step[slot], expected.dtype)
    assert found is not None
    assert found.shape == expected.shape
    assert torch.equal(_bytes(found), _bytes(expected))


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """Its values in row-major order; `contiguous` would leave the strides of one element as they are."""
    return value.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


@every_dtype
def test_a_graph_copies_every_dtype_and_layout_to_the_bit(dtype: torch.dtype) -> None:
    rows = copying_rows()
    there = (numbers if dtype is torch.bool else bits)(dtype, 40, 90)
    here = there.to(DEVICE)
    graph = Graph(rows, [view(here) for view in VIEWS.values()], copied=range(len(VIEWS)))
    for _ in range(2):
        step = Step(rows, graph)
        for slot, view in zip(graph.slots, VIEWS.values(), strict=True):
            check_copied(step, slot, view(there))
            check(step[slot].row, view(there))


@few_dtypes
@pytest.mark.parametrize(("begin", "end"), [(0, -1), (0, 24), (0, 17), (5, 6), (3, 20), (23, 24), (9, 100), (30, 40)])
def test_copied_rows_of_a_batch(dtype: torch.dtype, begin: int, end: int) -> None:
    rows = copying_rows()
    there = numbers(dtype, 48, 896)
    here = there.to(DEVICE)
    graph = Graph(rows, [batch(here) for batch in BATCHES.values()], padded=24, copied=range(len(BATCHES)))
    step = Step(rows, graph, begin=begin, end=end)
    for slot, batch in zip(graph.slots, BATCHES.values(), strict=True):
        check_copied(step, slot, batch(there)[begin : end if end >= 0 else None])


@pytest.mark.parametrize("sizes", [(64, 16, 1), (1, 16, 64), (16, 64, 1)])
def test_graphs_of_several_sizes_share_copies(sizes: tuple[int, ...]) -> None:
    rows = copying_rows()
    there = {size: numbers(torch.bfloat16, size, 2 * BLOCK) for size in sizes}
    shared: list[Slot] = []
    graphs: dict[int, Graph] = {}
    for size, tensor in there.items():
        graphs[size] = Graph(rows, [tensor.to(DEVICE)], padded=size, shared=shared, copied=[0])
        shared += [slot for slot in graphs[size].slots if slot not in shared]
    for size in (*sizes, *reversed(sizes)):
        (slot,) = graphs[size].slots
        check_copied(Step(rows, graphs[size], end=max(1, size - 3)), slot, there[size][: max(1, size - 3)])


def test_large_values_are_copied_whole() -> None:
    rows = copying_rows(1 << 28)
    there = bits(torch.bfloat16, 5000, 1111)
    graph = Graph(rows, [there.to(DEVICE), there.to(DEVICE).t()], copied=[0, 1])
    step = Step(rows, graph)
    check_copied(step, graph.slots[0], there)
    check_copied(step, graph.slots[1], there.t())


def test_switched_off_nothing_is_copied() -> None:
    rows = copying_rows()
    x = torch.ones(5, device=DEVICE)
    graph = Graph(rows, [x], copied=[0])
    rows.switch(True)
    graph.replay()
    rows.switch(False)
    x.fill_(2.0)
    graph.replay()
    arrival = rows.arrive(graph.slots)
    assert arrival is not None
    found = arrival.first(graph.slots)
    assert found is not None
    copy = arrival.copy(found, torch.float32)
    assert copy is not None
    assert copy.tolist() == [1.0] * 5


def test_what_has_no_room_is_measured_all_the_same() -> None:
    rows = copying_rows(512)
    there = [numbers(torch.float32, size) for size in (100, 50, 40)]  # of 400, 200 and 160 bytes
    graph = Graph(rows, [tensor.to(DEVICE) for tensor in there], copied=[0, 1])
    step = Step(rows, graph)
    for slot, tensor in zip(graph.slots, there, strict=True):
        check_replayed(step[slot], tensor)
    check_copied(step, graph.slots[0], there[0])
    assert [step[slot].captured.copied for slot in graph.slots] == [True, True, False]
    assert [step.arrival.copy(step[slot], torch.float32) is None for slot in graph.slots] == [False, True, True]
