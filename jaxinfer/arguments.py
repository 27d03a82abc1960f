"""What of a call is data and what is structure.

``jax.jit`` wants arrays. People also pass Equinox modules (pytrees that hold functions), Flax NNX modules (objects with
state) and plain values. Here the arrays of such a call are told apart from the rest, which becomes one hashable static
argument, and the state of NNX modules is written back after the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax

_SCALARS = (bool, int, float, complex)
_ARRAYS = (jax.Array, jax.Ref, np.ndarray, np.generic, *_SCALARS, jax.ShapeDtypeStruct)


@jax.tree_util.register_static
class Static:
    """A hashable value that JAX treats as part of the structure.

    Raises:
        TypeError: when it is made from something that cannot be hashed.
    """

    def __init__(self, value: Any):
        try:
            self._hash = hash(value)
        except TypeError as error:
            raise TypeError(
                f"an argument holds {_unhashable(value)}, which is neither an array nor hashable: make it an array, "
                "or give its class __hash__ and __eq__"
            ) from error
        self.value = value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        # 1, 1.0 and True are equal in Python; programs made for them differ.
        return isinstance(other, Static) and type(self.value) is type(other.value) and self.value == other.value


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a pytree is data: an array, a scalar, a tracer or an abstract array."""
    return isinstance(leaf, _ARRAYS) or hasattr(leaf, "__jax_array__")


def is_stateful(value: Any) -> bool:
    """Whether a value is a Flax NNX module."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def is_record(value: Any) -> bool:
    """Whether a value is an Equinox module: a pytree whose numbers and flags are settings and not data."""
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(value, equinox.Module)


def _is_node(value: Any) -> bool:
    return is_stateful(value) or is_record(value)


def needs_packing(args: Any) -> bool:
    """Whether ``jax.jit`` could not take these arguments as they are."""

    def takes(node: Any) -> bool:
        return all(map(_is_data, jax.tree.leaves(node))) if is_record(node) else is_array(node)

    return not all(map(takes, jax.tree.leaves(args, is_leaf=_is_node)))


def _is_data(leaf: Any) -> bool:
    """Whether a leaf of an Equinox module is an argument."""
    return is_array(leaf) and not isinstance(leaf, _SCALARS)


def pack(args: Any) -> tuple[list[Any], Static]:
    """Splits arguments into arrays and everything else.

    Args:
        args: any pytree; Flax NNX modules may stand in it as leaves. Of Equinox modules the arrays are data, and
            everything else, numbers and flags included, is not.

    Returns:
        The arrays, and a static value from which :func:`unpack` rebuilds the arguments around them.

    Raises:
        TypeError: if something is neither an array nor hashable.
    """
    nodes, outer = jax.tree.flatten(args, is_leaf=_is_node)
    arrays: list[Any] = []
    plan: list[Any] = []
    for node in nodes:
        if is_record(node):
            leaves, tree = jax.tree.flatten(node)
            arrays.extend(filter(_is_data, leaves))
            plan.append(("record", tree, tuple(None if _is_data(leaf) else Static(leaf) for leaf in leaves)))
        elif is_stateful(node):
            definition, state = sys.modules["flax.nnx"].split(node)
            leaves, tree = jax.tree.flatten(state)
            arrays.extend(leaves)
            plan.append(("module", len(leaves), tree, definition))
        elif is_array(node):
            arrays.append(node)
            plan.append(("array",))
        else:
            plan.append(("static", node))
    return arrays, Static((outer, tuple(plan)))


def unpack(arrays: Sequence[Any], static: Static) -> Any:
    """The arguments that :func:`pack` took apart, around the given arrays; modules are made anew."""
    outer, plan = static.value
    rest = iter(arrays)
    nodes = []
    for kind, *what in plan:
        if kind == "record":
            tree, settings = what
            nodes.append(jax.tree.unflatten(tree, [next(rest) if s is None else s.value for s in settings]))
        elif kind == "module":
            count, tree, definition = what
            state = jax.tree.unflatten(tree, [next(rest) for _ in range(count)])
            nodes.append(sys.modules["flax.nnx"].merge(definition, state))
        else:
            nodes.append(next(rest) if kind == "array" else what[0])
    return jax.tree.unflatten(outer, nodes)


def packed(fun: Callable[..., Any]) -> Callable[[list[Any], list[Any], Static], Any]:
    """A function of packed arguments: ``(bound arrays, arrays, static) -> (results, changes of state)``.

    ``static`` holds the static parts of the bound ``(args, kwargs)`` and of the call's. Only the arrays of module state
    that the call replaced are returned, so unchanged weights do not travel.
    """

    def run(bound: list[Any], arrays: list[Any], static: Static) -> Any:
        calls = unpack(bound, static.value[0]), unpack(arrays, static.value[1])
        modules = stateful(calls)
        before = [_state_leaves(m) for m in modules]
        (bound_args, bound_kwargs), (args, kwargs) = calls
        out = fun(*bound_args, *args, **{**bound_kwargs, **kwargs})
        changes = {
            (i, j): new
            for i, (module, old) in enumerate(zip(modules, before))
            for j, (new, was) in enumerate(zip(_state_leaves(module), old))
            if new is not was
        }
        results, structure = pack(out)
        return results, structure, list(changes.values()), Static(tuple(changes))

    return run


def unpacked(answer: Any, calls: Any) -> Any:
    """Results of :func:`packed` as the caller expects them; writes changed state into the caller's modules."""
    results, structure, values, places = answer
    modules = stateful(calls)
    for i in sorted({i for i, _ in places.value}):
        _write_state(modules[i], {j: v for (k, j), v in zip(places.value, values) if k == i})
    return unpack(results, structure)


def stateful(args: Any) -> list[Any]:
    """The Flax NNX modules in a pytree."""
    return [m for m in jax.tree.leaves(args, is_leaf=is_stateful) if is_stateful(m)]


def _state_leaves(module: Any) -> list[Any]:
    return jax.tree.leaves(sys.modules["flax.nnx"].split(module)[1])


def _write_state(module: Any, changes: dict[int, Any]) -> None:
    nnx = sys.modules["flax.nnx"]
    leaves, tree = jax.tree.flatten(nnx.split(module)[1])
    nnx.update(module, jax.tree.unflatten(tree, [changes.get(j, leaf) for j, leaf in enumerate(leaves)]))


def _require_hashable(place: int | str, value: Any) -> None:
    try:
        hash(value)
    except TypeError as error:
        name = f"argument {place}" if isinstance(place, int) else f"argument {place!r}"
        raise TypeError(
            f"static {name} is a {type(value).__name__}, which cannot be hashed: pass a hashable value (a tuple in "
            "place of a list), or do not declare it static"
        ) from error


def _unhashable(value: Any) -> str:
    if isinstance(value, tuple):
        for part in value:
            try:
                hash(part)
            except TypeError:
                return _unhashable(part)
    return f"a {type(value).__name__}"


class Options:
    """Which arguments are static and which are donated, as ``jax.jit`` takes them, and the kind of a call.

    Attributes:
        static_argnums: positions of static arguments.
        static_argnames: names of static arguments.
        donate_argnums: positions of arguments whose buffers may be used up.
    """

    def __init__(
        self,
        static_argnums: Sequence[int] = (),
        static_argnames: Sequence[str] = (),
        donate_argnums: Sequence[int] = (),
    ):
        self.static_argnums = tuple(static_argnums)
        self.static_argnames = tuple(static_argnames)
        self.donate_argnums = tuple(donate_argnums)

    def shifted(self, count: int) -> Options:
        """The options after ``count`` arguments were put in front (or, if negative, taken away there)."""

        def shift(numbers: Sequence[int]) -> list[int]:
            return [i if i < 0 else i + count for i in numbers if i < 0 or i + count >= 0]

        return Options(shift(self.static_argnums), self.static_argnames, shift(self.donate_argnums))

    def jit(self, fun: Callable[..., Any], compiler: Mapping[str, str], donates: bool) -> Any:
        """``jax.jit`` with these options and compiler options; without donation unless ``donates``."""
        return jax.jit(
            fun,
            static_argnums=self.static_argnums or None,
            static_argnames=self.static_argnames or None,
            donate_argnums=(self.donate_argnums or None) if donates else None,
            compiler_options=dict(compiler) or None,
        )

    def split(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Data and static values of a call: ``(args, kwargs)`` with static places empty, and what stood there."""
        count = len(args)
        numbers = {i % count for i in self.static_argnums if -count <= i < count} if count else set()
        named = {k: v for k, v in kwargs.items() if k not in self.static_argnames}
        if not numbers and len(named) == len(kwargs):
            return (tuple(args), kwargs), ()
        data = tuple(None if i in numbers else a for i, a in enumerate(args))
        by_number = tuple((i, args[i]) for i in sorted(numbers))
        by_name = tuple((k, kwargs[k]) for k in sorted(kwargs) if k in self.static_argnames)
        places: list[tuple[int | str, Any]] = [*by_number, *by_name]
        for place, value in places:
            _require_hashable(place, value)
        return (data, named), (by_number, by_name)

    @staticmethod
    def join(data: Any, static: Any) -> tuple[list[Any], dict[str, Any]]:
        """The call that :meth:`split` took apart."""
        args, kwargs = list(data[0]), dict(data[1])
        if static:
            for i, value in static[0]:
                args[i] = value
            kwargs.update(static[1])
        return args, kwargs

    def signature(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any], Any, Any]:
        """The kind of a call: a hashable key, the array leaves, their structure, and the static values."""
        data, static = self.split(args, kwargs)
        leaves, tree = jax.tree.flatten(data)
        return (tree, tuple(map(_jax.type_key, leaves)), static, _jax.settings_key()), leaves, tree, static
