"""Files that notice damage, and what happens to a run and to a cache whose files are damaged."""

import logging
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from metarun.data.cache import cached
from metarun.data.store import stored
from metarun.errors import UserError
from metarun.results import checkpoint
from metarun.system import sealed
from metarun.system.files import atomic_write, remove_leftovers

CONTENT = {"step": 3, "config_hash": "abc", "state": {"weights": torch.arange(5000.0)}, "rows": [[{"step": 1}]]}


def flipped_at_every_tenth(path):
    """The file with one bit flipped, at eleven places from its first byte to its last."""
    whole = path.read_bytes()
    for tenth in range(11):
        position = min(len(whole) * tenth // 10, len(whole) - 1)
        broken = bytearray(whole)
        broken[position] ^= 1 << tenth % 8
        path.write_bytes(broken)
        yield position
    path.write_bytes(whole)


def test_torch_reads_what_was_written(tmp_path):
    sealed.save(tmp_path / "a.pt", CONTENT)
    for found in (torch.load(tmp_path / "a.pt", weights_only=True), sealed.load(tmp_path / "a.pt")):
        assert_close(found.pop("state"), CONTENT["state"], rtol=0, atol=0)
        assert found == {key: value for key, value in CONTENT.items() if key != "state"}


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    checkpoint.save_last(tmp_path, CONTENT)
    path = tmp_path / "checkpoints" / "last.pt"
    noticed = 0
    for _ in flipped_at_every_tenth(path):
        with pytest.raises(UserError, match="is broken"):
            checkpoint.load_last(tmp_path, "cpu", "abc")
        noticed += 1
    assert noticed == 11
    assert checkpoint.load_last(tmp_path, "cpu", "abc")["step"] == 3


def test_the_checkpoint_before_the_last_takes_the_place_of_a_damaged_one(tmp_path, caplog):
    for step in (1, 2, 3):
        checkpoint.save_last(tmp_path, CONTENT | {"step": step})
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-500])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_last(tmp_path, "cpu", "abc")["step"] == 2
    assert "the run continues from the one before it, of step 2" in caplog.text
    # What is saved next keeps a whole one before it.
    checkpoint.save_last(tmp_path, CONTENT | {"step": 4})
    assert [sealed.load(last.with_name(name))["step"] for name in ("last.pt", "previous.pt")] == [4, 2]
    last.unlink()
    assert checkpoint.load_last(tmp_path, "cpu", "abc")["step"] == 2


def test_a_file_system_without_links_keeps_both_checkpoints_too(tmp_path, monkeypatch):
    def no_links(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2, 3):
        checkpoint.save_last(tmp_path, CONTENT | {"step": step})
    folder = tmp_path / "checkpoints"
    assert [sealed.load(folder / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 2]
    assert len(list(folder.iterdir())) == 2


def test_every_flipped_bit_of_a_cache_is_noticed_and_mended(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path))
    made = []

    def make():
        made.append(True)
        return {"images": torch.arange(3000)}

    cached("pictures", "key", make)
    (path,) = tmp_path.glob("*.pt")
    for noticed, _ in enumerate(flipped_at_every_tenth(path), 1):
        assert_close(cached("pictures", "key", make)["images"], torch.arange(3000))
        assert len(made) == 1 + noticed
        assert "it is made again" in caplog.text
        caplog.clear()
    cached("pictures", "key", make)
    assert len(made) == 12
    assert not caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cached("pictures", "key", lambda: {"a": torch.ones(2)})["a"].sum() == 2
    assert "each run makes it again" in caplog.text


@pytest.mark.parametrize("kind", ["tensors", "rows"])
def test_what_several_jobs_want_at_once_is_made_once(tmp_path, monkeypatch, kind):
    """Each has opened the lock for itself, so threads wait here as processes do."""
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path))
    made = []

    def make():
        made.append(1)
        time.sleep(0.1)
        return {"a": torch.arange(3)}

    def rows():
        return iter(make()["a"].to(torch.uint8).numpy().reshape(3, 1))

    def got(_):
        if kind == "tensors":
            return cached("name", "key", make)["a"].tolist()
        return stored("name", "key", 3, (1,), rows, "Reading.").rows.flatten().tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(got, range(4))) == [[0, 1, 2]] * 4
    assert len(made) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path):
    checkpoint.save_last(tmp_path, CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save_last(tmp_path, CONTENT | {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load_last(tmp_path, "cpu", "abc")["step"] == 3
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_unfinished_files_of_killed_processes_are_removed(tmp_path):
    with atomic_write(tmp_path / "table.csv") as file:
        file.write(b"whole")
        (unfinished,) = tmp_path.glob(".*")
        # As SIGKILL leaves it: under a name that is never renamed.
        (tmp_path / f"{unfinished.name[:-5]}x.part").write_bytes(b"half")
    remove_leftovers(tmp_path, age=3600)
    assert len(list(tmp_path.iterdir())) == 2
    long_ago = time.time() - 7200
    (leftover,) = tmp_path.glob(".*.part")
    os.utime(leftover, (long_ago, long_ago))
    remove_leftovers(tmp_path, age=3600)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_our_cache_holds_for_compiled_graphs_unless_the_user_has_named_another(tmp_path, monkeypatch):
    from metarun.engine.compiler import compiler_cache

    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # What importing the compiler does.
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache_dir()) == cache_dir()
    assert compiler_cache() == tmp_path / "cache" / "compiled"
    assert cache_dir() == str(tmp_path / "cache" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    compiler_cache()
    assert cache_dir() == str(tmp_path / "own")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert compiler_cache() is None
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
