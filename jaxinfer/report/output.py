"""How results leave the process: plain text of bounded width, strict JSON, and files written whole."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import secrets
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType

T = TypeVar("T")
PathLike = str | os.PathLike[str]


def plain(renderable: RenderableType, width: int = 100) -> str:
    """Renders a rich object to text without colours, needing no terminal.

    Args:
      renderable: What rich can print.
      width: The longest line, in characters.
    """
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        emoji=False,
        highlight=False,
    )
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())  # type: ignore[attr-defined]


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    return Console(emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def write_file(path: PathLike, text: str, what: str) -> None:
    """Writes a file atomically: readers see the old content or the new, never a part.

    Args:
      path: Where to write; an existing file is replaced.
      text: The content, written as UTF-8.
      what: What the content is, for the error message ("the HLO comparison").

    Raises:
      OSError: (the subclass that fits) naming the path and the cause.
    """
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with scratch.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        scratch.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"cannot write {what} to {os.fspath(path)!r}: {error.strerror}; "
            "name a file in a folder that exists and can be written",
        ) from error


def to_json(value: Any) -> str:
    """Encodes a dataclass as strict JSON; NaN and the infinities become the strings float() reads back."""
    return json.dumps(_encode(value), indent=2, ensure_ascii=False, allow_nan=False)


def from_json(cls: type[T], text: str) -> T:
    """Reads back what `to_json` wrote.

    Args:
      cls: The dataclass that was written.
      text: The JSON document.

    Raises:
      ValueError: The text is not JSON, or not of this class; the message names the field.
    """
    return _decode(cls, json.loads(text), cls.__name__)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    # NumPy scalars are the usual source of measured numbers; they know how to become Python's own.
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        (hint,) = (option for option in arguments if option is not type(None))
        return _decode(hint, data, where)
    if origin is typing.Literal:
        if data not in arguments:
            raise ValueError(f"{where} is {data!r}; expected one of {', '.join(map(repr, arguments))}")
        return data
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_dataclass(hint, data, where)
    if origin is tuple:
        _expect(list, data, where)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(data)
        if len(arguments) != len(data):
            raise ValueError(f"{where} has {len(data)} entries; expected {len(arguments)}")
        return tuple(_decode(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, data)))
    if origin in (Mapping, dict):
        _expect(dict, data, where)
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    if hint is float and data in ("nan", "inf", "-inf"):
        return float(data)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    _expect(hint, data, where)
    return data


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    _expect(dict, data, where)
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := data.keys() - names:
        raise ValueError(f"{where} has no field {', '.join(sorted(unknown))}")
    values = {name: _decode(hints[name], item, f"{where}.{name}") for name, item in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where} is incomplete: {error}") from error


def _expect(kind: type, data: Any, where: str) -> None:
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise ValueError(f"{where} is {data!r}; expected {kind.__name__}")
