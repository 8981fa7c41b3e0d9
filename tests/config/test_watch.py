"""ConfigWatch: edits are seen, at one stat() a second, and no state of the file breaks a running process."""

import json
import logging
import os
from pathlib import Path

import pytest

from msprobe_graph.config import ConfigWatch, load_settings


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.json"


@pytest.fixture
def stats(monkeypatch, path):
    """The stat() calls on the config file."""
    calls, stat = [], Path.stat

    def counted(target, **kwargs):
        if target == path:
            calls.append(target)
        return stat(target, **kwargs)

    monkeypatch.setattr(Path, "stat", counted)
    return calls


def config(enable):
    return json.dumps({"dump_path": "x", "dump_enable": enable})


def watch_of(path, clock, enable=True):
    path.write_text(config(enable))
    return ConfigWatch(load_settings(path), clock)


def later(clock, watch, seconds=1.0):
    clock.now += seconds
    return watch.enabled()


@pytest.mark.parametrize("enable", [True, False])
def test_the_first_answer_is_the_files(path, clock, enable):
    assert watch_of(path, clock, enable).enabled() is enable


def test_an_edit_is_seen_both_ways(path, clock):
    watch = watch_of(path, clock)
    assert watch.enabled()
    for enable in (False, True, False):
        path.write_text(config(enable))
        assert later(clock, watch) is enable


def test_an_edit_between_loading_and_watching_is_seen(path, clock):
    path.write_text(config(False))
    settings = load_settings(path)
    path.write_text(config(True))
    assert ConfigWatch(settings, clock).enabled()


def test_an_edit_is_not_seen_before_a_second_has_passed(path, clock):
    watch = watch_of(path, clock)
    assert watch.enabled()
    path.write_text(config(False))
    assert later(clock, watch, 0.75)
    assert not later(clock, watch, 0.25)


def test_one_stat_a_second(path, clock, stats):
    watch = watch_of(path, clock)
    stats.clear()
    for _ in range(1000):
        later(clock, watch, 1 / 64)
    assert len(stats) == 16  # 15.625 seconds


def test_the_file_is_read_again_only_when_it_changed(path, clock, monkeypatch):
    reads = []
    watch = watch_of(path, clock)
    monkeypatch.setattr("msprobe_graph.config.watch.read_mapping", lambda path: reads.append(path) or {})
    for _ in range(5):
        later(clock, watch)
    assert len(reads) == 1
    os.utime(path, ns=(1, 1))
    later(clock, watch)
    assert len(reads) == 2


def test_a_replaced_file_of_the_same_size_and_time_is_seen(path, tmp_path, clock):
    watch = watch_of(path, clock)
    assert watch.enabled()
    old = path.stat()
    new = tmp_path / "new"
    new.write_text(config(False).replace(" ", "", 1))
    assert new.stat().st_size == old.st_size
    os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
    new.replace(path)
    assert not later(clock, watch)


@pytest.mark.parametrize(
    "broken", ["", '{"dump_path": "x", "dump_en', "[]", '{"dump_enable": "false"}', '{"dump_enable": 0}']
)
@pytest.mark.parametrize("enable", [True, False])
def test_a_broken_file_keeps_the_last_value_and_is_logged_once(path, clock, caplog, broken, enable):
    watch = watch_of(path, clock, enable)
    watch.enabled()
    with caplog.at_level(logging.WARNING, "msprobe_graph"):
        path.write_text(broken)
        assert [later(clock, watch) for _ in range(3)] == [enable] * 3
        path.write_text(broken + " ")
        assert later(clock, watch) is enable
        (record,) = caplog.records
        assert record.name == "msprobe_graph"
        assert str(path) in record.getMessage()
        assert record.getMessage().endswith("capture stays on" if enable else "capture stays off")
        path.write_text(config(not enable))
        assert later(clock, watch) is not enable
        path.write_text(broken)
        assert later(clock, watch) is not enable
        assert len(caplog.records) == 2  # good in between: logged anew


def test_a_deleted_file_keeps_the_last_value_and_may_come_back(path, clock, caplog):
    watch = watch_of(path, clock)
    assert watch.enabled()
    path.unlink()
    with caplog.at_level(logging.WARNING, "msprobe_graph"):
        assert [later(clock, watch) for _ in range(3)] == [True] * 3
    assert len(caplog.records) == 1
    path.write_text(config(False))
    assert not later(clock, watch)


def test_a_file_that_becomes_readable_without_a_change_is_read(path, clock, monkeypatch):
    watch = watch_of(path, clock)
    assert watch.enabled()
    old = path.stat()
    path.write_text(config(False)[:-3])
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert later(clock, watch)
    times = path.stat()
    path.write_text(config(False).replace(" ", ""))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert not later(clock, watch)


def test_dump_enable_taken_out_keeps_the_last_value(path, clock):
    watch = watch_of(path, clock, False)
    path.write_text('{"dump_path": "x"}')
    assert not watch.enabled()


def test_other_edits_do_not_matter(path, clock):
    watch = watch_of(path, clock)
    path.write_text('{"dump_enable": false, "level": "nonsense", "unknown": 1}')
    assert not watch.enabled()


def test_yaml_is_watched_too(tmp_path, clock):
    path = tmp_path / "config.yaml"
    path.write_text("dump_path: x\ndump_enable: on\n")
    watch = ConfigWatch(load_settings(path), clock)
    assert watch.enabled()
    path.write_text("dump_path: x\ndump_enable: off\n")
    assert not later(clock, watch)


def test_without_dump_enable_the_file_is_never_looked_at(path, clock, stats):
    path.write_text('{"dump_path": "x"}')
    watch = ConfigWatch(load_settings(path), clock)
    stats.clear()
    path.write_text(config(False))
    assert [later(clock, watch) for _ in range(3)] == [True] * 3
    assert stats == []


@pytest.mark.parametrize(("enable", "enabled"), [(None, True), (True, True), (False, False)])
def test_a_mapping_has_no_file_to_watch(clock, caplog, enable, enabled):
    watch = ConfigWatch(load_settings({"dump_path": "x", "dump_enable": enable}), clock)
    assert [later(clock, watch) for _ in range(3)] == [enabled] * 3
    assert not caplog.records


def test_it_is_cheap_with_the_real_clock(path, stats):
    path.write_text(config(True))
    watch = ConfigWatch(load_settings(path))
    stats.clear()
    assert all(watch.enabled() for _ in range(1000))
    assert 1 <= len(stats) <= 2
