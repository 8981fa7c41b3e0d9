"""What measuring one CPU tensor costs, with one thread: `python tests/benchmarks/statistics_speed.py`.

For each dtype and size the time of one Rows.add and the bytes it reads per second, and the time of what it takes torch
to get maximum, minimum, sum and norm (aminmax, sum, vector_norm), where torch has these for the dtype.

                 size     Rows.add                torch
    float32      64 B       1.5 us    0.0 GB/s      6.1 us
    float32    64 KiB       4.4 us   14.9 GB/s     21.3 us
    ...
"""

import timeit
from collections.abc import Callable

import torch

from msprobe_graph.taps import Rows

SIZES = {"64 B": 64, "64 KiB": 1 << 16, "1 MiB": 1 << 20, "64 MiB": 1 << 26}
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def microseconds(call: Callable[[], object], size: int) -> float:
    """The best of several runs of about 5 ms each, or of one call where that takes longer."""
    repetitions = max(1, (5 << 20) // max(size, 4096))
    return min(timeit.repeat(call, number=repetitions, repeat=7)) / repetitions * 1e6


def torchs_own(tensor: torch.Tensor) -> None:
    torch.aminmax(tensor)
    tensor.sum()
    torch.linalg.vector_norm(tensor)


def line(name: str, tensor: torch.Tensor, size: str) -> str:
    read = tensor.numel() * tensor.dtype.itemsize
    rows = Rows()
    ours = microseconds(lambda: rows.add(tensor), read)
    try:
        theirs = f"{microseconds(lambda: torchs_own(tensor), read):10.1f} us"
    except (RuntimeError, NotImplementedError):
        theirs = f"{'-':>10}"
    return f"{name:22}{size:>8}{ours:10.1f} us{read / ours / 1e3:8.1f} GB/s{theirs}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':22}{'size':>8}{'Rows.add':>13}{'torch':>26}")
    for dtype in DTYPES:
        for size, read in SIZES.items():
            tensor = (torch.randn(read // dtype.itemsize) * 10).to(dtype)
            print(line(str(dtype).removeprefix("torch."), tensor, size))
    matrix = torch.randn(256, 256)
    masked = torch.randn(128, 128)
    masked[:, ::2] = -torch.inf
    print(line("float32 transposed", matrix[:128, :128].contiguous().t(), "64 KiB"))
    print(line("float32 slice", matrix[:, :64], "64 KiB"))
    print(line("float32 every other", matrix[::2, ::2], "64 KiB"))
    print(line("float32 half -inf", masked, "64 KiB"))


if __name__ == "__main__":
    main()
