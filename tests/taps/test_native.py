"""Finding the compiled code, and the fingerprint that only it takes."""

import logging
import shutil
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from msprobe_graph.taps import fingerprint, native

needs_native = pytest.mark.skipif(native.library() is None, reason="the C code is not compiled")


def test_without_the_compiled_code_a_warning_says_how_to_get_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "msprobe_graph"):
        assert native.load(tmp_path) is None
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage()
    assert "gcc" in record.getMessage()


@pytest.mark.parametrize("source", [None, "int msprobe_graph_abi(void) { return 0; }", "int other;"])
def test_a_file_that_is_not_this_code_is_refused(
    source: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"_statistics{EXTENSION_SUFFIXES[0]}"
    if source is None:
        path.write_bytes(b"not a library")
    elif (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    else:
        subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source, text=True, check=True)
    with caplog.at_level(logging.WARNING, "msprobe_graph"):
        assert native.load(tmp_path) is None
    assert str(path) in caplog.text


@needs_native
def test_the_library_is_looked_for_once() -> None:
    assert native.library() is native.library()


@needs_native
@pytest.mark.parametrize("count", [1, 5, 64, 65, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex128])
def test_a_fingerprint_notices_a_change_of_the_ends_or_of_everything(count: int, dtype: torch.dtype) -> None:
    tensor = (torch.arange(count) % 50).to(dtype)
    before = fingerprint(tensor)
    assert before == fingerprint(tensor.clone())
    for changed in (slice(0, 1), slice(count - 1, count), slice(None)):
        other = tensor.clone()
        other.data[changed] += 1
        assert fingerprint(other) != before


@needs_native
def test_a_fingerprint_reads_what_lies_where_it_is() -> None:
    tensor = torch.arange(12.0)
    assert fingerprint(tensor[4:]) == fingerprint(torch.arange(4.0, 12.0))
    assert fingerprint(tensor.reshape(3, 4).t()) is not None
    assert fingerprint(tensor[::2]) is None
    assert fingerprint(torch.empty(0)) is None
    assert fingerprint(torch.eye(3).to_sparse()) is None


def test_no_library_no_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert fingerprint(torch.ones(3)) is None
