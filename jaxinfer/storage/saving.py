"""Programs → files."""

from __future__ import annotations

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.tree_util import SequenceKey

from jaxinfer import _jax
from jaxinfer.arguments import Options
from jaxinfer.call import PLATFORMS
from jaxinfer.graph import emit, trace
from jaxinfer.graph.node import INLINE_ELEMENTS
from jaxinfer.native import KERNELS, TARGETS, exports_with_kernels, library
from jaxinfer.optimized import Optimized
from jaxinfer.pipeline import platform_now
from jaxinfer.settled_call import PlatformProgram, SettledCall
from jaxinfer.storage.arrays import ArrayWriter
from jaxinfer.storage.container import Section, StorageError, write
from jaxinfer.storage.stored_call import STORED_CALL
from jaxinfer.storage.structure import describe, describe_static

BATCH = "batch"


@dataclass(frozen=True, eq=False)
class _Kind:
    """One kind of call to be stored.

    Attributes:
        arguments: structure of ``(args, kwargs)``.
        avals: types of its leaves.
        options: which arguments are static.
        static: their values.
        results: structure of the results.
        bound: operands after the weights and before the call's.
        on: what runs on a platform.
    """

    arguments: Any
    avals: Sequence[Any]
    options: Options
    static: Any
    results: Any
    bound: Sequence[Any]
    on: Callable[[str], PlatformProgram]


def save(
    program: Any,
    path: str | os.PathLike[str],
    *examples: Any,
    kwargs: Mapping[str, Any] | None = None,
    batch_axes: Any = None,
    platforms: Sequence[str] | None = None,
    scheme: Any = None,
    zstd: bool = False,
    vjp_order: int = 0,
) -> None:
    """Writes a program and its weights into one file, from which :func:`load` runs it without its code.

    What is stored of an optimized or frozen function is what was settled: the programs that its calls so far run, with
    the same folded weights and compiler options, so that results are the same bit for bit on the same machine. A
    program that calls this project's kernels is stored without them too, for machines that have none. The file is
    written beside its place and moved there when it is complete.

    Args:
        program: an optimized or frozen function; any other function of arrays; or ``(function, params)``, as
            ``shrink`` and ``quantize`` return them: the function with its first argument known, which is stored as it
            is (quantized weights stay small, where freezing might compute with them beforehand).
        path: the file. One that exists is replaced.
        *examples: arguments of a call to store; arrays or ``jax.ShapeDtypeStruct``. An optimized function stores
            every kind of call it had so far besides, and needs none if it had one. Called with arrays, it is settled
            now, which is measured; with types only, by the analytic model.
        kwargs: keyword arguments of that call.
        batch_axes: stores one more program, for batches of any size: the axis that is the batch, an int or a pytree of
            them that is a prefix of ``examples``, None for arguments without, as ``in_axes`` of ``jax.vmap``. Kinds of
            calls that are stored with their sizes still run their own program. Other symbolic dimensions can be given
            as the shapes of ``jax.ShapeDtypeStruct`` examples (:func:`jax.export.symbolic_shape`).
        platforms: among ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``; by default the present one. Each gets a
            program of its own.
        scheme: how the weights were quantized, to be read again from ``load(path).scheme``: a dataclass or JSON types.
            By default the attribute ``scheme`` of the function, if it has one.
        zstd: compress arrays where that makes them smaller (``pip install "jaxinfer[zstd]"``).
        vjp_order: how many times the loaded function is to be differentiable.

    Raises:
        StorageError: if the program has no signature yet and no examples were given, holds what has no place in a file
            (calls back into Python, several devices), or cannot be written. What was at ``path`` is then unchanged.

    Example:
        >>> import tempfile, os, jax.numpy as jnp
        >>> from jaxinfer import autoinfer
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> autoinfer.save((lambda w, x: x @ w, jnp.eye(3)), path, jnp.ones((1, 3)), batch_axes=0)
        >>> autoinfer.load(path)(jnp.ones((5, 3))).shape
        (5, 3)
    """
    fun = program[0] if isinstance(program, tuple) and len(program) == 2 else program
    if not callable(fun):
        raise StorageError(
            f"an object of type {type(program).__name__} is no program: give a function, or (function, params)"
        )
    if fun is not program:
        program = (fun, jax.tree.map(_as_array, program[1]))
    calls = [(examples, dict(kwargs or {}))] if examples or kwargs else []
    if batch_axes is not None:
        calls.append(_with_symbolic_batch(examples, dict(kwargs or {}), batch_axes))
    kinds = _settled(program, calls, vjp_order) if isinstance(program, Optimized) else _traced(program, calls)
    if not kinds:
        raise StorageError(
            f"{_name(fun)} was not called yet, so that it is not known what to store: call it first, or give example "
            "arguments (jax.ShapeDtypeStruct will do) after the path"
        )
    arrays = ArrayWriter(zstd)
    paths = _paths(program)
    programs: list[Section] = []
    entries = []
    for platform in _checked(platforms):
        for kind in kinds:
            entry, codes = _entry(_name(fun), kind, platform, arrays, paths, vjp_order)
            for key, code in codes.items():
                entry[key] = f"autoinfer.program.{len(programs)}"
                programs.append(Section(entry[key], np.frombuffer(zlib.compress(code, 9), np.uint8)))
            entries.append(entry)
    content = {
        "name": _name(fun),
        "versions": {name: version(name) for name in ("jaxinfer", "jax", "jaxlib")},
        "scheme": _as_data(getattr(fun, "scheme", None) if scheme is None else scheme),
        "arrays": arrays.descriptions,
        "entries": entries,
    }
    write(path, content, [*arrays.sections, *programs])


# -- what to store ----------------------------------------------------------------------------------------------------


def _settled(program: Optimized, calls: Sequence[tuple[Any, dict[str, Any]]], vjp_order: int) -> list[_Kind]:
    try:
        for args, kwargs in calls:
            program.program(*args, **kwargs)
        settled = program.settled_calls()
    except (TypeError, RuntimeError) as error:
        raise StorageError(f"{_name(program)} cannot be stored: {error}") from error
    if vjp_order and any(_jax.has_custom_derivatives(call.program.jaxpr) for call in settled):
        raise StorageError(
            f"{_name(program)} defines derivatives of its own (custom_jvp or custom_vjp), which optimized programs do "
            "not keep: save (function, params) as written, or with vjp_order=0"
        )
    return [_kind_of(call) for call in settled]


def _kind_of(call: SettledCall) -> _Kind:
    return _Kind(call.arguments, call.avals, call.options, call.static, call.results, call.bound, call.on)


def _traced(program: Any, calls: Sequence[tuple[Any, dict[str, Any]]]) -> list[_Kind]:
    """The kinds of calls of a function that is stored as it is written."""
    fun, known = (program[0], program[1:]) if isinstance(program, tuple) else (program, ())
    bound, bound_tree = jax.tree.flatten(known)
    return [_trace(fun, bound, bound_tree, args, kwargs) for args, kwargs in calls]


def _as_array(leaf: Any) -> Any:
    """A leaf of known arguments as JAX computes with it."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise StorageError(f"params hold {leaf!r}, which is no array: bind it with functools.partial") from error


def _trace(fun: Any, bound: Sequence[Any], bound_tree: Any, args: Any, kwargs: dict[str, Any]) -> _Kind:
    leaves, tree = jax.tree.flatten((tuple(args), kwargs))
    structure: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        given, named = jax.tree.unflatten(tree, values[len(bound) :])
        results, out_tree = jax.tree.flatten(
            fun(*jax.tree.unflatten(bound_tree, values[: len(bound)]), *given, **named)
        )
        structure[:] = [out_tree]
        return results

    try:
        avals = [_jax.abstract(x) for x in leaves]
        jaxpr = _jax.make_jaxpr(flat, [*map(_jax.abstract, bound), *avals])
    except TypeError as error:
        raise StorageError(f"{_name(fun)} cannot be stored as a function of arrays: {error}") from error
    run = PlatformProgram(lambda weights, *operands: _jax.jaxpr_as_fun(jaxpr)(*operands), [])
    return _Kind(tree, avals, Options(), (), structure[0], bound, lambda platform: run)


def _with_symbolic_batch(examples: Sequence[Any], kwargs: dict[str, Any], axes: Any) -> tuple[Any, dict[str, Any]]:
    """The call with one size replaced by a symbol."""
    scope = export.SymbolicScope()
    (size,) = export.symbolic_shape(BATCH, scope=scope)

    def symbolic(axis: int | None, argument: Any) -> Any:
        return argument if axis is None else jax.tree.map(lambda x: replaced(x, axis), argument)

    def replaced(leaf: Any, axis: int) -> jax.ShapeDtypeStruct:
        aval = _jax.abstract(leaf)
        if not -len(aval.shape) <= axis < len(aval.shape):
            raise StorageError(f"batch_axes names axis {axis} of an argument of shape {aval.shape}")
        shape = list(aval.shape)
        shape[axis] = size
        return jax.ShapeDtypeStruct(shape, aval.dtype)

    if kwargs or not examples:
        raise StorageError("batch_axes goes with positional examples: give them, or types of symbolic shape instead")
    if isinstance(axes, int):
        axes = (axes,) * len(examples)
    try:
        return tuple(jax.tree.map(symbolic, tuple(axes), tuple(examples), is_leaf=lambda x: x is None)), kwargs
    except (TypeError, ValueError) as error:
        raise StorageError(f"batch_axes is no prefix of the examples: {error}") from error


# -- one program ------------------------------------------------------------------------------------------------------


def _entry(
    name: str, kind: _Kind, platform: str, arrays: ArrayWriter, paths: Mapping[int, str], vjp_order: int
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the manifest says of a kind of call on a platform, and the program, perhaps in two ways."""
    try:
        program = kind.on(platform)
    except RuntimeError as error:
        raise StorageError(f"{name} cannot be stored for {platform}: {error}") from error
    run, weights, results, calls_kernels = _lifted(program, kind, keep_custom=vjp_order > 0)
    by_number, by_name = kind.static or ((), ())
    entry = {
        "platform": platform,
        "arguments": describe(kind.arguments),
        "static": [[[key, describe_static(value)] for key, value in part] for part in (by_number, by_name)],
        "static_places": [list(kind.options.static_argnums), list(kind.options.static_argnames)],
        "types": [_type(aval) for aval in kind.avals],
        "results": describe(kind.results),
        "result_types": [_type(aval) for aval in results],
        "weights": [arrays.add(w, paths.get(id(w), f"weight.{i}")) for i, w in enumerate(weights)],
        "form": program.form,
        "options": dict(program.options),
        "holds_weights": program.holds_weights,
    }
    try:
        types = [_jax.to_struct(_jax.abstract(x)) for x in weights], *map(_jax.to_struct, kind.avals)
        run.__name__ = name
        codes = {"program": _exported(run, types, platform, vjp_order)}
        kernels = library() if calls_kernels else None
        if kernels is not None:
            entry["kernels"] = kernels.kind
            with exports_with_kernels():
                codes["kernel_program"] = _exported(run, types, platform, vjp_order)
        return entry, codes
    except ImportError as error:
        raise StorageError(f"programs are written with a package: pip install flatbuffers ({error})") from error
    except (NotImplementedError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{name} cannot be stored for {platform}: {error}") from error


def _exported(run: Callable[..., Any], types: Sequence[Any], platform: str, vjp_order: int) -> bytes:
    # A function of its own each time: JAX keeps what it has lowered.
    run = functools.wraps(run)(functools.partial(run))
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    with _jax.without_source_files():
        exported = export.export(jax.jit(run), platforms=(platform,), disabled_checks=checks)(*types)
        if exported.nr_devices != 1:
            raise StorageError(f"{run.__name__} runs on {exported.nr_devices} devices: store it for one")
        return bytes(exported.serialize(vjp_order=vjp_order))


def _lifted(program: PlatformProgram, kind: _Kind, keep_custom: bool) -> tuple[Any, list[Any], Sequence[Any], bool]:
    """A program as ``run(weights, *operands)``, its large constants among the weights.

    Returns:
        That, the weights, the types of its results, and whether it calls kernels of this machine.
    """
    given = [*program.weights, *kind.bound]
    count = len(program.weights)
    jaxpr = _jax.make_jaxpr(
        lambda *values: program.flat(list(values[:count]), *values[count:]), [*map(_jax.abstract, given), *kind.avals]
    )
    results = [v.aval for v in _jax.open_jaxpr(jaxpr)[0].outvars]
    kernels = _jax.uses_operations(jaxpr, KERNELS | {STORED_CALL})
    if any(map(_is_large, _jax.nested_constants(jaxpr))):
        # As a graph: that has calls inlined, and constants in one place.
        graph = trace(jaxpr, keep_custom=keep_custom)
        emitted, hidden = emit(graph), [w.value for w in graph.weights]
        return _after(given, emitted), [*given, *hidden], results, kernels
    plain, consts = _jax.without_constvars(jaxpr)
    large = [i for i, c in enumerate(consts) if _is_large(c)]
    body = _jax.jaxpr_as_fun(_jax.close_jaxpr(plain))

    def filled(own: Sequence[Any], *operands: Any) -> list[Any]:
        every = list(consts)
        for i, value in zip(large, own):
            every[i] = value
        return body(*every, *operands)

    return _after(given, filled), [*given, *(consts[i] for i in large)], results, kernels


def _after(given: Sequence[Any], fun: Callable[..., Any]) -> Callable[..., Any]:
    """``fun(own weights, *given weights, *operands)`` as a function of all weights in one list."""
    count = len(given)
    return lambda weights, *operands: fun(weights[count:], *weights[:count], *operands)


def _is_large(constant: Any) -> bool:
    """Whether a constant is a weight rather than a part of the program."""
    return np.size(constant) > INLINE_ELEMENTS or (hasattr(constant, "dtype") and _jax.is_extended(constant.dtype))


def _type(aval: Any) -> list[Any]:
    shape = [d if isinstance(d, int) else str(d) for d in aval.shape]
    return [shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))]


# -- what to call it --------------------------------------------------------------------------------------------------


def _name(fun: Any) -> str:
    name = getattr(fun, "__name__", type(fun).__name__)
    return name if name.isidentifier() else "program"


def _paths(program: Any) -> dict[int, str]:
    """The names of known arrays, by identity: where they stand in the parameters."""
    args, named = (program[1:], {}) if isinstance(program, tuple) else getattr(program, "bound_arguments", ((), {}))
    leaves = [*jax.tree_util.tree_leaves_with_path(args), *jax.tree_util.tree_leaves_with_path(named)]
    return {id(x): _path(path[isinstance(path[0], SequenceKey) :]) for path, x in leaves if hasattr(x, "dtype")}


def _path(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "params"


def _checked(platforms: Sequence[str] | None) -> list[str]:
    if platforms is None:
        return [platform_now()]
    wrong = [name for name in platforms if name not in PLATFORMS]
    if isinstance(platforms, str) or wrong or not platforms:
        raise StorageError(f"platforms={platforms!r}: give some of {', '.join(map(repr, PLATFORMS))} in a list")
    return list(dict.fromkeys(platforms))


def _as_data(value: Any) -> Any:
    """A description, such as a quantization scheme, in JSON types; dataclasses say what they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _as_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): _as_data(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_data(v) for v in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
