"""Running a measurement in a fresh Python process, where nothing is compiled, cached or fragmented yet."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class MeasurementError(RuntimeError):
    """A measurement failed in its own process."""


def fresh(function: Callable[..., Any], environment: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """Calls a function of a module in a process of its own.

    Args:
        function: a function at the top level of a module.
        environment: variables set for that process, besides those of this one.
        **arguments: its arguments; what JSON can carry.

    Returns:
        What it returned, carried by JSON.

    Raises:
        MeasurementError: it raised, or the process died; the message has the end of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="jaxinfer-") as folder:
        answer = Path(folder, "answer.json")
        done = subprocess.run(
            [sys.executable, "-m", __name__, function.__module__, function.__qualname__, str(answer)],
            input=json.dumps(arguments),
            env={**os.environ, **(environment or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode or not answer.exists():
            what = f"{function.__qualname__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
            raise MeasurementError(f"{what} ended with status {done.returncode}:\n{_tail(done.stdout)}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _answer(module: str, function: str, path: str) -> None:
    result = getattr(importlib.import_module(module), function)(**json.load(sys.stdin))
    Path(path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    _answer(*sys.argv[1:])
