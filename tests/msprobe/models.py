"""Small models, one step each, that msProbe and we dump side by side. Runs in msProbe's environment: torch alone.

`CASES[name]()` gives the model and its step; who calls it has seeded torch. Nothing here draws random numbers later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Case = tuple[nn.Module, Callable[[], Any]]


class Mlp(nn.Module):
    """Residuals, a module used three times, one frozen, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.frozen = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(F.dropout(self.frozen(x), 0.0, self.training))


class Attention(nn.Module):
    """Attention written by hand, with every spelling of its operators."""

    def __init__(self, heads: int = 2, width: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.randn(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * scale / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask == 0, float("-inf"))
        weights = F.softmax(scores, dim=-1)
        mixed = torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2).reshape(batch, length, width)
        first, second = torch.split(self.out(mixed), width // 2, dim=-1)
        y = torch.cat([2 * first, second.mul(2.0)], dim=-1)
        y = y * self.gate + (1 - torch.sigmoid(self.gate)) * y
        y = y - y.mean(-1, keepdim=True)
        y[:, 0] += 1.0
        y *= 0.5
        y = y.add_(x[:, -1:]) / 2
        return x + y, weights


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        seen = []
        for layer in self.layers:
            x, weights = layer(x, mask, scale=1.5)
            seen.append(weights)
        return {"logits": self.head(x), "weights": seen, "nothing": None}


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.down = nn.Conv2d(8, 8, 1, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.leaky_relu(self.norm(self.down(x)), 0.1) + F.interpolate(x, scale_factor=0.5)
        x = F.avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 1)
        return self.head(x.mean((2, 3)).flatten(1))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.rnn = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        out, (hidden, _) = self.rnn(self.embed(tokens))
        return self.head(torch.tanh(out) + hidden[-1].unsqueeze(1))


class Moe(nn.Module):
    """Top-2 of four experts, tokens gathered and added back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.router(x).softmax(-1), 2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        load = F.one_hot(chosen, 4).float().mean((0, 1)).to(torch.float64)
        return torch.where(load.sum() > 0, out, x)


class Nested(nn.Module):
    """Inputs and outputs in dicts, tuples and lists; other dtypes; an empty tensor; a part that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.pack = Pack()
        self.unpack = Unpack()

    def forward(self, x: Tensor) -> Tensor:
        packed = self.pack(x, (x, None, 3), flags={"positive": x > 0})
        low, (high,) = self.unpack(packed)
        with torch.no_grad():
            low = low + self.inner(x).round().abs()
        y = self.inner(low.float()) * high
        empty = y[:0].abs().sum()
        whole = torch.arange(4).mul(3).to(torch.int32).bitwise_and(5)
        double = y.double().sigmoid().type_as(x)
        return y.norm() + torch.linalg.norm(double) + empty + whole.sum() + y.detach().max()


class Pack(nn.Module):
    def forward(self, x: Tensor, more: Any, *, flags: dict[str, Tensor]) -> dict[str, Any]:
        return {"a": x * 2, "b": [x.where(flags["positive"], 0.0 * x), more[1], more[2]]}


class Unpack(nn.Module):
    def forward(self, packed: dict[str, Any]) -> list[Any]:
        return [packed["a"] - 1, (packed["b"][0].exp(),)]


class Operators(nn.Module):
    """Spellings of operators and functions, each once or twice."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        i = torch.tensor([1, 2, 4])
        t, w = x > y, x.detach()
        parts = [
            x + y, 1 + x, x - y, 1 - x, x * y, 2 * x, x / y, 2 / x, w // 0.3, 2 // w, x % 0.3, 2 % w, x**2, 2**x,
            x @ y.T, -x, +x, abs(x), x.add(y), x.mul(y), x.div(y), x.pow(2), x.matmul(y.t()), torch.add(x, y),
            torch.mul(x, y), torch.rsub(x, y), x.true_divide(y), torch.absolute(x), w.floor_divide(y),
            torch.floor_divide(w, y), F.tanh(x), F.sigmoid(x), torch.tanh(x), x.sigmoid(), F.relu6(x), F.softplus(x),
            F.logsigmoid(x), F.hardswish(x), F.softmax(x, -1), x.softmax(-1), torch.softmax(x, -1),
            F.prelu(x, y[0, :1]), torch.prelu(x, y[0, :1]), F.max_pool1d(x[None], 2),
            F.max_pool1d(x[None], 2, return_indices=True)[0], torch.max_pool1d(x[None], 2),
            F.upsample(x[None], scale_factor=2), F.pad(x, (1, 1)), F.layer_norm(x, (4,)), F.normalize(x),
            torch.norm(x), torch.linalg.norm(x), torch.linalg.vector_norm(x), x.norm(), torch.clone(x),
            x.clamp(0, 1), torch.max(x), x.max(-1).values, torch.var_mean(x)[0], torch.sort(x)[0], x.cumsum(0),
            torch.stack([x, y]), torch.where(t, x, y), x.masked_fill(t, 0), x.index_select(0, i[:2]),
            torch.gather(x, 1, i[:1, None]), x.expand_as(y), x.unflatten(0, (3, 1)), x.permute(1, 0),
            torch.block_diag(x, y), torch.tensordot(x, y.T, 1), F.conv1d(x[None], y[None, :, :2]),
            torch.conv1d(x[None], y[None, :, :2]), F.cosine_similarity(x, y),
            F.scaled_dot_product_attention(x[None], y[None], y[None]), F.embedding(i[:2], x), F.mse_loss(x, y),
            F.cross_entropy(x, i[[0, 0, 1]]), F.glu(x), F.unfold(x[None, None], 2),
            F.bilinear(x, y, x.new_ones(2, 4, 4)),
        ]  # fmt: skip
        z = x.clone()
        z += y
        z -= 1
        z *= 2
        z /= 3
        z **= 2
        z.clamp_(0, 1).add_(y).sub_(y, alpha=2)
        z[0] = 1.0
        z[t] = 0.0
        z.index_put_((i[:1],), y[:1]).fill_diagonal_(3.0)
        F.relu_(z)
        whole = [
            i & 1,
            i | 1,
            i ^ 1,
            1 | i,
            i << 1,
            i >> 1,
            ~i,
            i == 2,
            i != 2,
            i.eq(2),
            i >= 2,
            i.bitwise_and(3),
            7 // i,
        ]
        if (t | ~t).all() and not torch.isnan(z).any():
            parts.append(z)
        return sum(part.sum() for part in [*parts, *whole])


def _mlp() -> Case:
    model = Mlp()
    tokens = torch.randint(10, (2, 5))
    target = torch.randint(4, (10,))
    return model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), target).backward()


def _transformer() -> Case:
    model = Transformer()
    x = torch.randn(2, 4, 16, requires_grad=True)
    return model, lambda: model(x)["logits"].square().mean().backward()


def _inference() -> Case:
    model = Transformer().eval()
    x = torch.randn(2, 4, 16)

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return model, step


def _cnn() -> Case:
    model = Cnn()
    images = torch.randn(4, 3, 8, 8)
    return model, lambda: F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()


def _lstm() -> Case:
    model = Lstm()
    tokens = torch.randint(10, (3, 6))
    return model, lambda: model(tokens).log_softmax(-1).mean().backward()


def _encoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    return model, lambda: model(x).pow(2).sum().backward()


def _moe() -> Case:
    model = Moe()
    x = torch.randn(6, 8)
    return model, lambda: (model(x) ** 2).sum().backward()


def _nested() -> Case:
    model = Nested()
    x = torch.randn(3, 4, requires_grad=True)
    return model, lambda: model(x).backward()


def _operators() -> Case:
    model = Operators()
    x, y = torch.rand(3, 4) + 0.5, torch.rand(3, 4) + 0.5
    return model, lambda: model(x.requires_grad_(), y).backward()


def _training() -> Case:
    """A whole training step: two micro-batches, clipped gradients, SGD with momentum."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = torch.randn(2, 4, 6)

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            F.mse_loss(model(batch), batch[:, :1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    return model, step


def _recomputed() -> Case:
    """Activation checkpointing: calls are made again in the backward."""
    model = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
    x = torch.randn(4, 6, requires_grad=True)

    def step() -> None:
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=False) * 2
        y.sum().backward()

    return model, step


CASES: dict[str, Callable[[], Case]] = {
    "mlp": _mlp,
    "transformer": _transformer,
    "inference": _inference,
    "cnn": _cnn,
    "lstm": _lstm,
    "encoder": _encoder,
    "moe": _moe,
    "nested": _nested,
    "operators": _operators,
    "training": _training,
    "recomputed": _recomputed,
}
