"""Compiled forms of a program, and how they are called."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.arguments import Options
from jaxinfer.program import Form, Program
from jaxinfer.ready import Ready, placement


class OtherSignature(Exception):
    """Raised by a run: it is for arguments of another kind."""


class CompiledForm:
    """A form compiled for one kind of call, to be run on flat operands."""

    def __init__(self, run: Callable[..., Any], leaves: Sequence[Any], tree: Any, static: Any):
        bound = isinstance(run, functools.partial)
        self._run = run.func if isinstance(run, functools.partial) else run
        self.weights: list[Any] = run.args[0] if isinstance(run, functools.partial) else []
        self._leading, self._tree, self._static = bound, tree, static
        start = time.perf_counter()
        args, kwargs = self._call(leaves, self.weights)
        self.compiled: jax.stages.Compiled = self._run.lower(*args, **kwargs).compile()  # type: ignore[attr-defined]
        self.compile_seconds = time.perf_counter() - start
        self.code = _jax.serialize(self.compiled)
        memory = self.compiled.memory_analysis()
        self.temporary_bytes: int | None = None if memory is None else memory.temp_size_in_bytes
        self.peak_bytes: int | None = None if memory is None else _peak(memory)

    def _call(self, operands: Sequence[Any], weights: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = Options.join(jax.tree.unflatten(self._tree, operands), self._static)
        return ([list(weights), *args] if self._leading else args), kwargs

    def __call__(self, operands: Sequence[Any], weights: Sequence[Any] | None = None) -> list[Any]:
        args, kwargs = self._call(operands, self.weights if weights is None else weights)
        return jax.tree.leaves(self._run(*args, **kwargs))


class LoadedRun:
    """A program that another process compiled, called as the one of this process would be.

    Args:
        ready: the program.
        signature: the kind of calls it is for.
        options: which arguments are static.
        call: such a call: its ``(args, kwargs)`` without static ones, and the static ones.
        out_tree: the structure of the results.
        compile: makes the run of this process, for what a loaded program cannot do: show itself, or leave its device.
    """

    def __init__(
        self,
        ready: Ready,
        signature: Any,
        options: Options,
        call: tuple[Any, Any],
        out_tree: Any,
        compile: Callable[[], Callable[..., Any]],
    ):
        (args, kwargs), static = call
        self._signature, self._options, self._compile = signature, options, compile
        run = ready.program.function((([*ready.weights], *args), kwargs), out_tree, self._check)
        self._types, self._settings = signature[1], signature[3]
        self._weights, self._committed = ready.weights, ready.committed
        self._run: Callable[..., Any] = functools.partial(run, list(ready.weights))
        if static:
            self._run = functools.partial(self._without_static, self._run, static)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._run(*args, **kwargs)
        except (TypeError, ValueError):
            # Not for this program, says JAX or the check.
            pass
        if self._options.signature(args, kwargs)[0] != self._signature:
            raise OtherSignature
        return self.jitted(*args, **kwargs)

    @functools.cached_property
    def jitted(self) -> Callable[..., Any]:
        """The run of this process."""
        return self._compile()

    def _check(self, operands: Sequence[Any]) -> None:
        """Called once for each new kind of call."""
        other = operands[len(self._weights) :]
        if tuple(map(_jax.type_key, other)) != self._types or _jax.settings_key() != self._settings:
            raise TypeError("arguments of another kind")
        place = placement(operands)
        if place is None or place[1] != self._committed:
            raise ValueError("arguments on another device")

    def _without_static(self, run: Callable[..., Any], static: Any, *args: Any, **kwargs: Any) -> Any:
        (data, named), other = self._options.split(args, kwargs)
        if other != static:
            raise TypeError("static arguments of another value")
        return run(*data, **named)


def compiled_flat(program: Program, form: Form | None, leaves: Sequence[Any]) -> Any:
    """A form of a program compiled over its weights and the leaves of a call."""
    flat, weights = flat_and_weights(program, form, program.weights(form))
    return jax.jit(flat, compiler_options=dict(form.options) if form else None).lower(weights, *leaves).compile()


def flat_and_weights(program: Program, form: Form | None, weights: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """``f(weights, *operands) -> results`` of a form, and the weights to pass to it: none where it holds them."""
    flat = program.flat(form)
    if form is None or not form.holds_weights:
        return flat, weights
    return (lambda _, *operands: flat(weights, *operands)), []


def _peak(memory: Any) -> int:
    """Bytes a compiled program holds while it runs: arguments, results and what it needs in between."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - memory.alias_size_in_bytes
