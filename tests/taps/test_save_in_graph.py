"""acl_save inside CUDA graphs: the next file at each replay, whatever the disk, the streams and the graph's end do."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from msprobe_graph import acl_save, flush
from msprobe_graph.dump.tensor_files import TensorFiles
from msprobe_graph.taps import cuda_graphs, save_op
from msprobe_graph.taps.cuda_graphs import CudaGraphs
from msprobe_graph.taps.device import of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not cuda_graphs.saves_in_graphs(), reason="no driver, or _host_queue is not compiled"),
]


def captured(program: Callable[[], object], mode: str = "global") -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        program()
    return graph


def load(path: Path, count: int) -> list[torch.Tensor]:
    """All files of `path`, of which there are `count`."""
    assert len(list(path.parent.glob(f"{path.name}_*.pt"))) == count
    assert not list(path.parent.glob("*.part"))
    return [torch.load(path.with_name(f"{path.name}_{number}.pt"), weights_only=True) for number in range(count)]


def numbers(path: Path, count: int) -> list[float]:
    """What each file of `path` is full of."""
    found = load(path, count)
    for tensor in found:
        assert tensor.min() == tensor.max(), "torn"
    return [tensor.min().item() for tensor in found]


class SlowFiles(TensorFiles):
    """On a disk that takes its time, or waits until `go` is set."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        self._seconds = seconds

    def write(self, path: str, read: Callable[[], torch.Tensor]) -> None:
        assert self.go.wait(60)
        time.sleep(self._seconds)
        super().write(path, read)


def ended(graphs: CudaGraphs) -> bool:
    """Whether CUDA has told of the end of all graphs, which it does in a thread of its own."""
    gc.collect()
    deadline = time.monotonic() + 30
    while graphs._queue.sources() and time.monotonic() < deadline:
        time.sleep(0.01)
        graphs.flush()
    return not graphs._queue.sources()


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda n: (torch.arange(24.0, device=n.device).reshape(4, 6) + n).t(),
    "strided": lambda n: (torch.arange(10, device=n.device) * n.long())[::3],
    "expanded": lambda n: n.reshape(1, 1).expand(3, 5),
    "scalar": lambda n: n * 2,
    "empty": lambda n: torch.empty(0, 7, device=n.device),
    "bool": lambda n: torch.arange(5, device=n.device) < n,
    "float64": lambda n: torch.ones(3, dtype=torch.float64, device=n.device) / n,
    "bfloat16": lambda n: (torch.arange(7.0, device=n.device) / 3 + n).bfloat16(),
    "float8": lambda n: (torch.arange(7.0, device=n.device) + n).to(torch.float8_e4m3fn),
    "conjugated": lambda n: torch.complex(torch.ones(2, 3, device=n.device), n.expand(2, 3)).conj().t(),
    "negated": lambda n: torch.complex(torch.ones(2, 3, device=n.device), n.expand(2, 3)).conj().imag,
    "parameter": lambda n: torch.nn.Parameter(n + torch.zeros(3, device=n.device)),
}


def bits(x: torch.Tensor) -> list[int]:
    values: list[int] = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()
    return values


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_each_replay_writes_the_next_file_of_each_path(tmp_path: Path, mode: str) -> None:
    n = torch.zeros((), device="cuda")

    def program() -> None:
        n.add_(1)
        for kind, make in KINDS.items():
            acl_save(make(n), tmp_path / kind)

    graph = captured(program, mode)
    flush()
    assert list(tmp_path.iterdir()) == []
    for _ in range(5):
        graph.replay()
    flush()
    for kind, make in KINDS.items():
        for number, found in enumerate(load(tmp_path / kind, 5)):
            expected = make(torch.tensor(number + 1.0))
            assert type(found) is torch.Tensor
            assert found.is_contiguous()
            assert (found.dtype, found.shape, found.requires_grad) == (expected.dtype, expected.shape, False)
            assert bits(found) == bits(expected), (kind, number)


def test_a_thousand_replays_back_to_back_on_a_slow_disk(tmp_path: Path) -> None:
    """With room for three of the values, of which every other is larger."""
    files, graphs = SlowFiles(0.001), CudaGraphs(queued_bytes=60_000)
    n = torch.zeros((), device="cuda", dtype=torch.int64)

    def program() -> None:
        n.add_(1)
        graphs.save(n.expand(2500), partial(files.write, f"{tmp_path}/wide"))
        graphs.save(n.to(torch.bfloat16).expand(8, 896), partial(files.write, f"{tmp_path}/narrow"))
        n.add_(1000).sub_(1000)  # what a replay does behind the save is not seen in it

    graph = captured(program)
    for _ in range(1000):
        graph.replay()
    graphs.flush()
    assert files.lost == 0
    assert numbers(tmp_path / "wide", 1000) == list(range(1, 1001))
    expected = torch.arange(1, 1001).bfloat16().tolist()
    assert numbers(tmp_path / "narrow", 1000) == expected
    del graph
    assert ended(graphs)


def test_large_values_are_whole(tmp_path: Path) -> None:
    n = torch.zeros(2_000_000, device="cuda")
    graph = captured(lambda: acl_save(n.add_(1), tmp_path / "x"))
    for _ in range(10):
        graph.replay()
    flush()
    assert numbers(tmp_path / "x", 10) == list(range(1, 11))


def test_a_graph_that_dies_while_its_values_wait(tmp_path: Path) -> None:
    files, graphs = SlowFiles(), CudaGraphs()
    files.go.clear()
    n = torch.zeros(1000, device="cuda")

    def program() -> None:
        graphs.save(n.add_(1), partial(files.write, f"{tmp_path}/x"))

    graph = captured(program)
    for _ in range(20):
        graph.replay()
    del graph, program  # some replays may be under way
    gc.collect()
    again = captured(lambda: n.zero_())
    again.replay()
    torch.cuda.synchronize()
    files.go.set()
    assert ended(graphs)
    assert numbers(tmp_path / "x", 20) == list(range(1, 21))
    # Its slot is another graph's now.
    other = captured(lambda: graphs.save(n.sub_(1), partial(files.write, f"{tmp_path}/y")))
    other.replay()
    graphs.flush()
    assert numbers(tmp_path / "y", 1) == [-1]


def test_a_capture_that_fails_leaves_nothing(tmp_path: Path) -> None:
    files, graphs = SlowFiles(), CudaGraphs()
    n = torch.zeros(3, device="cuda")

    def program() -> None:
        graphs.save(n, partial(files.write, f"{tmp_path}/x"))
        raise KeyError("the model's own")

    with pytest.raises(KeyError):
        captured(program)
    assert ended(graphs)
    assert list(tmp_path.iterdir()) == []
    assert n.tolist() == [0, 0, 0]


def test_in_inference_mode_and_replayed_on_another_stream(tmp_path: Path) -> None:
    with torch.inference_mode():
        n = torch.zeros(100, device="cuda")
        graph = captured(lambda: acl_save(n.add_(1) * 2, tmp_path / "x"))
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            graph.replay()
    flush()
    assert numbers(tmp_path / "x", 2) == [2, 4]


def test_on_a_stream_that_joins_the_capture(tmp_path: Path) -> None:
    n, side = torch.zeros(100, device="cuda"), torch.cuda.Stream()

    def program() -> None:
        n.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            acl_save(n * 3, tmp_path / "side")
        acl_save(n * 2, tmp_path / "main")
        torch.cuda.current_stream().wait_stream(side)

    graph = captured(program)
    for _ in range(3):
        graph.replay()
    flush()
    assert numbers(tmp_path / "side", 3) == [3, 6, 9]
    assert numbers(tmp_path / "main", 3) == [2, 4, 6]


def test_graphs_of_several_threads_share_a_path(tmp_path: Path) -> None:
    files, graphs, each = SlowFiles(0.0005), CudaGraphs(queued_bytes=3000), 100
    values = [torch.full((100,), 1000.0 * thread, device="cuda") for thread in range(3)]
    made = [
        captured(lambda n=n: graphs.save(n.add_(1), partial(files.write, f"{tmp_path}/x")))  # type: ignore[misc]
        for n in values
    ]

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(each):
                graph.replay()

    workers = [threading.Thread(target=replay, args=(graph,)) for graph in made]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    graphs.flush()
    found = numbers(tmp_path / "x", 3 * each)
    for thread in range(3):
        begin = 1000 * thread
        assert [number for number in found if begin < number <= begin + each] == list(
            range(begin + 1, begin + each + 1)
        )


def test_eager_saves_behind_replays_wait_for_nothing_that_waits_for_them(tmp_path: Path) -> None:
    files, graphs = SlowFiles(0.001), CudaGraphs(queued_bytes=4000)
    device = of(torch.device("cuda", torch.cuda.current_device()))
    tight = TensorFiles(queued_bytes=4000)
    n = torch.zeros(1000, device="cuda")
    graph = captured(lambda: graphs.save(n.add_(1), partial(files.write, f"{tmp_path}/replayed")))
    for _ in range(100):
        graph.replay()
        tight.save(f"{tmp_path}/eager", n.nbytes, lambda: device.to_host(n))
    graphs.flush()
    tight.flush()
    assert numbers(tmp_path / "replayed", 100) == numbers(tmp_path / "eager", 100) == list(range(1, 101))


def test_flush_waits_for_replays_that_are_under_way(tmp_path: Path) -> None:
    n = torch.zeros(100, device="cuda")

    def program() -> None:
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        acl_save(n.add_(1), tmp_path / "x")

    graph = captured(program)
    for _ in range(3):
        graph.replay()
    flush()
    assert numbers(tmp_path / "x", 3) == [1, 2, 3]


def test_flush_inside_a_capture_does_it_no_harm(tmp_path: Path) -> None:
    n = torch.zeros(100, device="cuda")

    def program() -> None:
        acl_save(n.add_(1), tmp_path / "x")
        cuda_graphs.saves.flush()

    graph = captured(program)
    graph.replay()
    flush()
    assert numbers(tmp_path / "x", 1) == [1]


PROGRAM = """
import os, sys, torch
from msprobe_graph import acl_save, flush
n = torch.zeros(100, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    acl_save(n.add_(1), sys.argv[1] + "/x")
for _ in range(50):
    graph.replay()
"""
ENDS = {
    "with the graph alive": "",
    "without the graph": "del graph",
    "by an exception": "raise SystemExit(0)",
    "after a fork": """
child = os.fork()
if child == 0:
    acl_save(torch.ones(1), sys.argv[1] + "/child")
    flush()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_what_was_replayed_is_written_at_the_exit(tmp_path: Path, end: str) -> None:
    command = [sys.executable, "-c", PROGRAM + ENDS[end], str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert numbers(tmp_path / "x", 50) == list(range(1, 51))
    assert (tmp_path / "child_0.pt").exists() == (end == "after a fork")


def test_where_the_means_are_missing_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "saves_in_graphs", lambda: False)
    save_op._say_captured.cache_clear()
    x = torch.zeros(10, device="cuda")
    graph = captured(lambda: acl_save(x.add_(1), tmp_path / "x"))
    graph.replay()
    flush()
    assert x.tolist() == [1] * 10
    assert list(tmp_path.iterdir()) == []
    assert "saves nothing from inside a graph captured on cuda:0" in caplog.text
