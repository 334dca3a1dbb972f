"""The cache of measurements: nothing that may lie in its file is an error, and writers at once lose nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hwkern import _cache, hardware
from hwkern._cache import Cache

STAMP = {"gpu": "Some GPU", "driver": 13000, "hwkern": "0.1"}


@pytest.fixture
def cache(tmp_path):
    return Cache("tune", STAMP, tmp_path / "not" / "there")


def test_what_was_written_is_read_by_another(cache):
    assert cache.read() == {}
    assert cache.update({"a": {"1": 2.5}, "b": [1, 2]})
    assert Cache("tune", STAMP, cache.path.parent).read() == {"a": {"1": 2.5}, "b": [1, 2]}


def test_an_update_keeps_the_other_entries(cache):
    cache.update({"a": 1, "b": 2})
    cache.update({"b": 3, "c": 4})
    assert cache.read() == {"a": 1, "b": 3, "c": 4}
    cache.clear()
    cache.clear()
    assert cache.read() == {}


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe\x00garbage", b"[]", b"null", b"3", b"{}", b'{"stamp": {}, "entries": {"a": 1}}',
     json.dumps({"stamp": STAMP, "entries": [1]}).encode(), json.dumps({"stamp": STAMP}).encode(), b"[" * 100_000],
)  # fmt: skip
def test_a_corrupt_file_is_an_empty_cache_and_can_be_written_again(cache, text):
    cache.update({"a": 1})
    cache.path.write_bytes(text)
    assert cache.read() == {}
    assert cache.update({"b": 2})
    assert cache.read() == {"b": 2}


def test_a_truncated_file_is_an_empty_cache(cache):
    cache.update({str(i): i for i in range(100)})
    whole = cache.path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        cache.path.write_bytes(whole[:length])
        assert cache.read() == {}


@pytest.mark.parametrize("key", STAMP)
def test_every_part_of_the_stamp_counts(cache, key):
    cache.update({"a": 1})
    other = Cache("tune", {**STAMP, key: "another"}, cache.path.parent)
    assert other.path != cache.path
    assert other.read() == {}
    other.path.write_bytes(cache.path.read_bytes())  # someone copies the file: the stamp inside still is the old one
    assert other.read() == {}
    assert Cache("plan", STAMP, cache.path.parent).read() == {}


def test_a_folder_that_cannot_be_written_is_said_and_no_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    cache = Cache("tune", STAMP, tmp_path / "file" / "below")
    assert not cache.update({"a": 1})
    assert cache.read() == {}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(cache, monkeypatch):
    cache.update({"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not cache.update({"b": 2})
    assert cache.read() == {"a": 1}
    assert not list(cache.path.parent.glob("*.tmp"))


WRITER = """
import sys
from pathlib import Path
from hwkern._cache import Cache
cache = Cache("tune", {"x": 1}, Path(sys.argv[1]))
for i in range(40):
    assert cache.update({f"{sys.argv[2]} {i}": i})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no lock there: the last writer wins")
def test_processes_that_write_at_once_lose_nothing_and_no_reader_sees_half_a_file(tmp_path):
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], env=environment) for i in range(3)
    ]
    cache = Cache("tune", {"x": 1}, tmp_path)
    seen = 0
    while any(writer.poll() is None for writer in writers):
        now = len(cache.read())
        assert now >= seen  # a torn file would read as empty
        seen = now
    assert all(writer.returncode == 0 for writer in writers)
    assert len(cache.read()) == 3 * 40


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HWKERN_CACHE", raising=False)
    if sys.platform.startswith("linux"):
        assert _cache.folder() == tmp_path / "hwkern"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert _cache.folder() == Path.home() / ".cache" / "hwkern"
    monkeypatch.setenv("HWKERN_CACHE", str(tmp_path / "mine"))
    assert _cache.folder() == tmp_path / "mine"


def test_the_stamp_of_a_gpu_is_plain_and_names_the_versions():
    from hwkern.explain import H100

    stamp = _cache.device_stamp(H100)
    assert json.loads(json.dumps(stamp)) == stamp
    assert {"gpu", "driver", "cuda", "hwkern", "configs"} <= set(stamp)
    assert isinstance(H100, hardware.Gpu)
