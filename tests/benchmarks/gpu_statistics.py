"""What the statistics kernel costs on a GPU, beside a copy: `python tests/benchmarks/gpu_statistics.py`.

Ten launches are captured as one CUDA graph, so that launching costs nothing; of 20 replays the median counts. A kernel
reads each byte once, a copy moves it twice: reads it, and writes it. The last column is the one rate over the other.
What fits into the GPU's L2 cache comes from there, in both. On an H200:

                                             kernel                    copy
    bfloat16            [8192, 11008]       46.6 us   3870 GB/s       85.8 us   4202 GB/s   0.92
    ...
    32 values of [8, 896] in one launch: ... us, switched off ... us

The last line is what a tap inside a CUDA graph costs: 32 small bfloat16 values share a launch there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from msprobe_graph.taps.graph_rows import GraphRows
from msprobe_graph.taps.triton_rows import TritonRows

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn)
SHAPES = ((8192, 11008), (4096, 3584), (8, 896))
COLUMNS = ((4096, 37888, 18944), (4096, 4608, 3584), (4096, 4608, 512))
"""Rows, their width, and how many columns of them: what a gate, and what q and k of one matrix product are."""
LAUNCHES = 10
REPLAYS = 20
TOGETHER = 32

DEVICE = torch.device("cuda", 0)


STREAM = torch.cuda.Stream(DEVICE)
"""Where graphs are captured, and the rows' stream."""


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of LAUNCHES calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=STREAM):
        for _ in range(LAUNCHES):
            call()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one call."""
    times = []
    for _ in range(3 + REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times[3:])


def line(tensor: torch.Tensor) -> str:
    with torch.cuda.stream(STREAM):
        rows, other = TritonRows(DEVICE), torch.empty_like(tensor)
        rows.add(tensor)  # compiles the kernel, and allocates its rows outside of the graph
        other.copy_(tensor)
    kernel = microseconds(captured(lambda: rows.add(tensor)))
    copy = microseconds(captured(lambda: other.copy_(tensor)))
    read = tensor.numel() * tensor.element_size() / 1e3  # GB/s, over microseconds
    name = str(tensor.dtype).removeprefix("torch.") + ("" if tensor.is_contiguous() else " columns")
    return (
        f"{name:20}{list(tensor.shape)!s:15}{kernel:9.1f} us{read / kernel:7.0f} GB/s"
        f"{copy:12.1f} us{2 * read / copy:7.0f} GB/s{copy / kernel / 2:7.2f}"
    )


def small_values() -> str:
    rows = GraphRows(DEVICE)
    tensors = [torch.randn(8, 896, device=DEVICE).to(torch.bfloat16) for _ in range(TOGETHER)]
    rows.prepare(tensors)
    graph = captured(lambda: rows.measure([((), tensor) for tensor in tensors], None))
    rows.switch(True)
    on = microseconds(graph)
    rows.switch(False)
    off = microseconds(graph)
    return f"{TOGETHER} values of [8, 896] in one launch: {on:.1f} us, switched off {off:.1f} us"


def main() -> None:
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}")
    print(f"{'':35}{'kernel':>12}{'copy':>26}")
    for dtype in DTYPES:
        for shape in SHAPES:
            print(line(torch.randn(shape, device=DEVICE).to(dtype)))
    for height, width, columns in COLUMNS:
        print(line(torch.randn(height, width, device=DEVICE).to(torch.bfloat16)[:, -columns:]))
    print(small_values())


if __name__ == "__main__":
    main()
