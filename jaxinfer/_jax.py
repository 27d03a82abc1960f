"""The only file that knows JAX's internals and how they differ between versions.

Everything else in the project reaches private parts of JAX through the names defined here, so that a new JAX release is
met in one place. Supported: JAX 0.10.2 (Python 3.11) and 0.12.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import effects as _effects
from jax._src import source_info_util as _source
from jax._src.ad_checkpoint import remat_p
from jax._src.interpreters import ad, batching, mlir
from jax._src.interpreters import partial_eval as pe
from jax._src.interpreters import pxla as _pxla
from jax._src.lax import lax as _lax
from jax._src.lax.control_flow import conditionals as _conditionals
from jax._src.lib import xla_client as _xla
from jax._src.state.types import AbstractRef, RefEffect
from jax.extend import core as jex
from jax.extend.core import primitives as _primitives

Primitive = jex.Primitive
Jaxpr = jex.Jaxpr
ClosedJaxpr = jex.ClosedJaxpr
Literal = jex.Literal
DropVar = jex.DropVar
cond_p = _conditionals.cond_p

__all__ = [
    "ClosedJaxpr",
    "DropVar",
    "Jaxpr",
    "Literal",
    "Primitive",
    "ad",
    "batching",
    "cond_p",
    "mlir",
    "pe",
    "remat_p",
]


# -- primitives -------------------------------------------------------------------------------------------------------

# JAX renames primitives between releases; the graph always says these names.
_ALIASES = {"pjit": "jit", "checkpoint": "remat", "remat2": "remat", "eval_jaxpr": "closed_call"}


def _find_name(primitive: Primitive) -> str:
    """JAX's own primitives go by their name; a foreign one gets a name that no rule can match by accident."""
    if primitive in _PUBLIC or any(
        found is primitive
        for name, module in list(sys.modules.items())
        if name.startswith("jax._src.") and module is not None
        for found in vars(module).values()
    ):
        return _ALIASES.get(primitive.name, primitive.name)
    return f"{primitive.name}@{type(primitive).__module__}:{id(primitive):x}"


_PUBLIC = frozenset(getattr(_primitives, name) for name in dir(_primitives) if name.endswith("_p"))
_OPERATIONS: dict[Primitive, str] = {}


def operation(primitive: Primitive) -> str:
    """The name rules know a primitive by, the same in every JAX version."""
    name = _OPERATIONS.get(primitive)
    if name is None:
        name = _OPERATIONS[primitive] = _find_name(primitive)
    return name


def register_operation(primitive: Primitive, name: str) -> None:
    """Makes one of this project's own primitives known by name."""
    _OPERATIONS[primitive] = name


def bind(primitive: Primitive, inputs: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Binds a primitive as ``jax.core.eval_jaxpr`` does and returns its results as a list."""
    out = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


# -- jaxprs -----------------------------------------------------------------------------------------------------------


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """The equations of an open or closed jaxpr, with the constants that belong to it."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def close_jaxpr(jaxpr: Any) -> ClosedJaxpr:
    """An open jaxpr without constants as a closed one, always the same; closed ones come back unchanged."""
    return jaxpr if hasattr(jaxpr, "consts") else _closed(jaxpr)


@functools.lru_cache(maxsize=1024)
def _closed(jaxpr: Any) -> ClosedJaxpr:
    return ClosedJaxpr(jaxpr, ())


def make_jaxpr(fun: Callable[..., Sequence[Any]], avals: Sequence[Any]) -> ClosedJaxpr:
    """Traces a function of flat arguments to a closed jaxpr, keeping the arguments' weak types."""
    return jax.make_jaxpr(fun)(*map(to_struct, avals))


def to_struct(aval: Any) -> Any:
    """An aval in the form that ``jax.make_jaxpr`` and ``jax.jit(...).lower`` take as an abstract argument."""
    if isinstance(aval, jax.ShapeDtypeStruct) or not isinstance(aval, jax.core.ShapedArray):
        return aval
    sharding = None
    if getattr(aval.sharding, "mesh", None) is not None and not aval.sharding.mesh.empty:
        sharding = aval.sharding
    # Inside shard_map: over which mesh axes the value may differ.
    varying = getattr(aval, "manual_axis_type", None)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding, manual_axis_type=varying
    )


def jaxpr_as_fun(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The function that a closed jaxpr stands for."""
    return jex.jaxpr_as_fun(closed)


def without_constvars(closed: ClosedJaxpr) -> tuple[Jaxpr, list[Any]]:
    """An open jaxpr whose constants have become leading inputs, and those constants."""
    jaxpr, consts = open_jaxpr(closed)
    if not consts:
        return jaxpr, []
    return pe.convert_constvars_jaxpr(jaxpr), list(consts)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a ``scan`` equation are loop constants, and how many are carries."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def uses_refs(closed: ClosedJaxpr) -> bool:
    """Whether a program, or a call in it, reads or writes mutable arrays (Refs), which are left alone."""
    jaxpr, _ = open_jaxpr(closed)
    if any(is_ref(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars)):
        return True
    for eqn in jaxpr.eqns:
        if any(is_ref(v.aval) for v in eqn.outvars) or any(isinstance(e, RefEffect) for e in eqn.effects):
            return True
        # The Refs of a kernel are its operands, not the program's.
        if operation(eqn.primitive) != "pallas_call" and any(map(uses_refs, _nested_jaxprs(eqn.params))):
            return True
    return False


def holds_arrays(jaxpr: Any) -> bool:
    """Whether a program, or a call in it, has arrays of its own, which its text does not show."""
    open_, consts = open_jaxpr(jaxpr)
    return bool(consts) or any(holds_arrays(j) for eqn in open_.eqns for j in _nested_jaxprs(eqn.params))


def _nested_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for param in params.values():
        for value in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(value, (Jaxpr, ClosedJaxpr)):
                yield value


def nested_constants(closed: ClosedJaxpr) -> Iterator[Any]:
    """The constants that stand inside the equations of a program: those of the calls in it, and literals."""
    jaxpr, _ = open_jaxpr(closed)
    for eqn in jaxpr.eqns:
        yield from (x.val for x in eqn.invars if isinstance(x, Literal))
        for inner in _nested_jaxprs(eqn.params):
            yield from open_jaxpr(inner)[1]
            yield from nested_constants(inner)


def uses_operations(closed: ClosedJaxpr, names: Collection[str]) -> bool:
    """Whether a program, or a call in it, has one of some operations."""
    jaxpr, _ = open_jaxpr(closed)
    return any(
        operation(eqn.primitive) in names or any(uses_operations(j, names) for j in _nested_jaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def has_custom_derivatives(closed: ClosedJaxpr) -> bool:
    """Whether a program, or a call in it, defines derivatives of its own."""
    jaxpr, _ = open_jaxpr(closed)
    return any(
        operation(eqn.primitive).startswith(("custom_jvp_call", "custom_vjp_call"))
        or any(map(has_custom_derivatives, _nested_jaxprs(eqn.params)))
        for eqn in jaxpr.eqns
    )


@functools.lru_cache(maxsize=256)
def without_derivative(closed: ClosedJaxpr, why: str) -> ClosedJaxpr:
    """The same program, whose differentiation raises a :class:`TypeError`."""
    fun = jax.custom_jvp(jaxpr_as_fun(closed))

    @fun.defjvp
    def refuse(*_: Any) -> Any:
        raise TypeError(why)

    return make_jaxpr(fun, [v.aval for v in open_jaxpr(closed)[0].invars])


def is_ref(aval: Any) -> bool:
    """Whether values of a type are mutable arrays."""
    return isinstance(aval, AbstractRef)


def has_ordered_effects(effects: Any) -> bool:
    """Whether a set of effects must be executed in program order."""
    return bool(_effects.ordered_effects.filter_in(effects))


def is_inlinable_call(params: dict[str, Any]) -> bool:
    """Whether a ``jit`` equation asks for nothing but its body: no shardings, layouts, donation or options."""

    def unspecified(values: Sequence[Any]) -> bool:
        return all(v is None or type(v).__name__ == "UnspecifiedValue" for v in values)

    mesh = params.get("ctx_mesh")
    return (
        unspecified(params.get("in_shardings", ()))
        and unspecified(params.get("out_shardings", ()))
        and unspecified(params.get("in_layouts", ()))
        and unspecified(params.get("out_layouts", ()))
        and not any(params.get("donated_invars", ()))
        and not params.get("compiler_options_kvs")
        and (mesh is None or mesh.empty)
    )


# -- context and source -----------------------------------------------------------------------------------------------


def current_context() -> Any:
    """What an equation traced now would record besides its parameters (threefry mode, mesh, metadata, ...)."""
    return _core.JaxprEqnContext()


def context_key(context: Any) -> Any:
    """A hashable stand-in for an equation context: equal keys mean equal contexts."""
    return tuple(
        (slot, repr(getattr(context, slot, None)))
        for slot in type(context).__slots__
        if slot not in ("__weakref__", "configs")
    )


@contextlib.contextmanager
def at_source(source: Any, context: Any) -> Iterator[None]:
    """Traces what is inside as if it stood at the given source line, in the given equation context."""
    stack = _source.current_name_stack() + source.name_stack
    with _source.user_context(source.traceback, name_stack=stack), context.manager:
        yield


def nested_source(outer: Any, inner: Any) -> Any:
    """The source of an equation inside an inlined call: its own line under the call's name stack."""
    if outer is None or not outer.name_stack.stack:
        return inner
    return inner.replace(name_stack=outer.name_stack + inner.name_stack)


def source_line(source: Any) -> str:
    """The user's ``file:line (function)`` that an equation came from, or an empty string."""
    return _source.summarize(source) if source is not None else ""


def new_source() -> Any:
    """The source information of the code being traced right now."""
    return _source.current()


# -- values -----------------------------------------------------------------------------------------------------------


def aval_of(value: Any) -> Any:
    """The abstract value of an array, scalar, tracer or literal."""
    return _core.typeof(value)


def with_aval(value: Any, aval: Any) -> Any:
    """The value with the weak type of ``aval``; dtype and shape must agree already."""
    have = aval_of(value)
    if getattr(have, "weak_type", False) == getattr(aval, "weak_type", False):
        return value
    return _lax._convert_element_type(value, aval.dtype, weak_type=aval.weak_type)


def same_type(a: Any, b: Any) -> bool:
    """Whether two avals agree in shape and dtype (weak types and shardings aside)."""
    if isinstance(a, jax.core.ShapedArray) and isinstance(b, jax.core.ShapedArray):
        return a.shape == b.shape and a.dtype == b.dtype
    return a == b


def is_extended(dtype: Any) -> bool:
    """Whether a dtype is one of JAX's own (typed random keys), which NumPy does not know."""
    return jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at now (it is no tracer)."""
    return not isinstance(value, jax.core.Tracer)


# -- traces -----------------------------------------------------------------------------------------------------------


def under_trace() -> bool:
    """Whether someone's transformation or jit is tracing right now."""
    return not _core.trace_state_clean()


def jit_disabled() -> bool:
    """Whether the user asked for op-by-op execution (``jax.disable_jit``)."""
    return bool(_config.disable_jit.value)


def runs_at_once() -> bool:
    """Whether a call made right now is simply run: no trace, and no op-by-op execution.

    In one frame, since it is asked at each call: where large programs have emptied the processor's caches, every
    further one takes a microsecond.
    """
    context = _core.trace_ctx
    return context.trace is _TOP_TRACE and context.axis_env is _TOP_AXES and not _config.disable_jit.value


_TOP_TRACE, _TOP_AXES = _core.eval_trace, _core.top_axis_env


def settings_key() -> tuple[Any, ...]:
    """The configuration that changes what a trace or a compilation gives."""
    return (
        jax.config.jax_enable_x64,
        jax.config.jax_default_matmul_precision,
        jax.config.jax_numpy_dtype_promotion,
        jax.config.jax_default_prng_impl,
        jax.config.jax_threefry_partitionable,
    )


def is_inexact(dtype: Any) -> bool:
    """Whether a dtype is a floating-point or complex one, JAX's own small ones included."""
    return jax.numpy.issubdtype(dtype, jax.numpy.inexact)


# -- what primitives of our own need ----------------------------------------------------------------------------------


def define_effectful_abstract(primitive: Primitive, rule: Callable[..., tuple[Any, Any]]) -> None:
    """Sets the abstract evaluation of a primitive: results' avals and effects."""
    primitive.def_effectful_abstract_eval(rule)  # type: ignore[attr-defined]


def is_export(ctx: Any) -> bool:
    """Whether a lowering is for ``jax.export``: what it says must be known wherever the program is run."""
    return ctx.module_context.lowering_parameters.for_export


def one_minus_square(x: Any) -> Any:
    """1 − x², without cancellation near ±1 where JAX has an operation for it (from 0.12)."""
    if hasattr(jax.lax, "one_minus_square"):
        return jax.lax.one_minus_square(x)
    return jax.lax.sub(jax.numpy.ones((), aval_of(x).dtype), jax.lax.square(x))


def tangent_aval(aval: Any) -> Any:
    """The type of tangents of values of a type."""
    return aval.to_tangent_aval()


def has_tangent(aval: Any) -> bool:
    """Whether values of a type can be differentiated (floats and complex numbers can, integers and keys cannot)."""
    return hasattr(aval, "dtype") and tangent_aval(aval).dtype != jax.dtypes.float0


def is_mapped(dim: Any) -> bool:
    """Whether a batching rule's operand has the batch axis."""
    return dim is not None and dim is not getattr(batching, "not_mapped", None)


# -- kinds of arguments -----------------------------------------------------------------------------------------------


def abstract(value: Any) -> Any:
    """The type of an argument as ``jax.jit`` sees it: canonical dtype, weak type."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    aval = _core.typeof(value)
    return aval if isinstance(value, (jax.Array, jax.core.Tracer)) or is_ref(aval) else aval.update(sharding=None)


def type_key(value: Any) -> Any:
    """A hashable key of an argument's type: equal for an array and the tracer that stands for it."""
    aval = value if isinstance(value, jax.ShapeDtypeStruct) else _core.typeof(value)
    sharding = getattr(aval, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    placed = str(sharding) if mesh is not None and not mesh.empty else None
    varying = getattr(aval, "manual_axis_type", None)
    return (aval.shape, aval.dtype, bool(getattr(aval, "weak_type", False)), is_ref(aval), placed, varying)


def shapes_of(tree: Any) -> Any:
    """A pytree with every array replaced by its type."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x, tree
    )


@contextlib.contextmanager
def without_source_files() -> Iterator[None]:
    """What is lowered inside says nothing about the folders and the calls that its source came from."""
    with _config.hlo_source_file_canonicalization_regex(r"^.*[/\\]"), _config.traceback_in_locations_limit(1):
        yield


# -- compiled programs ------------------------------------------------------------------------------------------------


# The code of a compiled program, and the positions of the arguments that it takes.
Code = tuple[bytes, list[int]]


def serialize(compiled: jax.stages.Compiled) -> Code | None:
    """The code of a compiled program for another process, and the positions of the arguments that it takes.

    None for a program that is more than its code: one with callbacks, effects, Refs or several devices, or one that
    calls another library than our own (LAPACK's kernels, for one, are made ready when a program is lowered, which
    loading leaves out). To be called before the program has run for the first time: XLA then puts functions of its own
    in the place of what a sort compares by, and cannot write those down.
    """
    unloaded: Any = getattr(compiled._executable, "_unloaded_executable", None)
    if unloaded is None or len(unloaded.device_list) != 1 or compiled._params.const_args:
        return None
    effects = (*unloaded.ordered_effects, *unloaded.unordered_effects)
    if unloaded.mut or unloaded.host_callbacks or unloaded.keepalive or effects:
        return None
    if any(
        not name.startswith(("__", "jaxinfer_"))
        for name in re.findall(r'custom_call_target="([^"]*)"', compiled.as_text() or "")
    ):
        return None
    try:
        code = unloaded.backend.serialize_executable(unloaded.xla_executable)
    except jax.errors.JaxRuntimeError:  # XLA cannot write some operations down
        return None
    return code, sorted(unloaded.kept_var_idx)


class Loaded:
    """A compiled program of another process.

    Args:
        name: what profiles call it.
        code: what :func:`serialize` gave.
        kept: the positions of the arguments that it takes.
        operands: the types of all arguments.
        results: the types of its results.
        device: where it runs.
        committed: whether its results are bound to that device, as those of ``jax.jit`` are if an argument is.
    """

    def __init__(
        self,
        name: str,
        code: bytes,
        kept: Sequence[int],
        operands: Sequence[Any],
        results: Sequence[Any],
        device: jax.Device,
        committed: bool,
    ):
        devices = _xla.DeviceList((device,))
        there = jax.sharding.SingleDeviceSharding(device)
        avals = [operands[i] for i in kept]
        self._executable = _pxla.UnloadedMeshExecutable(
            xla_executable=device.client.deserialize_executable(code, executable_devices=devices),
            device_list=devices,
            backend=device.client,
            input_avals=avals,
            input_shardings=[there] * len(avals),
            output_avals=list(results),
            output_shardings=[there] * len(results),
            committed=committed,
            name=name,
            unordered_effects=[],
            ordered_effects=[],
            keepalive=[],
            host_callbacks=[],
            kept_var_idx=set(kept),
            mut=None,
            xla_in_layouts=[None] * len(avals),
            dispatch_in_layouts=[None] * len(avals),
            xla_out_layouts=[None] * len(results),
            all_args_info=None,
            pgle_profiler=None,
        ).load()

    def __call__(self, *operands: Any) -> list[Any]:
        """Runs it on flat operands."""
        return list(self._executable.call(*operands))

    def function(self, calls: Any, out_tree: Any, check: Callable[[Sequence[Any]], None]) -> Callable[..., Any]:
        """The program as a function that is called as fast as one of ``jax.jit``.

        Args:
            calls: arguments ``(args, kwargs)`` of the structure that calls have.
            out_tree: the structure of the results.
            check: called with the flat arguments of each new kind of call; raises what such a call is to raise.
        """

        class Checked:
            @staticmethod
            def call(*operands: Any) -> Any:
                check(operands)
                return self._executable.call(*operands)

        params = jax.stages.Compiled(self._executable, [], calls, out_tree)._params
        return self._executable.create_cpp_call(params._replace(executable=Checked()))  # type: ignore[arg-type]
