"""What the search has learned on this machine, kept in one SQLite file between runs.

A cache may fail in many ways and must never fail its user: whatever happens to the file, the program goes on
with what it measures itself, and says so once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sqlite3
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jaxinfer.cache_folder import default_folder

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

T = TypeVar("T")

SCHEMA_VERSION = 1
FILE_NAME = "cache.sqlite"
DAMAGED_NAME = "cache.damaged.sqlite"
_LOCK_NAME = "cache.lock"
_PATIENCE_S = 10.0

_CREATE = (
    "CREATE TABLE IF NOT EXISTS entries"
    " (key TEXT PRIMARY KEY, value BLOB NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID"
)
# The cast keeps a damaged row from being decoded as text, which Python would report as an error of ours.
_SELECT = "SELECT CAST(value AS BLOB), checksum FROM entries WHERE key = ?"
_UPSERT = (
    "INSERT INTO entries VALUES (?, ?, ?)"
    " ON CONFLICT (key) DO UPDATE SET value = excluded.value, checksum = excluded.checksum"
)
# Our statements are fixed, so a plain SQL error means that the tables in the file are not ours.
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


class CacheWarning(UserWarning):
    """The cache file cannot be used as it should; raised at most once per process."""


class _NewerSchema(Exception):
    """The file was written by a later release, which still wants it."""


class Store(Protocol):
    """What the search needs of a cache."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value under a key, or the default."""

    def put(self, key: str, value: Any) -> None:
        """Stores a value under a key."""


class Cache:
    """A map from digest to JSON value that outlives the process and is shared between processes.

    The file is opened at first use. Of two values put under one key the later one stays, whole. Threads and
    forked children may share an instance. A damaged file is moved aside to `cache.damaged.sqlite` and a new
    one begun with what this process had stored; where nothing can be written (read-only or missing home,
    full disk, a file of a later release), entries stay in memory for the life of the process, and one
    `CacheWarning` tells why.

    Args:
        folder: where the file lives; by default `default_folder()`. SQLite's write-ahead log needs a file
            system of this machine: with a home on a network mount, set `JAXINFER_CACHE_DIR` to a local disk.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = Path(os.path.abspath(folder)) if folder is not None else default_folder()
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._writable = True
        self._offline = False
        self._suspect = False
        # Encoded entries: all that were put here, and those that are not, or not yet, in the file.
        self._own: dict[str, bytes] = {}
        self._unsaved: dict[str, bytes] = {}
        with _instances_lock:
            _instances.add(self)

    @property
    def path(self) -> Path | None:
        """The file in use, or None when everything is held in memory."""
        with self._lock:
            return self._file() if self._connected() is not None and self._writable else None

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value under `key`, or `default` where there is none or it cannot be trusted."""
        return self.get_many((key,)).get(key, default)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Returns the values of those `keys` that are present."""
        wanted = list(keys)

        def select(connection: sqlite3.Connection) -> list[tuple[str, Any]]:
            return [(key, connection.execute(_SELECT, (key,)).fetchone()) for key in wanted]

        with self._lock:
            rows = self._attempt(select) or []
            found = {key: row[0] for key, row in rows if row is not None and _checksum(key, row[0]) == row[1]}
            found |= {key: self._unsaved[key] for key in wanted if key in self._unsaved}
        return {key: json.loads(value) for key, value in found.items()}

    def put(self, key: str, value: Any) -> None:
        """Stores `value` under `key`.

        Raises:
            TypeError: `value` is not made of JSON types.
        """
        self.put_many({key: value})

    def put_many(self, entries: Mapping[str, Any]) -> None:
        """Stores all `entries` in one transaction; raises TypeError for values that JSON does not know."""
        encoded = {key: json.dumps(value).encode() for key, value in entries.items()}
        with self._lock:
            self._own |= encoded
            self._unsaved |= encoded
            if self._connected() is not None and self._writable:
                self._attempt(self._flush)

    def clear(self) -> None:
        """Forgets every entry, here and in the file."""

        def delete(connection: sqlite3.Connection) -> bool:
            connection.execute("DELETE FROM entries")
            return True

        with self._lock:
            self._own.clear()
            self._unsaved.clear()
            if self._connected() is not None and not self._attempt(delete):
                self.close()
                self._offline = True

    def __len__(self) -> int:
        def stored(connection: sqlite3.Connection) -> set[str]:
            return {key for (key,) in connection.execute("SELECT key FROM entries")}

        with self._lock:
            return len((self._attempt(stored) or set()) | self._unsaved.keys())

    def close(self) -> None:
        """Closes the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            connection.close()

    def _file(self) -> Path:
        assert self._folder is not None
        return self._folder / FILE_NAME

    def _connected(self) -> sqlite3.Connection | None:
        if self._connection is None and not self._offline:
            self._open()
        return self._connection

    def _flush(self, connection: sqlite3.Connection) -> None:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            rows = [(key, value, _checksum(key, value)) for key, value in self._unsaved.items()]
            connection.executemany(_UPSERT, rows)
        self._unsaved.clear()

    def _attempt(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """Runs `action` on the file; on a damaged or replaced file opens it anew and runs it once more."""
        for _ in range(2):
            connection = self._connected()
            if connection is None:
                return None
            try:
                result = action(connection)
            except sqlite3.Error as error:
                if _code(error) not in _DAMAGED:
                    # The next statement must not wait as long again for a lock that is not coming.
                    connection.execute("PRAGMA busy_timeout = 50")
                    _warn(f"{self._file()} cannot be used ({error}); new results are kept in memory.")
                    return None
                self._suspect = True
            else:
                if not self._writable or _identity(self._file()) == self._identity:
                    return result
            # Damaged, moved aside by another process, or deleted: what we stored went with the file.
            self.close()
            self._unsaved |= self._own
        self.close()
        self._offline = True
        _warn(f"{self._file()} keeps failing or changing; results are kept in memory. Delete {self._folder}.")
        return None

    def _open(self) -> None:
        """Opens the file, mending what can be mended; otherwise goes on in memory."""
        if self._folder is None:
            self._offline = True
            _warn("There is no home folder to keep tuning results in; set JAXINFER_CACHE_DIR.")
            return
        path, damage = self._file(), None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Held while opening too: a log opened by name after its file was replaced ruins the new one.
            with _exclusive(self._folder / _LOCK_NAME):
                try:
                    self._connection = _connect(path, thorough=self._suspect)
                except sqlite3.Error as error:
                    if _code(error) not in _DAMAGED:
                        raise
                    damage = error
                    _set_aside(path)
                    self._connection = _connect(path, thorough=False)
                known, self._identity = self._identity, _identity(path)
                self._suspect, self._writable = False, True
            if known not in (None, self._identity):
                self._unsaved |= self._own
            if self._unsaved:
                # Should this fail, they stay unsaved, and the next put tries again and reports.
                with contextlib.suppress(sqlite3.Error):
                    self._flush(self._connection)
        except _NewerSchema:
            self._offline = True
            _warn(f"{path} belongs to a later jaxinfer and is left alone; results are kept in memory.")
        except (OSError, sqlite3.Error) as error:
            self._writable = False
            self._connection = _connect_read_only(path)
            self._offline = self._connection is None
            _warn(f"{path} cannot be written ({error}); results are kept in memory. Set JAXINFER_CACHE_DIR.")
        if damage is not None and self._connection is not None:
            _warn(f"{path} was damaged ({damage}); it is now {DAMAGED_NAME}, and a new one was begun.")


@functools.cache
def default_cache() -> Cache:
    """The one cache of this process, in the user's cache folder as it stood at the first call."""
    return Cache()


def key(*parts: Any) -> str:
    """Digest of `parts` (JSON types and bytes), the same in every process; other types raise TypeError."""

    def encode(part: Any) -> Any:
        if isinstance(part, bytes):
            return {"bytes": part.hex()}
        raise TypeError(f"A cache key is made of JSON types and bytes, not {type(part).__name__}: {part!r}")

    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=encode)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _connect(path: Path, *, thorough: bool) -> sqlite3.Connection:
    """Opens the file for writing and makes its table.

    Raises:
        _NewerSchema: the file is a later release's; nothing in it was changed.
        sqlite3.Error: with a code in `_DAMAGED` where the file is no good, `thorough` looking at all of it.
    """
    connection = sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise _NewerSchema
        if thorough:
            (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        with connection:
            # Also finds out at once whether the file can be written.
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_CREATE)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute(_SELECT, ("",)).fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_read_only(path: Path) -> sqlite3.Connection | None:
    """Opens what others have stored in a folder that we may only read; None where that cannot be done."""
    options = ["mode=ro"]
    log = Path(f"{path}-wal")
    with contextlib.suppress(OSError):
        if not log.exists() or log.stat().st_size == 0:
            # Without a log SQLite needs no shared memory beside the file, which it could not create here.
            options.append("mode=ro&immutable=1")
    for option in options:
        connection = None
        try:
            connection = sqlite3.connect(f"{path.as_uri()}?{option}", uri=True, check_same_thread=False)
            if connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,):
                connection.execute(_SELECT, ("",)).fetchone()
                return connection
        except sqlite3.Error:
            pass
        if connection is not None:
            connection.close()
    return None


def _set_aside(path: Path) -> None:
    """Moves a damaged file away; to be called under the folder's lock, having seen the damage under it."""
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    os.replace(path, path.with_name(DAMAGED_NAME))


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds the folder's lock; the system lets go of it when the file is closed or the process dies."""
    with open(path, "ab") as file:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                if sys.platform == "win32":
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} has been locked for {_PATIENCE_S:.0f} s") from None
                time.sleep(0.005)
        yield


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _checksum(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; an error without one was raised by a failed integrity check."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


_warned = False


def _warn(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, CacheWarning, stacklevel=2)


_instances: weakref.WeakSet[Cache] = weakref.WeakSet()
_instances_lock = threading.Lock()
_held: list[Cache] = []


def _before_fork() -> None:
    """Neither SQLite connections nor locks held by other threads may cross a fork."""
    _instances_lock.acquire()
    _held.extend(_instances)
    for cache in _held:
        cache._lock.acquire()
        cache.close()


def _after_fork() -> None:
    for cache in _held:
        cache._lock.release()
    _held.clear()
    _instances_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
