"""TensorFiles: numbers, back-pressure, whole files, failures, forks."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from msprobe_graph.dump.tensor_files import Host, TensorFiles


def save(files: TensorFiles, path: Path | str, value: torch.Tensor) -> None:
    files.save(str(path), value.nbytes, lambda: (value.clone(), lambda: None))


def load(path: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(path, weights_only=True)
    return tensor


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_path_has_numbers_of_its_own(tmp_path: Path) -> None:
    files = TensorFiles()
    for number, path in enumerate(["x.pt", "y.pt", "x.pt", "x", "sub/../x.pt", "layer.3", "layer.4.pt", "new/deep/z"]):
        save(files, f"{tmp_path}/{path}", torch.tensor(number))
    files.flush()
    assert names(tmp_path) == [
        *("layer.3_0.pt", "layer.4_0.pt", "new", "x_0.pt", "x_1.pt", "x_2.pt", "x_3.pt", "y_0.pt"),
    ]
    assert [load(tmp_path / f"x_{n}.pt").item() for n in range(4)] == [0, 2, 3, 4]
    assert load(tmp_path / "new" / "deep" / "z_0.pt").item() == 7


def test_relative_paths_are_those_of_the_time_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TensorFiles()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        save(files, "x.pt", torch.ones(1))
    monkeypatch.chdir(tmp_path)
    files.flush()
    assert names(tmp_path / "one") == names(tmp_path / "two") == ["x_0.pt"]


@pytest.mark.parametrize("path", ["", "/", "folder/", "folder/.", "..", "folder/.pt", "nul\0byte"])
def test_a_path_that_names_no_file(path: str) -> None:
    with pytest.raises(ValueError, match=r"needs the path of a file, such as 'dump/x.pt', not "):
        TensorFiles().expect(path)


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    files = TensorFiles()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"acl_save can't write '{tmp_path}/file/x.pt': Not a directory"):
        files.expect(f"{tmp_path}/file/x.pt")
    with pytest.raises(NotADirectoryError):
        files.expect(f"{tmp_path}/file/deeper/x.pt")
    with pytest.raises(OSError, match="File name too long"):
        files.expect(f"{tmp_path}/{'n' * 250}")
    with pytest.raises(OSError, match="acl_save can't write '/proc/none/x'"):
        files.expect("/proc/none/x")
    files.expect(f"{tmp_path}/fine/x")
    assert names(tmp_path / "fine") == []


def test_threads_that_save_on_one_path(tmp_path: Path) -> None:
    files = TensorFiles(queued_bytes=64)
    each, threads = 25, 4

    def work(thread: int) -> None:
        for call in range(each):
            save(files, tmp_path / "x", torch.tensor([thread, call]))

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    files.flush()
    saved = [tuple(load(tmp_path / f"x_{n}.pt").tolist()) for n in range(each * threads)]
    assert len(names(tmp_path)) == each * threads
    for thread in range(threads):
        assert [call for who, call in saved if who == thread] == list(range(each))


def test_a_full_queue_waits_for_the_disk(tmp_path: Path) -> None:
    """Two of three tensors fit; the third save returns only once the first is written."""
    files = TensorFiles(queued_bytes=800)
    disk, third = threading.Event(), threading.Event()

    def read() -> Host:
        return torch.zeros(100), lambda: None if disk.wait(30) else pytest.fail("the disk never came")

    def work() -> None:
        for _ in range(3):
            files.save(f"{tmp_path}/x", 400, read)
        third.set()

    worker = threading.Thread(target=work)
    worker.start()
    assert not third.wait(0.3)
    disk.set()
    worker.join(30)
    assert third.is_set()
    files.flush()
    assert len(names(tmp_path)) == 3


def test_a_tensor_larger_than_the_queue_is_saved(tmp_path: Path) -> None:
    files = TensorFiles(queued_bytes=10)
    for _ in range(2):
        save(files, tmp_path / "x", torch.ones(100))
    files.flush()
    assert names(tmp_path) == ["x_0.pt", "x_1.pt"]


def test_what_is_written_at_once_waits_for_nothing_but_the_disk(tmp_path: Path) -> None:
    """Both ways count together; what was taken before may still have to arrive."""
    files, arrived = TensorFiles(queued_bytes=8), threading.Event()
    files.save(f"{tmp_path}/x", 8, lambda: (torch.zeros(2), lambda: None if arrived.wait(30) else pytest.fail("late")))
    files.write(f"{tmp_path}/x.pt", lambda: torch.ones(2))
    assert names(tmp_path) == ["x_1.pt"]
    arrived.set()
    files.flush()
    assert [load(tmp_path / f"x_{number}.pt").tolist() for number in range(2)] == [[0, 0], [1, 1]]


def test_what_can_not_be_written_at_once_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = TensorFiles()

    def no_memory() -> torch.Tensor:
        raise RuntimeError("no memory for 8 bytes")

    (tmp_path / "x_0.pt.part").symlink_to("/dev/full")
    files.write(f"{tmp_path}/x", lambda: torch.zeros(50_000))
    files.write(f"{tmp_path}/x", no_memory)
    files.write(f"{tmp_path}/x", lambda: torch.full((1 // 0,), 1))
    files.write(f"{tmp_path}/x", lambda: torch.ones(2))
    assert load(tmp_path / "x_3.pt").tolist() == [1, 1]
    assert "x_0.pt" in caplog.text
    files.close()
    assert caplog.records[-1].getMessage() == "acl_save: 3 tensors could not be saved"


def test_a_full_disk_is_said_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full is a disk without space; what fits elsewhere is still saved, under the number of its call."""
    files = TensorFiles()
    for number in (0, 2):
        (tmp_path / f"x_{number}.pt.part").symlink_to("/dev/full")
    for number in range(4):
        save(files, tmp_path / "x", torch.full((50_000,), float(number)))
    files.flush()
    assert [name for name in names(tmp_path) if not name.endswith(".part")] == ["x_1.pt", "x_3.pt"]
    assert load(tmp_path / "x_3.pt")[0] == 3
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "x_0.pt" in errors[0]
    assert "No space left on device" in errors[0]
    files.close()
    assert caplog.records[-1].getMessage() == "acl_save: 2 tensors could not be saved"


def test_what_cannot_be_read_breaks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = TensorFiles(queued_bytes=8)

    def out_of_memory() -> Host:
        raise torch.OutOfMemoryError("no memory for the copy")

    files.save(f"{tmp_path}/x", 8, out_of_memory)
    files.save(f"{tmp_path}/x", 8, lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    save(files, tmp_path / "x", torch.ones(2))
    files.flush()
    assert names(tmp_path) == ["x_2.pt"]
    assert "no memory for the copy" in caplog.text
    files.close()
    assert caplog.records[-1].getMessage() == "acl_save: 2 tensors could not be saved"


def test_files_of_an_earlier_run_are_replaced_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in (1, 2):
        files = TensorFiles()
        save(files, tmp_path / "x", torch.tensor(value))
        save(files, tmp_path / "x", torch.tensor(value))
        files.flush()
        assert ("acl_save replaces" in caplog.text) is (value == 2)
    assert load(tmp_path / "x_0.pt").item() == 2
    assert len([record for record in caplog.records if "replaces" in record.message]) == 1


def test_a_folder_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    files = TensorFiles()
    files.expect(f"{tmp_path}/sub/x")
    (tmp_path / "sub").rmdir()
    save(files, tmp_path / "sub" / "x", torch.ones(1))
    files.flush()
    assert names(tmp_path / "sub") == ["x_0.pt"]


def test_restart_in_a_forked_process(tmp_path: Path) -> None:
    """The child counts on, writes with a thread of its own, and does not write what waits in the parent."""
    files = TensorFiles()
    save(files, tmp_path / "x", torch.tensor(0))
    files.flush()
    child = os.fork()
    if child == 0:
        files.restart()
        save(files, tmp_path / "x", torch.tensor(1))
        files.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert names(tmp_path) == ["x_0.pt", "x_1.pt"]
