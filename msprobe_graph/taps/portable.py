"""A tensor's row by plain torch operations: any device, no synchronisation, no shape that depends on values."""

import torch

SINGLE_PRECISION_DEVICES = frozenset({"mps", "npu"})
"""Device types that have no float64 (MPS) or only an emulated one (Ascend NPU)."""


def precision(tensor: torch.Tensor) -> torch.dtype:
    """What the moments of `tensor` are computed in: float64, or float32 on a device that would have to emulate it."""
    if tensor.device.type in SINGLE_PRECISION_DEVICES and tensor.dtype not in (torch.float64, torch.complex128):
        return torch.float32
    return torch.float64


def absolute(tensor: torch.Tensor) -> torch.Tensor:
    """The absolute values of a complex tensor; in float64, if there is one, so that they can't overflow."""
    narrow = precision(tensor) is torch.float32
    return tensor.detach().to(torch.complex64 if narrow else torch.complex128).abs()


@torch.no_grad()
def measure(tensor: torch.Tensor, real: torch.dtype, counted: torch.Tensor | None = None) -> torch.Tensor:
    """The row of a real `tensor`: an int64 tensor of shape [8] on its device, laid out as `statistics.ROW`.

    Its float64 fields are there as their bits.
    `real` is `precision(tensor)`. With float32 the first four fields hold the bits of a float32, which `widen` turns
    into those of a float64. counted: which elements are looked at, booleans of the same shape; None for all.
    """
    values = tensor.detach().reshape(-1)
    if values.numel() == 0:
        return torch.zeros(8, dtype=torch.int64, device=values.device)
    mask = None if counted is None else counted.reshape(-1)
    moments, counts = (_floats if values.dtype.is_floating_point else _integers)(values, real, mask)
    bits = torch.int64 if real is torch.float64 else torch.int32
    return torch.cat([torch.stack(moments).view(bits).to(torch.int64), torch.stack(counts)])


def widen(rows: torch.Tensor) -> torch.Tensor:
    """Rows on the CPU, [n, 8], that `measure` made with float32, as it makes them with float64."""
    moments = rows[:, :4].to(torch.int32).view(torch.float32).to(torch.float64)
    return torch.cat([moments.view(torch.int64), rows[:, 4:]], dim=1)


def _floats(
    values: torch.Tensor, real: torch.dtype, counted: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    values = values.to(real)
    if counted is not None:
        values = torch.where(counted, values, 0)
    finite = values.isfinite() if counted is None else values.isfinite() & counted
    count = finite.sum()
    high = torch.where(finite, values, -torch.inf).amax()
    low = torch.where(finite, values, torch.inf).amin()
    moments = [high, low, *_mean_and_norm(torch.where(finite, values, 0), count, high, low)]
    return moments, [values.isnan().sum(), values.isposinf().sum(), values.isneginf().sum(), count]


def _integers(
    values: torch.Tensor, real: torch.dtype, counted: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    # An uint64 keeps its bits; with the highest one flipped its order is that of an int64.
    flip = torch.iinfo(torch.int64).min if values.dtype is torch.uint64 else 0
    exact = values.to(torch.int64) ^ flip
    real_values = values.to(real)
    highest, lowest, count = exact, exact, torch.full_like(exact[0], values.numel())
    real_highest, real_lowest = real_values, real_values
    if counted is not None:
        limits = torch.iinfo(torch.int64)
        highest, lowest = torch.where(counted, exact, limits.min), torch.where(counted, exact, limits.max)
        real_highest = torch.where(counted, real_values, -torch.inf)
        real_lowest = torch.where(counted, real_values, torch.inf)
        real_values, count = torch.where(counted, real_values, 0), counted.sum()
    high, low = highest.amax() ^ flip, lowest.amin() ^ flip
    real_high, real_low = real_highest.amax(), real_lowest.amin()
    moments = [real_high, real_low, *_mean_and_norm(real_values, count, real_high, real_low)]
    return moments, [high, low, torch.zeros_like(high), count]


def _mean_and_norm(
    values: torch.Tensor, count: torch.Tensor, high: torch.Tensor, low: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over finite values; scaled by the largest where squares would leave the range of the dtype."""
    largest = torch.maximum(high.abs(), low.abs())
    safe = torch.finfo(values.dtype).max ** 0.25  # its square times a billion elements is still in range
    plain = (largest < safe) & (largest > 1 / safe) | (largest == 0) | largest.isinf()
    scale = torch.where(plain, 1, largest)
    scaled = values / scale
    return scaled.sum() / count * scale, torch.linalg.vector_norm(scaled) * scale
