"""The kernels, compiled for this processor and made known to XLA."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxinfer.cache_folder import default_folder

FOLDER_NAME = "native"
# Set to "off", no kernel is compiled or used.
SWITCH = "JAXINFER_NATIVE"
TARGETS = ("jaxinfer_convolution", "jaxinfer_depthwise", "jaxinfer_integer", "jaxinfer_loop")

_SOURCES = Path(__file__).parent
_FLAGS = "-std=gnu11 -O3 -march=native -ffp-contract=fast -shared -fPIC -pthread".split()
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120
_CPU = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Library:
    """What is there.

    Attributes:
        panel: how many output channels a panel of packed weights has.
        tile_rows: how many results are computed together; no more can be pooled.
        digest: changes with the kernels, the compiler and the processor; timings depend on it.
        has_integers: whether the processor has instructions for products of int8 that are worth a kernel.
        kind: the same for libraries that take the same calls: changes with the sources and the panels.
    """

    panel: int
    digest: str
    tile_rows: int = 1
    has_integers: bool = False
    kind: str = ""


class _Missing(Exception):
    """There are no kernels here, and why."""


def library() -> Library | None:
    """The kernels, compiled and loaded at the first call; None where that cannot be, see :func:`why_missing`."""
    return _loaded()[0]


def why_missing() -> str:
    """Why there are no kernels, and what to do about it; empty where they are there."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Library | None, str]:
    try:
        return _load(), ""
    except _Missing as why:
        return None, str(why)


def _load() -> Library:
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        raise _Missing(f"{SWITCH} is off")
    if platform.system() != "Linux":
        raise _Missing(f"native kernels are for Linux, this is {platform.system()}")
    compiler = _compiler()
    digest = _digest(compiler)
    with _file(compiler, digest) as path:
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise _Missing(f"{path} cannot be loaded: {error}; remove it, and it is made again") from error
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, target)), platform="cpu")
    loaded.team_resize(_threads())
    panel = loaded.jaxinfer_panel()
    sources = hashlib.blake2b(b"".join(path.read_bytes() for path in _sources()), digest_size=12)
    return Library(
        panel=panel,
        digest=digest,
        tile_rows=loaded.jaxinfer_tile_rows(),
        has_integers=bool(loaded.jaxinfer_has_integer()),
        kind=f"{sources.hexdigest()}-{panel}",
    )


def _compiler() -> list[str]:
    """The command of a C compiler."""
    for name in (*filter(None, [os.environ.get("CC")]), *_COMPILERS):
        command = name.split()
        if command and shutil.which(command[0]):
            return command
    raise _Missing(f"no C compiler: install gcc or clang, or name one in CC (looked for {', '.join(_COMPILERS)})")


def _sources() -> list[Path]:
    return sorted((*_SOURCES.glob("*.c"), *_SOURCES.glob("*.h")))


def _digest(compiler: Sequence[str]) -> str:
    """What a compiled file depends on: sources, flags, XLA's headers, the compiler, the processor."""
    digest = hashlib.blake2b(digest_size=12)
    for path in (*_sources(), Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")):
        digest.update(path.read_bytes())
    digest.update(" ".join((*compiler, *_FLAGS)).encode())
    digest.update(_output([*compiler, "--version"]).encode())
    with contextlib.suppress(OSError):
        first = _CPU.read_text().split("\n\n")[0]
        digest.update("".join(x for x in first.splitlines() if x.startswith(("model name", "flags", "Feat"))).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _file(compiler: Sequence[str], digest: str) -> Iterator[Path]:
    """The compiled kernels, in the user's cache folder, or for this process only where that cannot be written."""
    name, folder = f"kernels-{digest}.so", default_folder()
    if folder is not None:
        path = folder / FOLDER_NAME / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                # Whole or not at all, whoever else does the same now.
                handle, part = tempfile.mkstemp(dir=path.parent, suffix=".so")
                os.close(handle)
                try:
                    _compile(compiler, Path(part))
                    os.replace(part, path)
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(part)
            yield path
            return
        except OSError:
            pass
    with tempfile.TemporaryDirectory() as temporary:
        _compile(compiler, Path(temporary, name))
        yield Path(temporary, name)


def _compile(compiler: Sequence[str], path: Path) -> None:
    sources = [str(source) for source in _sources() if source.suffix == ".c"]
    _output([*compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(path)])


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Missing(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise _Missing(f"{command[0]} does not compile the native kernels: {first}")
    return done.stdout


def _threads() -> int:
    """As many as JAX uses itself."""
    if "xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", ""):
        return 1
    count = len(os.sched_getaffinity(0))
    wanted = os.environ.get("NPROC", "")
    return min(count, int(wanted)) if wanted.isdecimal() and int(wanted) else count
