"""JAX's arrays as sections of a file, and back."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.storage.container import Container, Section, StorageError
from jaxinfer.storage.encode import FOREIGN_NAMES, decode, encode, loosen, squeeze

_RESERVED = ("autoinfer.", "__")
_COMPLEX_PARTS = {"complex64": "float32", "complex128": "float64"}


class ArrayWriter:
    """Collects arrays for a file; equal ones are written once.

    Args:
        zstd: whether to compress what that makes smaller.
    """

    def __init__(self, zstd: bool):
        self._zstd = zstd
        self._by_identity: dict[int, tuple[Any, str]] = {}
        self._by_content: dict[Any, str] = {}
        self.descriptions: dict[str, dict[str, Any]] = {}
        self.sections: list[Section] = []

    def add(self, array: Any, name: str) -> str:
        """Takes an array into the file.

        Args:
            array: a JAX or NumPy array, random keys included.
            name: how to call it; a number is added where that is taken.

        Returns:
            Its name in the file.

        Raises:
            StorageError: for an array that is not on this machine alone, or of a type without a place in a file.
        """
        held = self._by_identity.get(id(array))
        if held is None:
            held = self._by_identity[id(array)] = (array, self._add(array, name))
        return held[1]

    def _add(self, array: Any, name: str) -> str:
        description, plain = _as_numpy(array, name)
        raw = np.ascontiguousarray(plain).reshape(-1).view(np.uint8)
        content = (*map(str, description.items()), hashlib.blake2b(raw, digest_size=16).digest())
        if content in self._by_content:
            return self._by_content[content]
        name = self._free(name)
        encoded = encode(plain)
        if self._zstd:
            encoded = squeeze(encoded)
        self._by_content[content] = name
        self.descriptions[name] = {**description, "encoding": encoded.how}
        for part, data in encoded.parts.items():
            whole = encoded.how == {"kind": "plain"}
            self.sections.append(_foreign(name, data, plain.shape) if whole else Section(_part(name, part), data))
        return name

    def _free(self, name: str) -> str:
        # Parts go by the name of their array, "#", and their own.
        name = name.replace("#", "_")
        if name.startswith(_RESERVED):
            name = f"_{name}"
        number, free = 1, name
        while free in self.descriptions:
            number, free = number + 1, f"{name}.{number + 1}"
        return free


def _as_numpy(array: Any, name: str) -> tuple[dict[str, Any], np.ndarray]:
    """What describes an array, and its numbers."""
    if isinstance(array, jax.ShapeDtypeStruct):
        raise StorageError(f"{name!r} is the type of an array without its numbers: give the array")
    if not isinstance(array, jax.Array):
        array = jnp.asarray(array)
    if not array.is_fully_addressable:
        raise StorageError(f"{name!r} lies on several machines: gather it first, for example with jax.device_get")
    description: dict[str, Any] = {}
    if _jax.is_extended(array.dtype):
        if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise StorageError(f"{name!r} is of type {array.dtype}, which has no place in a file")
        description["key"] = str(jax.random.key_impl(array))
        array = jax.random.key_data(array)
    plain = np.asarray(array)
    return {"shape": list(plain.shape), "dtype": plain.dtype.name, **description}, plain


def _foreign(name: str, data: np.ndarray, shape: tuple[int, ...]) -> Section:
    """An array as other readers of the format know it; complex numbers as pairs, unknown types as bytes."""
    parts = _COMPLEX_PARTS.get(data.dtype.name)
    if parts:
        return Section(name, data, FOREIGN_NAMES[parts], (*shape, 2))
    word = FOREIGN_NAMES.get(data.dtype.name)
    return Section(name, data, word, shape) if word else Section(name, data)


def _part(name: str, part: str) -> str:
    return f"{name}#{part}"


class StoredArrays(Mapping[str, Any]):
    """The arrays of a file by name, read when they are asked for, and checked."""

    def __init__(self, container: Container, descriptions: Mapping[str, Mapping[str, Any]]):
        self._container, self._descriptions = container, descriptions
        self._lock = threading.Lock()
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        with self._lock:
            if name not in self._read:
                description = self._descriptions[name]
                self._read[name] = self._array(name, description)
            return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._descriptions)

    def __len__(self) -> int:
        return len(self._descriptions)

    def __contains__(self, name: object) -> bool:
        return name in self._descriptions

    def __repr__(self) -> str:
        return f"StoredArrays({', '.join(self)})"

    def _array(self, name: str, description: Mapping[str, Any]) -> Any:
        dtype, shape = dtype_named(description["dtype"]), tuple(description["shape"])
        flat = decode(description["encoding"], self._parts(name, description["encoding"]), int(np.prod(shape)), dtype)
        # Asked for while something is traced, it is an array all the same.
        with jax.ensure_compile_time_eval():
            array = jnp.asarray(flat.reshape(shape))
            return jax.random.wrap_key_data(array, impl=description["key"]) if "key" in description else array

    def _parts(self, name: str, how: Mapping[str, Any]) -> Any:
        sizes = how.get("zstd", {})

        def part(which: str) -> np.ndarray:
            plain = not which and not sizes
            data = self._container.read(name if plain else _part(name, which))
            return loosen(data, sizes[which]) if which in sizes else data

        return part


def dtype_named(name: str) -> np.dtype:
    """An element type by name, JAX's own among them.

    Raises:
        StorageError: if this version of JAX has none of that name.
    """
    try:
        return np.dtype(jnp.dtype(name))
    except TypeError as error:
        raise StorageError(
            f"an array is of type {name}, which this version of JAX does not know: upgrade it"
        ) from error


def needs_x64(dtypes: Sequence[str]) -> bool:
    """Whether there is a type among these that JAX has with ``jax_enable_x64`` only."""
    return any(name in ("int64", "uint64", "float64", "complex128") for name in dtypes)
