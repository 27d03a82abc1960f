"""C programs that try the sources of the kernels without JAX."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

import jaxinfer.native
from jaxinfer.native.library import _compiler

HERE, SOURCES = Path(__file__).parent, Path(jaxinfer.native.__file__).parent
_FLAGS = "-std=gnu11 -g -Wall -Wextra -pthread".split()


def build(folder: Path, program: str, sources: Sequence[str], *flags: str) -> Path | str:
    """Compiles a program of this folder together with some sources.

    Returns:
        The path of what can be run, or what the compiler has to say against it.
    """
    path = folder / "program"
    files = [str(HERE / program), *(str(SOURCES / source) for source in sources)]
    include = [f"-I{SOURCES}", f"-isystem{jax.ffi.include_dir()}"]
    done = subprocess.run(
        [*_compiler(), *_FLAGS, *flags, *include, *files, "-o", str(path)], capture_output=True, text=True, timeout=240
    )
    return path if done.returncode == 0 else done.stderr
