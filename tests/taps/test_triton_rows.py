"""Rows that Triton kernels measure on a GPU, one by one and inside CUDA graphs, against float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from msprobe_graph.taps import Statistics, graph_rows, row_memory
from msprobe_graph.taps.arrival import Arrival, Slot, Written
from msprobe_graph.taps.graph_rows import GraphRows
from msprobe_graph.taps.statistics import ROW, read_row
from msprobe_graph.taps.triton_rows import KINDS, MOST_PARTS, TritonRows, layout

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
BLOCK = 2048
"""Elements that a program reads at once."""
FEW = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]

every_dtype = pytest.mark.parametrize("dtype", list(KINDS), ids=str)
few_dtypes = pytest.mark.parametrize("dtype", FEW, ids=str)

View = Callable[[torch.Tensor], torch.Tensor]

VIEWS: dict[str, View] = {  # of a matrix of 40 by 90
    "dense": lambda x: x,
    "unaligned": lambda x: x.reshape(-1)[1:],
    "transposed": lambda x: x.t(),
    "columns": lambda x: x[:, 7:40],
    "every third": lambda x: x[::3, ::2],
    "column": lambda x: x[:, 5],
    "expanded": lambda x: x[:, 3:4].expand(3, 40, 90),
    "overlapping": lambda x: x.unfold(1, 4, 1),
    "four dimensions": lambda x: x.reshape(4, 9, 10, 10).permute(3, 1, 0, 2)[1:],
    "one element": lambda x: x[7:8, 7:8],
    "0-d": lambda x: x[3, 4],
}


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Small floats, integers anywhere in their range."""
    torch.manual_seed(0)
    if dtype is torch.bool:
        return torch.rand(shape) > 0.3
    if not dtype.is_floating_point:
        return bits(dtype, *shape)
    values = torch.randn(shape, dtype=torch.float64).mul(3)
    return (values.abs() if dtype is torch.float8_e8m0fnu else values).float().to(dtype)


def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits: of floats NaN, infinities, huge values and subnormals."""
    torch.manual_seed(1)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def measured(*tensors: torch.Tensor) -> list[bytes]:
    rows = TritonRows(DEVICE)
    for tensor in tensors:
        rows.add(tensor)
    return rows.fetch()


def statistics(row: bytes, dtype: torch.dtype) -> Statistics:
    return read_row(ROW.unpack(row), dtype)


def check(row: bytes, tensor: torch.Tensor) -> None:
    """`tensor`, on the CPU, is what was measured."""
    found = statistics(row, tensor.dtype)
    if tensor.dtype.is_floating_point:
        check_floats(found, tensor)
    else:
        values = [int(value) for value in tensor.flatten().tolist()]
        kind = bool if tensor.dtype is torch.bool else int
        assert (type(found.max), found.max, type(found.min), found.min) == (kind, max(values), kind, min(values))
        norm = math.sqrt(sum(value**2 for value in values))
        assert found.mean == pytest.approx(sum(values) / len(values), rel=1e-12, abs=1e-12 * norm)
        assert found.norm == pytest.approx(norm, rel=1e-12)


def check_floats(found: Statistics, tensor: torch.Tensor) -> None:
    exact = tensor.to(torch.float64).flatten()
    finite = exact[exact.isfinite()]
    whole = len(finite) == len(exact)
    assert found.nan_count == int(exact.isnan().sum())
    assert found.posinf_count == int((exact == math.inf).sum())
    assert found.neginf_count == int((exact == -math.inf).sum())
    finites = (found.finite_max, found.finite_min, found.finite_mean, found.finite_norm)
    if whole:
        assert finites == (None, None, None, None)
        finites = (found.max, found.min, found.mean, found.norm)
    if not len(finite):
        assert finites == (None, None, None, None)
        return
    high, low, mean, norm = finites
    assert (high, low) == (finite.max().item(), finite.min().item())
    size = finite.abs().max().item()
    scaled = finite / (size or 1.0)  # its squares stay in range
    tolerance = 1e-12 if tensor.dtype is torch.float64 else 2e-6
    least = 5e-324  # of which a mean so small is a multiple
    assert mean == pytest.approx(math.fsum(scaled.tolist()) / len(scaled) * size, rel=0, abs=tolerance * size + least)
    assert norm == pytest.approx(scaled.norm().item() * size, rel=tolerance, abs=least)


@every_dtype
def test_every_dtype_and_layout(dtype: torch.dtype) -> None:
    there = numbers(dtype, 40, 90)
    here = there.to(DEVICE)
    rows = measured(*(view(here) for view in VIEWS.values()))
    for row, view in zip(rows, VIEWS.values(), strict=True):
        check(row, view(there))


@pytest.mark.parametrize("dtype", [dtype for dtype in KINDS if dtype is not torch.bool], ids=str)
def test_any_bits(dtype: torch.dtype) -> None:
    there = bits(dtype, 60, 70)
    for row, view in zip(measured(there.to(DEVICE), there.to(DEVICE).t()), (there, there.t()), strict=True):
        check(row, view)


@pytest.mark.parametrize("dtype", [dtype for dtype in KINDS if dtype.itemsize == 1], ids=str)
def test_each_value_of_one_byte(dtype: torch.dtype) -> None:
    raw = torch.arange(2 if dtype is torch.bool else 256, dtype=torch.uint8)
    values = raw.view(dtype)
    here = values.to(DEVICE)
    for number, row in enumerate(measured(*(here[number] for number in raw.tolist()))):
        check(row, values[number])


@few_dtypes
@pytest.mark.parametrize(
    "count",
    [1, BLOCK - 1, BLOCK, BLOCK + 1, 64 * BLOCK, 64 * BLOCK + 1, MOST_PARTS * BLOCK, MOST_PARTS * BLOCK + 1],
)
def test_sizes_around_blocks_and_parts(dtype: torch.dtype, count: int) -> None:
    assert KINDS[dtype].block == BLOCK
    there = numbers(dtype, count)
    (row,) = measured(there.to(DEVICE))
    check(row, there)


@few_dtypes
def test_five_dimensions_are_copied(dtype: torch.dtype) -> None:
    there = numbers(dtype, 3, 4, 5, 6, 10).permute(4, 2, 0, 3, 1)
    here = numbers(dtype, 3, 4, 5, 6, 10).to(DEVICE).permute(4, 2, 0, 3, 1)
    assert layout(here) is None
    (row,) = measured(here)
    check(row, there)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([60000.0] * 16, torch.float16),
        ([2.0**-24, 2.0**-15], torch.float16),
        ([1e38] * 9, torch.float32),
        ([3.4e38, -3.4e38, 1.0], torch.float32),
        ([1e-30, 2e-30], torch.float32),
        ([1e-45, 3e-45], torch.float32),
        ([1e-30, 1e30], torch.float32),
        ([1e38, 1e-38], torch.bfloat16),
        ([1e300, -1e300, 1e299], torch.float64),
        ([1.7e308, 1.7e308], torch.float64),
        ([3e-200, 4e-200], torch.float64),
        ([5e-324, 1e-323], torch.float64),
        ([1e300, 1.0, math.nan], torch.float64),
        ([math.inf] * 10, torch.float32),
        ([-math.inf, math.inf, 1.0], torch.bfloat16),
        ([math.nan] * 9, torch.float16),
        ([-0.0, 0.0], torch.float32),
        ([-3.0, -4.0], torch.float32),
        ([2**63 - 1, -(2**63), 2**53 + 1], torch.int64),
        ([-(2**63)] * 3, torch.int64),
        ([2**64 - 1, 2**63, 2**53 + 1], torch.uint64),
        ([2**63 - 1, 1], torch.uint64),
        ([2**32 - 1, 0], torch.uint32),
        ([False, False], torch.bool),
        ([False, True], torch.bool),
    ],
)
def test_values_at_the_ends_of_a_dtype(values: list[Any], dtype: torch.dtype) -> None:
    there = torch.tensor(values, dtype=dtype)
    (row,) = measured(there.to(DEVICE))
    check(row, there)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.float8_e5m2], ids=str)
def test_non_finite_values_are_counted_wherever_they_are(dtype: torch.dtype) -> None:
    there = torch.ones(20_000)
    for position, value in {0: math.nan, BLOCK - 1: math.inf, BLOCK: -math.inf, 19_999: math.inf}.items():
        there[position] = value
    there = there.to(dtype)
    (row,) = measured(there.to(DEVICE))
    check(row, there)
    assert statistics(row, dtype).finite_norm == pytest.approx(math.sqrt(19_996), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1e-30, 1e30, 1.0, math.nan, -1e38], torch.float32),
        ([1e-200, -1e200, math.inf], torch.float64),
        ([5, 2**64 - 1, 2**63, 1], torch.uint64),
        ([5, -(2**63), 2**63 - 1], torch.int64),
    ],
)
def test_parts_of_very_different_values(values: list[Any], dtype: torch.dtype) -> None:
    there = torch.tensor([value for value in values for _ in range(BLOCK)], dtype=dtype)
    (row,) = measured(there.to(DEVICE))
    check(row, there)


def test_more_elements_than_an_int32_counts() -> None:
    (row,) = measured(torch.arange(8.0, device=DEVICE).expand(2**28 + 1, 8))
    found = statistics(row, torch.float32)
    assert (found.max, found.min, found.nan_count) == (7.0, 0.0, 0)
    assert found.mean == pytest.approx(3.5, rel=1e-6)
    assert found.norm == pytest.approx(math.sqrt((2**28 + 1) * 140), rel=1e-6)


@every_dtype
def test_the_same_values_give_the_same_bits(dtype: torch.dtype) -> None:
    here = numbers(dtype, 300, 1001).to(DEVICE)
    one = measured(here, here.t(), here[:, ::2])
    assert measured(here, here.t(), here[:, ::2]) == one
    assert measured(here.clone())[0] == one[0]


def test_rows_fill_several_chunks_and_may_be_fetched_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "CHUNK", 16)
    tensors = [numbers(torch.float32, count) for count in (5, BLOCK, 20 * BLOCK, 7, 3 * BLOCK, 1, 9, 10, 11, 12, 13)]
    rows = TritonRows(DEVICE)
    assert rows.fetch() == []
    for count, tensor in enumerate(tensors, 1):
        assert rows.add(tensor.to(DEVICE)) == count - 1
        found = rows.fetch()
        assert len(found) == count
        check(found[-1], tensor)
    assert rows.fetch() == measured(*(tensor.to(DEVICE) for tensor in tensors))


def test_the_rows_of_one_step_after_the_other() -> None:
    memory = row_memory.RowMemory()
    there = [numbers(torch.float32, count) for count in (5, 20 * BLOCK)]
    here = [tensor.to(DEVICE) for tensor in there]
    chunks = set()
    for _ in range(3):
        rows = TritonRows(DEVICE, memory)
        for tensor in here:
            rows.add(tensor)
        chunks.update(chunk.data_ptr() for chunk in rows._chunks)
        rows.seal(finished=True)
        for found, tensor in zip(rows.fetch(), there, strict=True):
            check(found, tensor)
    assert len(chunks) == 1


class Graph:
    """A CUDA graph that measures tensors, and the slots that it does so into."""

    def __init__(
        self,
        rows: GraphRows,
        tensors: Sequence[torch.Tensor],
        padded: int | None = None,
        shared: Sequence[Slot] = (),
    ) -> None:
        """`shared`: slots that each of the tensors may use."""
        assert all(rows.takes(tensor) for tensor in tensors)
        rows.prepare(tensors)
        self.tensors = tensors  # their memory is what a replay reads
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.slots = rows.measure([(shared, tensor) for tensor in tensors], padded)

    def replay(self) -> None:
        self._graph.replay()


class Step:
    """One step: graphs are replayed while it runs, and the slots are read when it is over."""

    def __init__(self, rows: GraphRows, *graphs: Graph, begin: int = 0, end: int = -1) -> None:
        rows.switch(True, begin, end)
        for graph in graphs:
            graph.replay()
        rows.switch(False)
        arrival = rows.arrive()
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


@pytest.mark.parametrize("sizes", [(64, 16, 1), (1, 16, 64), (16, 64, 1)])
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
    with pytest.raises(MemoryError, match="more than 4 values"):
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
