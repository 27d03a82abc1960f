"""Which arguments and results can be differentiated; errors say what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxinfer import _jax

if TYPE_CHECKING:
    from jaxinfer.differentiation.program import Traced


def check_argnums(argnums: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """Positions of the arguments to differentiate, counted from the front.

    Raises:
        TypeError: if they are no integers.
        ValueError: if there is no such argument.
    """
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for i in chosen:
        if not isinstance(i, int) or isinstance(i, bool):
            raise TypeError(f"argnums must be an integer or several, not {argnums!r}")
        if not -count <= i < count:
            raise ValueError(
                f"{name} differentiates with respect to positional argument {i}, but was called with {count} of them: "
                "give it by position, or change argnums"
            )
    return tuple(i % count for i in chosen)


def check_inputs(argument: Any, what: str, holomorphic: bool, allow_int: bool) -> None:
    """Looks at one chosen argument.

    Raises:
        TypeError: if a leaf cannot be differentiated.
    """
    for leaf in jax.tree.leaves(argument):
        try:
            dtype = _jax.aval_of(leaf).dtype
        except TypeError as error:
            raise TypeError(f"{what} needs arguments that are arrays or numbers, and was given {leaf!r}") from error
        if _jax.is_extended(dtype) or not jnp.issubdtype(dtype, jnp.inexact):
            if not allow_int:
                raise TypeError(
                    f"{what} requires real- or complex-valued inputs (input dtype that is a sub-dtype of np.inexact), "
                    f"but got {dtype}. To use integer inputs, convert them to floats or pass allow_int=True"
                )
        elif jnp.issubdtype(dtype, jnp.complexfloating) and not holomorphic and what == "grad":
            raise TypeError(
                f"{what} requires real-valued inputs, but got {dtype}. For holomorphic differentiation pass "
                "holomorphic=True; for non-holomorphic functions of complex inputs use autoinfer.vjp"
            )
        elif holomorphic and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{what} with holomorphic=True requires complex inputs, but got {dtype}")


def check_scalar(traced: Traced, holomorphic: bool) -> None:
    """Looks at the result of a function whose gradient is asked for.

    Raises:
        TypeError: if it is no scalar of a type that has a gradient.
    """
    avals, scalar = traced.graph.out_avals[: traced.outputs], jax.tree.structure(0)
    if len(avals) != 1 or not traced.out_tree == scalar:
        raise TypeError(f"gradients are defined for scalar-output functions only; the output had {traced.out_tree}")
    (aval,) = avals
    if aval.shape != ():
        raise TypeError(
            f"gradients are defined for scalar-output functions only; the output had shape {aval.shape}. Sum it, or "
            "use autoinfer.jacobian"
        )
    wanted = jnp.complexfloating if holomorphic else jnp.floating
    if not jnp.issubdtype(aval.dtype, wanted):
        kind = "complex" if holomorphic else "real"
        raise TypeError(f"the gradient requires {kind}-valued outputs here, but the output has the dtype {aval.dtype}")


def check_tangents(primals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """Leaves of tangents that match the primals.

    Raises:
        TypeError: if structure, shape or dtype differ.
    """
    tree: Any
    leaves, tree = jax.tree.flatten(tuple(primals))
    directions, other = jax.tree.flatten(tuple(tangents))
    if tree != other:
        raise TypeError(f"primals and tangents must have the same structure, but have {tree} and {other}")
    for x, t in zip(leaves, directions):
        have, want = _jax.aval_of(t), _jax.tangent_aval(_jax.aval_of(x))
        if have.shape != want.shape or have.dtype != want.dtype:
            raise TypeError(
                f"a primal of type {_jax.aval_of(x).str_short()} needs a tangent of {want.str_short()}, not "
                f"{have.str_short()}"
            )
    return directions
