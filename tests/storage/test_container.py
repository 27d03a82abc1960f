"""The file: readable by others, whole or not there at all, and an error whenever a byte is not as it was written."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxinfer import autoinfer
from jaxinfer.storage import StorageError, container, loading
from jaxinfer.storage.container import CHUNK, FORMAT, Container, Section, write

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 12)


def network(params, x):
    hidden = jnp.tanh(x @ params["dense"] + params["levels"].astype(jnp.float32)[:12, None].T)
    return {"out": hidden @ (params["pruned"] * params["mask"]), "sum": hidden.sum()}


def parameters():
    rng = np.random.default_rng(0)
    pruned = rng.normal(size=(12, 40)).astype(np.float32)
    return {
        "dense": rng.normal(size=(12, 12)).astype(np.float32),
        "levels": rng.integers(-8, 8, 300).astype(np.int8),
        "mask": rng.random((12, 40)) < 0.1,
        "pruned": np.where(rng.random((12, 40)) < 0.1, pruned, 0),
        "repeated": np.tile(np.arange(16, dtype=np.float32), 20),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "zstd"])
def saved(request, tmp_path_factory):
    """A small program with arrays of every encoding, and its file's bytes."""
    path = tmp_path_factory.mktemp("saved") / "program"
    params = parameters()
    autoinfer.save((lambda p, x: (network(p, x), p["repeated"] + x[0, 0]), params), path, X, zstd=request.param)
    return path.read_bytes()


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# -- damage -----------------------------------------------------------------------------------------------------------


def corrupted(data, rng):
    """The bytes with one thing wrong with them: flipped, overwritten, cut, moved, lost, or too many."""
    raw = bytearray(data)
    a, b = sorted(rng.integers(0, len(raw) + 1, 2))
    length = int(rng.integers(1, 200))
    match rng.integers(0, 10):
        case 0:
            raw[rng.integers(0, len(raw))] ^= 1 << rng.integers(0, 8)
        case 1:
            for i in rng.integers(0, len(raw), length):
                raw[i] = rng.integers(0, 256)
        case 2:
            del raw[a:]
        case 3:
            raw[a : a + length] = bytes(len(raw[a : a + length]))
        case 4:
            raw[a : a + length] = rng.bytes(len(raw[a : a + length]))
        case 5:
            one, other = raw[a : a + length], raw[b : b + length]
            raw[b : b + len(one)], raw[a : a + len(other)] = one, other
        case 6:
            del raw[a : a + length]
        case 7:
            raw[a:a] = rng.bytes(length)
        case 8:
            raw += raw[a:b] or b"\0"
        case 9:
            raw[: min(length, 80)] = rng.bytes(min(length, 80))
    return bytes(raw)


def test_a_thousand_damaged_files_are_errors(saved, tmp_path, monkeypatch):
    """Never a wrong answer, a hang or a crash; and nothing is parsed or decompressed that was not written so."""
    path = tmp_path / "damaged"
    path.write_bytes(saved)
    trusted = []
    names = [(json, "loads"), (loading.zlib, "decompress"), (loading.export, "deserialize")]
    originals = [getattr(module, name) for module, name in names]
    for (module, name), original in zip(names, originals):
        monkeypatch.setattr(module, name, lambda x, f=original: trusted.append(bytes(x, *encoding(x))) or f(x))
    want = bits(autoinfer.load(path)(X))
    right, trusted[:] = set(trusted), []
    rng, errors = np.random.default_rng(0), 0
    for _ in range(600):
        data = corrupted(saved, rng)
        path.write_bytes(data)
        if data == saved:
            assert bits(autoinfer.load(path)(X)) == want
            continue
        with pytest.raises(StorageError) as caught:
            autoinfer.load(path)(X)
        errors += 1
        assert str(path) in str(caught.value)
        assert set(trusted) <= right
    assert errors >= 550


def encoding(text):
    return ("utf-8",) if isinstance(text, str) else ()


def test_each_byte_counts(tmp_path):
    """Every byte of a small file, one after the other, and every length it could be cut to."""
    path = tmp_path / "small"
    write(path, {"answer": 42}, [Section("a", np.arange(5, dtype=np.float32), "F32", (5,)), Section("b", np.ones(3))])
    data = path.read_bytes()

    def read():
        file = Container(path)
        return file.content, [file.read(name).tobytes() for name in file.names]

    assert read() == ({"answer": 42}, [np.ones(3).tobytes(), np.arange(5, dtype=np.float32).tobytes()][::-1])
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        with pytest.raises(StorageError):
            read()
        path.write_bytes(data[:i])
        with pytest.raises(StorageError):
            read()


def test_a_damaged_chunk_is_named_and_others_are_read(tmp_path):
    path = tmp_path / "large"
    arrays = {name: np.random.default_rng(i).bytes(2 * CHUNK + 10) for i, name in enumerate(("good", "bad"))}
    write(path, {}, [Section(name, np.frombuffer(data, np.uint8)) for name, data in arrays.items()])
    data = bytearray(path.read_bytes())
    place = data.index(arrays["bad"][CHUNK : CHUNK + 100]) + 50
    data[place] ^= 1
    path.write_bytes(data)
    file = Container(path)
    assert file.read("good").tobytes() == arrays["good"]
    with pytest.raises(StorageError, match=f"bytes {CHUNK} to {2 * CHUNK} of 'bad'.*copy the file anew"):
        file.read("bad")


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "program"
    autoinfer.save((network, parameters()), path, X)
    loaded = autoinfer.load(path)
    with open(path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(StorageError, match="damaged"):
        loaded(X)


def test_a_file_replaced_while_it_is_open_stays_itself(tmp_path):
    path = tmp_path / "program"
    autoinfer.save((lambda w, x: x @ w, np.ones((12, 70), np.float32)), path, X)
    first = autoinfer.load(path)
    autoinfer.save((lambda w, x: x @ w, np.zeros((12, 70), np.float32)), path, X)
    np.testing.assert_array_equal(first(X), X @ np.ones((12, 70), np.float32))
    np.testing.assert_array_equal(autoinfer.load(path)(X), np.zeros((2, 70)))


# -- other files ------------------------------------------------------------------------------------------------------


def test_a_newer_file_asks_for_an_upgrade(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "FORMAT", FORMAT + 1)
    write(tmp_path / "newer", {"unheard": "of"}, [])
    monkeypatch.undo()
    with pytest.raises(StorageError, match=f"format {FORMAT + 1}.*upgrade jaxinfer"):
        autoinfer.load(tmp_path / "newer")


def test_what_is_no_such_file_is_named(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("weights, I promise\n" * 20)
    safetensors.numpy.save_file({"w": X}, tmp_path / "other.safetensors")
    np.savez(tmp_path / "arrays.npz", x=X)
    os.mkfifo(tmp_path / "pipe")
    expected = {
        "missing": "No such file",
        "empty": "is empty",
        "text": "not written by autoinfer.save",
        "other.safetensors": "not written by autoinfer.save",
        "arrays.npz": "not written by autoinfer.save",
        "pipe": "is no file",
        "": "is no file",
    }
    for name, message in expected.items():
        with pytest.raises(StorageError, match=message):
            autoinfer.load(tmp_path / name)


def test_right_hashes_around_something_else_are_an_error(tmp_path):
    for content in ({}, {"name": "f", "scheme": None, "versions": {}, "arrays": {}, "entries": [{"platform": "cpu"}]}):
        write(tmp_path / "odd", content, [])
        with pytest.raises(StorageError, match="not written by autoinfer"):
            autoinfer.load(tmp_path / "odd")


def test_other_readers_see_the_arrays(tmp_path):
    """The library of the format is the judge of it."""
    params = {
        "float32": X,
        "bfloat16": X.astype(ml_dtypes.bfloat16),
        "float8": X.astype(ml_dtypes.float8_e4m3fn),
        "int32": np.random.default_rng(0).integers(-(2**31), 2**31, 24, np.int32).reshape(2, 12),
        "complex64": (X + 2j * X).astype(np.complex64),
        "scalar": np.float32(3),
    }
    autoinfer.save((lambda p, x: jax.tree.map(lambda a: a, p), params), tmp_path / "p.safetensors", X)
    with safetensors.safe_open(tmp_path / "p.safetensors", "np") as file:
        assert file.metadata()["format"] == "autoinfer.save"
        for name in ("float32", "int32", "scalar"):
            np.testing.assert_array_equal(file.get_tensor(name), params[name])
        np.testing.assert_array_equal(file.get_tensor("complex64"), np.stack([X, 2 * X], -1))
        assert file.get_slice("bfloat16").get_shape() == [2, 12] and file.get_slice("bfloat16").get_dtype() == "BF16"
        assert file.get_slice("float8").get_dtype() == "F8_E4M3"


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "program"
    path.write_bytes(b"what was there before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(StorageError, match=r"cannot be written.*unchanged"):
            write(path, {}, [Section("large", np.zeros(100_000, np.uint8))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b"what was there before" and os.listdir(tmp_path) == ["program"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interruption_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "program"
    path.write_bytes(b"what was there before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(container.os, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, {}, [Section("a", np.zeros(100, np.uint8))])
    assert path.read_bytes() == b"what was there before" and os.listdir(tmp_path) == ["program"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "program"
    write(path, {"first": True}, [])
    program = (
        "import os, signal, sys, numpy as np\n"
        "from jaxinfer.storage import container\n"
        "container.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "container.write(sys.argv[1], {}, [container.Section('a', np.zeros(10**6, np.uint8))])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert Container(path).content == {"first": True}


def test_places_that_cannot_be_written_are_errors(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "program"):
        with pytest.raises(StorageError, match="cannot be written"):
            write(path, {}, [])
    assert os.listdir(tmp_path) == ["folder"]


def test_links_and_permissions_are_kept(tmp_path):
    write(tmp_path / "file", {}, [])
    os.chmod(tmp_path / "file", 0o640)
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link", {"new": 1}, [])
    assert (tmp_path / "link").is_symlink() and Container(tmp_path / "file").content == {"new": 1}
    assert os.stat(tmp_path / "file").st_mode & 0o777 == 0o640


def test_the_same_program_gives_the_same_file(saved, tmp_path):
    for name in ("one", "other"):
        autoinfer.save((network, parameters()), tmp_path / name, X)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
