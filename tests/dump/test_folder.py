"""How a run takes possession of its dump_path: earlier steps are moved aside, never mixed, never lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msprobe_graph.dump.folder import claim, run_identity, step_folder, write_whole


def leave(dump_path: Path, run: str | None, steps: int = 1) -> None:
    """What an earlier run (None: msProbe) has left behind."""
    if run is not None:
        claim(dump_path, run)
    for step in range(steps):
        folder = Path(step_folder(str(dump_path), step, "rank0"))
        folder.mkdir(parents=True)
        (folder / "dump.json").write_text(str(run))


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    assert claim(tmp_path / "a" / "b", "run") is None
    assert content(tmp_path / "a" / "b") == {"run.json"}
    assert content(tmp_path / "a") == {"b"}


@pytest.mark.parametrize("earlier", ["other run", None], ids=["ours", "msprobe"])
def test_another_runs_steps_are_moved_aside(tmp_path: Path, earlier: str | None) -> None:
    dump_path = tmp_path / "dump"
    leave(dump_path, earlier, steps=3)
    moved = claim(dump_path, "this run")
    assert moved is not None
    assert moved.parent == tmp_path
    assert re.fullmatch(r"dump\.\d{8}T\d{6}Z", moved.name)
    assert {"step0", "step1", "step2"} <= content(moved)
    assert (moved / "step2" / "rank0" / "dump.json").read_text() == str(earlier)
    assert content(dump_path) == {"run.json"}


def test_what_is_no_step_stays(tmp_path: Path) -> None:
    """dump_path may be the working directory, and hold the config file."""
    leave(tmp_path / "dump", "other run")
    for name in ("config.json", "steps_to_take.md", "step_by_step"):
        (tmp_path / "dump" / name).write_text("mine")
    moved = claim(tmp_path / "dump", "this run")
    assert moved is not None
    assert content(moved) == {"step0", "run.json"}
    assert content(tmp_path / "dump") == {"run.json", "config.json", "steps_to_take.md", "step_by_step"}


def test_one_runs_processes_share_the_folder(tmp_path: Path) -> None:
    leave(tmp_path / "dump", "run")
    assert claim(tmp_path / "dump", "run") is None
    assert content(tmp_path / "dump") == {"run.json", "step0"}


def test_several_runs_in_one_second_are_kept_apart(tmp_path: Path) -> None:
    for run in range(4):
        leave(tmp_path / "dump", str(run))
    kept = sorted(path.read_text() for path in tmp_path.glob("dump*/step0/rank0/dump.json"))
    assert kept == ["0", "1", "2", "3"]


@pytest.mark.parametrize("owner", ["", "[]", '{"run": 3}', "{"])
def test_a_spoilt_run_file_belongs_to_no_run(tmp_path: Path, owner: str) -> None:
    leave(tmp_path / "dump", "run")
    (tmp_path / "dump" / "run.json").write_text(owner)
    assert claim(tmp_path / "dump", "run") is not None


RANK = """
import sys
from pathlib import Path
from msprobe_graph.dump.folder import claim, run_identity, step_folder
dump_path, rank = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
moved = claim(dump_path, run_identity(world_size=4, nth=0))
folder = Path(step_folder(str(dump_path), 0, f"rank{rank}"))
folder.mkdir(parents=True)
(folder / "dump.json").write_text(rank)
print(moved, flush=True)
"""


def test_ranks_that_start_at_once_move_the_earlier_run_once(tmp_path: Path) -> None:
    dump_path = tmp_path / "dump"
    leave(dump_path, "other run", steps=2)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(dump_path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for process in ranks:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n", timeout=60)[0].strip() for process in ranks]
    assert [process.returncode for process in ranks] == [0] * 4
    (moved,) = {answer for answer in said if answer != "None"}
    assert said.count("None") == 3
    assert content(dump_path) == {"run.json", "step0"}
    assert content(dump_path / "step0") == {"rank0", "rank1", "rank2", "rank3"}
    assert content(Path(moved)) == {"run.json", "step0", "step1"}


def test_runs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, again, ranks = run_identity(1, 0), run_identity(1, 1), run_identity(2, 0)
    assert len({alone, again, ranks}) == 3
    assert run_identity(1, 0) == alone
    assert alone.startswith(f"{os.getpid()}@")
    assert ranks.startswith(f"{os.getppid()}@")
    monkeypatch.setenv("MSPROBE_GRAPH_RUN", "job-7")
    assert run_identity(2, 0) == run_identity(1, 0) == "job-7/0"


def test_write_whole_replaces(tmp_path: Path) -> None:
    write_whole(tmp_path / "f", b"one")
    write_whole(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert content(tmp_path) == {"f"}
