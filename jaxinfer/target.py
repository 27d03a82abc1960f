"""What a user names on the command line: a function somewhere, and arguments to call it with."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SEED = 0
_SHORT = {"f": "float", "i": "int", "s": "int", "u": "uint", "c": "complex", "bf": "bfloat"}


class TargetError(Exception):
    """What was named cannot be used.

    Attributes:
        status: exit status of the command, 2 where it was asked for wrongly and 1 where the user's code failed.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def load(name: str) -> Callable[..., Any]:
    """Imports a callable; modules in the current folder are found as by ``python -m``.

    Args:
        name: ``MODULE:FUNCTION``, as in ``mypackage.model:predict`` or ``mypackage.model:Net.apply``.

    Raises:
        TargetError: there is no such module or function, or it is not callable.
    """
    module_name, colon, path = name.partition(":")
    if not (colon and module_name and path):
        raise TargetError(f"{name!r} is not of the form MODULE:FUNCTION, as in mypackage.model:predict")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise TargetError(f"importing {module_name} failed: {error}; install what it needs", status=1) from error
        raise TargetError(
            f"no module {module_name!r} here ({os.getcwd()}) or among the installed packages: start jaxinfer in the "
            "folder that holds it, or install it"
        ) from error
    except Exception as error:
        raise _blame(f"importing {module_name}", error) from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise TargetError(f"{name}: {found!r} has no {attribute!r}; look for a misspelling")
        found = getattr(found, attribute)
    if not callable(found):
        raise TargetError(f"{name} is {type(found).__name__}, which cannot be called; name a function")
    return found


def arguments(maker: str | None, shapes: Sequence[str]) -> tuple[Any, ...]:
    """Example arguments: what a callable returns, or random arrays of the given types.

    Args:
        maker: ``MODULE:CALLABLE``; what is no tuple counts as the only argument.
        shapes: types such as ``f32[8,128]``; see :func:`array`.

    Raises:
        TargetError: the callable cannot be loaded or raises, or a type cannot be read.
    """
    if maker is None:
        rng = np.random.default_rng(_SEED)
        return tuple(array(shape, rng) for shape in shapes)
    function = load(maker)
    with blamed(maker):
        made = function()
    return made if isinstance(made, tuple) else (made,)


def array(text: str, rng: np.random.Generator) -> jax.Array:
    """A random array of a type written as JAX prints it.

    Args:
        text: dtype and sizes: ``f32[8,128]``, ``bf16[3]``, ``i32[]``, ``float64[2,2]``, ``bool[4]``.
        rng: where values come from: normal floats; integers that are 0 or 1, so that they are indices of any axis.

    Raises:
        TargetError: the type cannot be read, or JAX does not make it as things stand.
    """
    match = re.fullmatch(r"\s*(\w+?)\s*\[([\d,\s]*)\]\s*", text)
    sizes = [size.strip() for size in match[2].split(",")] if match and match[2].strip() else []
    if match is None or not all(size.isdecimal() for size in sizes):
        raise TargetError(f"{text!r} is no array type; write one as in f32[8,128] or i32[]")
    short = re.fullmatch(r"(bf|f|i|s|u|c)(\d+)", match[1])
    name = f"{_SHORT[short[1]]}{short[2]}" if short else match[1]
    try:
        dtype = jnp.dtype(getattr(jnp, name))
    except (AttributeError, TypeError) as error:
        raise TargetError(
            f"{text!r}: there is no dtype {match[1]!r}; use one such as f32, bf16, i32 or bool"
        ) from error
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TargetError(f"{text!r}: JAX makes no {dtype} unless 64-bit types are on; set JAX_ENABLE_X64=1")
    shape = tuple(int(size) for size in sizes)
    if jnp.issubdtype(dtype, jnp.inexact):
        values = rng.standard_normal(shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            values = values + 1j * rng.standard_normal(shape)
        return jnp.asarray(values, dtype)
    return jnp.asarray(rng.integers(0, 2, shape), dtype)


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Turns what the user's code raises into a message that says where.

    Raises:
        TargetError: anything was raised within.
    """
    try:
        yield
    except TargetError:
        raise
    except Exception as error:
        raise _blame(name, error) from error


def _blame(what: str, error: Exception) -> TargetError:
    """The innermost line outside of installed packages is the one to look at."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and os.path.dirname(__file__) not in f.filename]
    own = [f for f in own if not f.filename.startswith("<") and os.path.exists(f.filename)]
    where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    summary = str(error).strip().splitlines()[0] if str(error).strip() else ""
    hint = "; give example arguments with --args or --shape" if "required positional argument" in summary else ""
    return TargetError(f"{what} raised {type(error).__name__}{where}: {summary}{hint} (--debug shows all)", status=1)
