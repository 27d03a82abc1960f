import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest

from jaxinfer.search import cache as cache_module
from jaxinfer.search.cache import DAMAGED_NAME, FILE_NAME, Cache, CacheWarning, default_folder, key


@pytest.fixture(autouse=True)
def fresh_warning(monkeypatch):
    monkeypatch.setattr(cache_module, "_warned", False)


@pytest.fixture
def open_cache(tmp_path):
    """Opens caches on one folder and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def opened(folder: Path = tmp_path / "cache") -> Cache:
            cache = Cache(folder)
            stack.callback(cache.close)
            return cache

        yield opened


def start(code: str, *args: object, **options) -> subprocess.Popen:
    """Runs `code` in a fresh interpreter whose warnings go to stderr."""
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def test_values_come_back_in_a_new_instance(open_cache):
    values = {
        "a": [1.5, 2],
        "b": {"verdict": "kept", "low": 0.25},
        "c": None,
        "d": "é",
        "e": float("inf"),
        "f": {},
    }
    first = open_cache()
    first.put_many(values)
    first.put("a", [3])
    second = open_cache()
    assert second.get_many([*values, "missing"]) == values | {"a": [3]}
    assert second.get("missing", 7) == 7
    assert second.get("c", 7) is None
    assert len(second) == len(values)
    assert second.path == first.path and second.path.name == FILE_NAME
    second.clear()
    assert len(first) == 0 and first.get("a") is None


def test_values_that_json_does_not_know_are_refused(open_cache):
    cache = open_cache()
    with pytest.raises(TypeError):
        cache.put("a", object())
    assert len(cache) == 0


def test_returned_values_are_not_shared(open_cache):
    cache = open_cache()
    cache.put("a", [1])
    cache.get("a").append(2)
    assert cache.get("a") == [1]


def test_nothing_is_touched_before_first_use(open_cache, tmp_path):
    open_cache()
    assert list(tmp_path.iterdir()) == []


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXINFER_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "jaxinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert default_folder() == tmp_path / ".cache" / "jaxinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "jaxinfer"
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "~/mine")
    assert default_folder() == tmp_path / "mine"


def test_keys_tell_parts_apart():
    parts = [
        (1,),
        ("1",),
        (1.0,),
        (True,),
        (None,),
        (b"1",),
        ("1", ""),
        ("", "1"),
        ((1, 2),),
        (1, 2),
        ({"a": 1},),
    ]
    assert len({key(*part) for part in parts}) == len(parts)
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="object"):
        key(object())


def test_keys_are_the_same_in_another_process():
    code = "from jaxinfer.search.cache import key; print(key('matmul', [1, 2.5], b'x'))"
    out, _ = finish(start(code, env=os.environ | {"PYTHONHASHSEED": "123"}))
    assert out.strip() == key("matmul", [1, 2.5], b"x")


WRITER = """
    import sys
    from jaxinfer.search.cache import Cache
    folder, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    cache = Cache(folder)
    for i in range(count):
        cache.put(f"{name}-{i}", i)
        cache.put("shared", [name] * 50)
    cache.close()
"""


def test_processes_writing_at_once_lose_nothing(open_cache, tmp_path):
    names, count = ["a", "b", "c", "d"], 150
    for _, err in [finish(p) for p in [start(WRITER, tmp_path / "cache", name, count) for name in names]]:
        assert err == ""
    cache = open_cache()
    expected = {f"{name}-{i}": i for name in names for i in range(count)}
    assert cache.get_many(expected) == expected
    assert cache.get("shared") in [[name] * 50 for name in names]
    assert len(cache) == len(expected) + 1


def test_a_killed_writer_loses_only_what_it_had_not_put(open_cache, tmp_path):
    code = """
        import itertools, sys
        from jaxinfer.search.cache import Cache
        cache = Cache(sys.argv[1])
        for i in itertools.count():
            cache.put_many({f"{sys.argv[2]}-{i}": [i] * 200, f"{sys.argv[2]}-{i}-twin": [i] * 200})
            print(i, flush=True)
    """
    rng = random.Random(0)
    cache = open_cache()
    cache.put("before", 1)
    for round_ in range(4):
        process = start(code, tmp_path / "cache", round_)
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert err == ""
        lines = out.split("\n")
        done = 1 + max([0] + [int(line) for line in lines[:-1]])
        expected = {f"{round_}-{i}{twin}": [i] * 200 for i in range(done) for twin in ("", "-twin")}
        assert cache.get_many(expected) == expected
        # A transaction cut in two would have left one of a pair.
        rest = [f"{round_}-{i}" for i in range(done, done + 2)]
        for name in rest:
            assert cache.get(name) == cache.get(f"{name}-twin")
        cache.put(f"after-{round_}", 1)
    assert cache.get("before") == 1


@pytest.mark.parametrize("damage", ["garbage", "header", "cut", "middle", "empty", "foreign"])
def test_a_damaged_file_is_moved_aside_once(open_cache, tmp_path, damage):
    cache = open_cache()
    cache.put_many({f"{i}": ["x" * 100] for i in range(500)})
    path = cache.path
    cache.close()
    content = path.read_bytes()
    assert len(content) > 8 * 4096
    if damage == "foreign":
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE entries (something TEXT)")
    else:
        path.write_bytes(
            {
                "garbage": random.Random(0).randbytes(5000),
                "header": b"\0" * 100 + content[100:],
                "cut": content[: len(content) // 2 + 17],
                "middle": content[:4096] + b"\xa5" * (len(content) - 4096),
                "empty": b"",
            }[damage]
        )
    again = open_cache()
    expectation = contextlib.nullcontext() if damage == "empty" else pytest.warns(CacheWarning, match="damaged")
    with expectation as caught:
        assert again.get("1") is None
        again.put("new", 2)
    assert again.get("new") == 2 and len(again) == 1
    assert caught is None or len(caught) == 1
    assert (tmp_path / "cache" / DAMAGED_NAME).exists() == (damage != "empty")
    assert open_cache().get("new") == 2


def test_a_corrupt_value_is_missing(open_cache):
    cache = open_cache()
    cache.put_many({"a": 1.25, "b": 2, "c": 3, "d": 4})
    with contextlib.closing(sqlite3.connect(cache.path)) as other, other:
        other.execute("UPDATE entries SET value = CAST('9.25' AS BLOB) WHERE key = 'a'")
        other.execute("UPDATE entries SET value = CAST(X'ff00' AS TEXT) WHERE key = 'b'")
        other.execute("UPDATE entries SET value = 17 WHERE key = 'c'")
    assert cache.get_many("abcd") == {"d": 4}
    cache.put("a", 5)
    assert cache.get("a") == 5


def test_one_process_moves_the_damaged_file_and_all_keep_their_entries(open_cache, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(b"no database" * 1000)
    names, count = ["a", "b", "c", "d"], 20
    errors = [finish(p)[1] for p in [start(WRITER, folder, name, count) for name in names]]
    assert sum("CacheWarning" in err for err in errors) == 1, errors
    expected = {f"{name}-{i}": i for name in names for i in range(count)}
    assert open_cache().get_many(expected) == expected
    assert (folder / DAMAGED_NAME).read_bytes() == b"no database" * 1000


def test_damage_under_an_open_connection_is_mended(open_cache):
    """Two open instances stand for two processes: a third finds the damage, they follow to the new file."""
    first, second = open_cache(), open_cache()
    first.put_many({f"{i}": ["x" * 100] for i in range(500)})
    second.put("second", 1)
    first.close(), second.close()
    size = first.path.stat().st_size
    assert second.get("second") == 1
    with open(first.path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    # Its page was read before the damage and shows none: this would be lost with the file.
    second.put("unseen", 2)
    reader = open_cache()
    with pytest.warns(CacheWarning, match="damaged") as caught:
        assert reader.get("1") is None
    assert len(caught) == 1
    assert second.get("unseen") == 2
    first.put("late", 3)
    expected = {f"{i}": ["x" * 100] for i in range(500)} | {"second": 1, "unseen": 2, "late": 3}
    assert open_cache().get_many(expected) == expected


def test_a_deleted_folder_is_made_again(open_cache, tmp_path):
    cache = open_cache()
    cache.put("a", 1)
    shutil.rmtree(tmp_path / "cache")
    cache.put("b", 2)
    assert open_cache().get_many("ab") == {"a": 1, "b": 2}


def test_a_later_schema_is_left_alone(open_cache):
    cache = open_cache()
    cache.put("a", 1)
    path = cache.path
    cache.close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA user_version = {cache_module.SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    later = open_cache()
    with pytest.warns(CacheWarning, match="later jaxinfer") as caught:
        later.put("a", 2)
        assert later.get("a") == 2 and later.path is None
        later.clear()
    assert len(caught) == 1
    later.close()
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made(open_cache, tmp_path):
    (tmp_path / "file").write_text("")
    cache = open_cache(tmp_path / "file" / "cache")
    with pytest.warns(CacheWarning, match="JAXINFER_CACHE_DIR") as caught:
        for i in range(3):
            cache.put(f"{i}", i)
        other = open_cache(Path("/proc/jaxinfer"))
        other.put("0", 5)
    assert len(caught) == 1
    assert cache.path is None and len(cache) == 3 and cache.get("1") == 1
    assert other.get("0") == 5
    cache.clear()
    assert len(cache) == 0


def test_no_home_at_all(monkeypatch):
    monkeypatch.setattr(cache_module, "default_folder", lambda: None)
    cache = Cache()
    with pytest.warns(CacheWarning, match="no home"):
        cache.put("a", 1)
    assert cache.get("a") == 1 and cache.path is None


READ_ONLY_USER = """
    import os, sys
    # Imported while the interpreter's folder, which may be root's, can still be read.
    import linecache, tokenize, tracemalloc, urllib.parse
    from jaxinfer.search.cache import Cache
    os.setgid(65534); os.setuid(65534)
    cache = Cache(sys.argv[1])
    print(cache.get("stored"))
    cache.put("stored", "changed")
    cache.put("new", 2)
    print(cache.get("stored"), cache.get("new"), len(cache), cache.path)
    cache.clear()
    print(len(cache))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("log_open", [False, True])
def test_a_read_only_folder_is_read_and_not_written(tmp_path, open_cache, log_open):
    folder = Path("/tmp") / f"jaxinfer-test-{os.getpid()}"  # tmp_path is closed to other users
    cache = open_cache(folder)
    try:
        cache.put("stored", 1)
        if not log_open:
            cache.close()
        for file in [folder, *folder.iterdir()]:
            file.chmod(0o755 if file.is_dir() else 0o644)
        before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if "-shm" not in file.name}
        out, err = finish(start(READ_ONLY_USER, folder))
        assert out.split("\n")[:3] == ["1", "changed 2 2 None", "0"]
        assert err.count("CacheWarning") == 1
        after = {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if "-shm" not in file.name}
        assert after == before
        assert cache.get("stored") == 1
    finally:
        cache.close()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_full_disk_keeps_new_entries_in_memory(tmp_path):
    code = """
        import resource, sys
        from jaxinfer.search.cache import Cache
        cache = Cache(sys.argv[1])
        cache.put("early", 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        for i in range(60):
            cache.put(f"{i}", "x" * 10_000)
        assert all(cache.get(f"{i}") == "x" * 10_000 for i in range(60))
        assert cache.get("early") == 1 and len(cache) == 61
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        cache.put("late", 2)
        cache.close()
        print(len(Cache(sys.argv[1])))
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    out, err = finish(start(code, tmp_path / "cache"))
    assert err.count("CacheWarning") == 1
    assert out.strip() == "62"


def test_threads_share_an_instance(open_cache):
    cache = open_cache()
    failures = []

    def work(name: int) -> None:
        for i in range(60):
            cache.put(f"{name}-{i}", i)
            if cache.get(f"{name}-{i}") != i:
                failures.append((name, i))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(cache) == 360


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_share_the_file(tmp_path, open_cache):
    code = """
        import os, sys, threading
        from jaxinfer.search.cache import Cache
        cache = Cache(sys.argv[1])
        cache.put("parent", 1)
        busy = threading.Event()
        def keep_busy():
            while not busy.is_set():
                cache.put("thread", 1)
        thread = threading.Thread(target=keep_busy)
        thread.start()
        children = []
        for child in range(4):
            pid = os.fork()
            if pid == 0:
                for i in range(50):
                    cache.put(f"{child}-{i}", i)
                ok = cache.get("parent") == 1
                cache.close()
                os._exit(0 if ok else 1)
            children.append(pid)
            cache.put(f"parent-{child}", 1)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        busy.set()
        thread.join()
        print(codes, len(cache))
        cache.close()
    """
    process = start(code, tmp_path / "cache")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "CacheWarning" not in err
    assert out.strip() == f"[0, 0, 0, 0] {4 * 50 + 4 + 2}"
    expected = {f"{child}-{i}": i for child in range(4) for i in range(50)}
    assert open_cache().get_many(expected) == expected


def test_a_stuck_writer_costs_one_wait(open_cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_PATIENCE_S", 0.2)
    cache = open_cache()
    cache.put("a", 1)
    with contextlib.closing(sqlite3.connect(cache.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.warns(CacheWarning, match="locked") as caught:
            cache.put("b", 2)
            cache.put("c", 3)
        assert len(caught) == 1
        assert cache.get_many("abc") == {"a": 1, "b": 2, "c": 3}
        other.execute("ROLLBACK")
    cache.put("d", 4)
    assert open_cache().get_many("abcd") == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_only_one_warning_per_process(tmp_path, open_cache):
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("a", "b"):
            open_cache(tmp_path / "file" / name).put("k", json.loads("1"))
    assert [w.category for w in caught] == [CacheWarning]
