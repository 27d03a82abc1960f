"""Compiled programs, a file each, in a folder beside the cache's database.

They are large, and can be made again: a file that is missing, damaged or cannot be written costs a compilation and
nothing else. Files are written whole and never changed, so processes need not agree on anything; the ones that were
not used for longest go when the folder grows too large.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.cache_folder import default_folder

FOLDER_NAME = "programs"
# Bytes that all files together may take.
LIMIT_BYTES = 256 << 20
_DIGEST_BYTES = 32


def read(name: str, folder: Path | None = None) -> tuple[dict[str, Any], list[bytes]] | None:
    """What was written under a name; None where there is nothing, or anything else than what was written.

    Args:
        name: a name made of letters and digits.
        folder: the folder; by default the one beside the user's cache.
    """
    path = _path(name, folder)
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, packed = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if digest != _digest(name, packed):
        return None
    # Used now: files are removed in the order of their times.
    with contextlib.suppress(OSError):
        os.utime(path)
    content = zlib.decompress(packed)
    end = content.index(b"\n")
    start, blobs = end + 1, []
    sizes, description = json.loads(content[:end])
    for size in sizes:
        blobs.append(content[start : start + size])
        start += size
    return description, blobs


def write(
    name: str,
    description: Mapping[str, Any],
    blobs: Sequence[bytes],
    folder: Path | None = None,
    limit: int = LIMIT_BYTES,
) -> None:
    """Writes a description, made of JSON types, and blobs; does nothing where the folder cannot be written.

    That it cannot is reported by :class:`jaxinfer.search.cache.Cache`, whose folder it is.

    Args:
        name: a name made of letters and digits.
        description: what to write before the blobs.
        blobs: what to write.
        folder: the folder; by default the one beside the user's cache.
        limit: bytes that the folder may hold; the files not used for longest are removed.
    """
    path = _path(name, folder)
    if path is None:
        return
    head = json.dumps([[len(blob) for blob in blobs], description]).encode()
    packed = zlib.compress(b"".join([head, b"\n", *blobs]), 1)
    if len(packed) > limit:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(_digest(name, packed) + packed)
            os.replace(draft, path)
        except OSError:
            os.unlink(draft)
            raise
        _trim(path.parent, limit)


def _trim(folder: Path, limit: int) -> None:
    """Removes the oldest files (drafts of processes that were killed among them) until the rest fits."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            status = entry.stat()
            files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size


def _path(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        beside = default_folder()
        folder = None if beside is None else beside / FOLDER_NAME
    return None if folder is None else folder / name


def _digest(name: str, packed: bytes) -> bytes:
    return hashlib.blake2b(name.encode() + b"\0" + packed, digest_size=_DIGEST_BYTES).digest()
