"""One file that holds named sections and a description, checked byte by byte before anything is made of it.

The file is laid out as safetensors prescribes (eight bytes with the length of a JSON header, the header, the data back
to back), so any reader of that format can look at the arrays in it. The hashes are what this project adds: the last
section is the *seal*, a hash of the header; the header holds the hash of the *manifest*; the manifest those of every
other section, in chunks. So a file is trusted from its end inwards, and an array can be read without reading the rest.
Hashes tell damage from health; they are no signature.

Reference: https://huggingface.co/docs/safetensors (the format; its own library writes nothing in parts and checks no
hashes, so the few lines that the header takes are here).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

# What this code writes, and the newest it reads. Raised whenever an older release could not read what is written.
FORMAT = 1
# Bytes that are hashed, and read, at a time.
CHUNK = 4 << 20

_MARK = b'{"__metadata__":{"format":"autoinfer.save"'
_SEAL, _MANIFEST = "autoinfer.seal", "autoinfer.manifest"
_LENGTH_BYTES, _SEAL_BYTES = 8, 32
# What the format allows.
_LONGEST_HEADER = 100_000_000
_AGAIN = "copy the file anew, or save the program again"

# Bytes per element of the element types a section may have, by the format's names.
_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}


class StorageError(Exception):
    """A program cannot be saved or loaded. Says what is wrong, where, and what to do."""


@dataclass(frozen=True, eq=False)
class Section:
    """A part of a file.

    Attributes:
        name: its name, unique in the file.
        data: contiguous array; its bytes are what is written.
        dtype: element type by the format's name.
        shape: how readers of the format are to see it.
    """

    name: str
    data: np.ndarray
    dtype: str = "U8"
    shape: tuple[int, ...] | None = None

    @property
    def raw(self) -> np.ndarray:
        """The bytes."""
        return np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)


# -- writing ----------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], content: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Writes a file whole or not at all: whatever interrupts it, what was there before is still there.

    Args:
        path: where; an existing file is replaced.
        content: what the sections mean, in JSON types.
        sections: the data.

    Raises:
        StorageError: if the file cannot be written.
    """
    # Wider elements first, so that all are aligned without gaps, which the format forbids.
    ordered = sorted(sections, key=lambda s: -_WIDTHS[s.dtype])
    hashes = {s.name: [_digest(chunk) for chunk in _chunks(s.raw)] for s in ordered}
    manifest = _json({"content": content, "hashes": hashes})
    last = [Section(_MANIFEST, np.frombuffer(manifest, np.uint8)), Section(_SEAL, np.zeros(_SEAL_BYTES, np.uint8))]
    head = _head([*ordered, *last], _digest(manifest))
    last[1] = Section(_SEAL, np.frombuffer(_seal(head), np.uint8))
    with _replacing(path) as file:
        file.write(head)
        for section in (*ordered, *last):
            for chunk in _chunks(section.raw):
                file.write(chunk)


def _head(sections: Sequence[Section], manifest: str) -> bytes:
    entries: dict[str, Any] = {}
    start = 0
    for section in sections:
        size = section.raw.size
        shape = [size] if section.shape is None else list(section.shape)
        entries[section.name] = {"dtype": section.dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    metadata = {"format": "autoinfer.save", "version": str(FORMAT), "manifest": manifest}
    text = _json({"__metadata__": metadata, **entries})
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > _LONGEST_HEADER:
        raise StorageError(f"{len(entries)} arrays are more than one file can list: store fewer, larger ones")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A draft in the same folder, which takes the place of ``path`` once it is on the disk."""
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    draft = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        if os.path.isdir(target):
            raise IsADirectoryError(f"{target} is a folder")
        try:
            with open(draft, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(draft, stat.S_IMODE(os.stat(target).st_mode))
            os.replace(draft, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise StorageError(f"{target} cannot be written ({error}); what was there before is unchanged") from error
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Makes a renaming last through a power cut, where the system lets folders be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- reading ----------------------------------------------------------------------------------------------------------


class Container:
    """A file opened for reading. Header and manifest are checked now, every section when it is read.

    The file stays open, so that replacing it does not mix two of them.

    Attributes:
        path: the file.
        content: what :func:`write` was given.

    Raises:
        StorageError: if it is missing, no file of this kind, of a newer kind, incomplete or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        try:
            # Opening a pipe would wait for a writer.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise StorageError(f"{self.path} is no file: give the path that was given to autoinfer.save")
            self._file = open(path, "rb")  # noqa: SIM115 (closed by _close, or with the object)
            self._close = weakref.finalize(self, self._file.close)
            self._size = os.fstat(self._file.fileno()).st_size
            head = self._read_head()
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error}") from error
        try:
            self._open(head)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            # The hashes are right, so this is what was written.
            raise StorageError(f"{self.path} was not written by autoinfer.save: {error!r}") from error

    def _read_head(self) -> bytes:
        length = self._bytes(0, min(_LENGTH_BYTES, self._size))
        size = int.from_bytes(length, "little")
        start = self._bytes(_LENGTH_BYTES, len(_MARK)) if self._size > _LENGTH_BYTES + len(_MARK) else b""
        if start != _MARK:
            state = "is empty" if not self._size else "was not written by autoinfer.save, or its beginning is damaged"
            raise StorageError(f"{self.path} {state}: give the path that was given to it, or {_AGAIN}")
        if size > min(_LONGEST_HEADER, self._size - _LENGTH_BYTES - _SEAL_BYTES):
            raise StorageError(f"{self.path} is incomplete ({self._size} bytes), or its beginning is damaged: {_AGAIN}")
        head = length + self._bytes(_LENGTH_BYTES, size)
        if self._bytes(self._size - _SEAL_BYTES, _SEAL_BYTES) != _seal(head):
            raise StorageError(f"{self.path} is incomplete or damaged ({self._size} bytes): {_AGAIN}")
        return head

    def _open(self, head: bytes) -> None:
        header = json.loads(head[_LENGTH_BYTES:])
        metadata = header.pop("__metadata__")
        version = int(metadata["version"])
        if version > FORMAT:
            raise StorageError(
                f"{self.path} has format {version}, and this release reads up to {FORMAT}: upgrade jaxinfer"
            )
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        self._places = {name: (len(head) + begin, end - begin) for name, (begin, end) in places.items()}
        if max(begin + size for begin, size in self._places.values()) != self._size:
            raise StorageError(f"{self.path} has {self._size} bytes, which are not those its header lists: {_AGAIN}")
        self._hashes = {_MANIFEST: [metadata["manifest"]]}
        manifest = json.loads(self._read(_MANIFEST, self._places[_MANIFEST][1]).tobytes())
        self.content: dict[str, Any] = manifest["content"]
        self._hashes.update(manifest["hashes"])

    def read(self, name: str) -> np.ndarray:
        """The bytes of a section, checked.

        Raises:
            StorageError: if they are not those that were written.
        """
        return self._read(name, CHUNK)

    def size(self, name: str) -> int:
        """Bytes of a section."""
        return self._places[name][1]

    @property
    def names(self) -> list[str]:
        """All sections."""
        return [name for name in self._places if name not in (_SEAL, _MANIFEST)]

    def _read(self, name: str, step: int) -> np.ndarray:
        start, size = self._places[name]
        data = np.empty(size, np.uint8)
        hashes = self._hashes[name]
        if len(hashes) != -(-size // max(step, 1)):
            raise StorageError(f"{self.path}: {name!r} is not as long as its hashes say: {_AGAIN}")
        for i, expected in enumerate(hashes):
            chunk = data[i * step : (i + 1) * step]
            try:
                with self._lock:
                    self._file.seek(start + i * step)
                    count = self._file.readinto(memoryview(chunk))  # type: ignore[attr-defined]
            except OSError as error:
                raise StorageError(f"{self.path}: {name!r} cannot be read: {error}") from error
            if count != chunk.size or _digest(chunk) != expected:
                where = f"bytes {i * step} to {i * step + chunk.size} of {name!r}"
                raise StorageError(f"{self.path} is damaged ({where}): {_AGAIN}")
        return data

    def _bytes(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        return self._file.read(size)

    def close(self) -> None:
        """Closes the file; sections cannot be read any more."""
        self._close()


# -- hashes -----------------------------------------------------------------------------------------------------------


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _seal(head: bytes) -> bytes:
    return hashlib.blake2b(head, digest_size=_SEAL_BYTES, person=b"autoinfer.seal").digest()


def _chunks(raw: np.ndarray) -> Iterator[memoryview]:
    for i in range(math.ceil(raw.size / CHUNK)):
        yield memoryview(raw[i * CHUNK : (i + 1) * CHUNK])


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=True).encode()
