"""Linear systems that are solved by a function of the user's: ``lax.custom_linear_solve``.

The matrix A is given as a function x → A x whose constants it depends on. From A x = b follows ẋ = A⁻¹ (ḃ − Ȧ x), and
back b̄ = A⁻ᵀ x̄, with −b̄ pulled back through the constants of x → A x. What the solver itself does is not differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.rules import add, filled, place
from jaxinfer.graph import Graph, Node, trace
from jaxinfer.graph.emit import Emit


class System(NamedTuple):
    """The operands of a solve by their roles.

    Attributes:
        matvec: constants of x → A x.
        vecmat: constants of x → Aᵀ x.
        solve: constants of the solver.
        transpose_solve: constants of the solver of the transposed system.
        right: the right-hand sides b.
    """

    matvec: Sequence[Any]
    vecmat: Sequence[Any]
    solve: Sequence[Any]
    transpose_solve: Sequence[Any]
    right: Sequence[Any]

    @staticmethod
    def of(node: Node, operands: Sequence[Any]) -> System:
        """Values that belong to the operands of a node, by role."""
        groups, start = [], 0
        for count in node.params["const_lengths"]:
            groups.append(list(operands[start : start + count]))
            start += count
        matvec, vecmat, solver, transpose_solver = groups
        return System(matvec, vecmat, solver, transpose_solver, list(operands[start:]))


def _product(node: Node) -> Graph:
    """(constants, x) → A x."""
    return trace(_jax.close_jaxpr(node.params["jaxprs"].matvec), keep_custom=True)


def tangents(
    push: Callable[[Graph, Sequence[Any], Sequence[Any]], Sequence[Any]],
    node: Node,
    primals: Sequence[Any],
    outs: Sequence[Any],
    moved: Sequence[Any],
) -> list[Any]:
    """Tangents of the solution; further results of the solver have none.

    Args:
        push: (program, inputs, tangents of inputs) → tangents of its outputs.
        node: the solve.
        primals: its operands.
        outs: its results.
        moved: tangents of the operands.
    """
    system, dots = System.of(node, primals), System.of(node, moved)
    x = outs[: len(system.right)]
    right = list(dots.right)
    if any(t is not None for t in dots.matvec):
        changes = push(_product(node), [*system.matvec, *x], [*dots.matvec, *(None for _ in x)])
        right = [add(b, None if t is None else lax.neg(t)) for b, t in zip(right, changes)]
    if all(b is None for b in right):
        return [None] * len(outs)
    consts = primals[: len(primals) - len(right)]
    operands = [*consts, *(filled(t, b) for t, b in zip(right, system.right))]
    found = _jax.bind(node.primitive, operands, dict(node.params))
    return [*found[: len(right)], *(None for _ in outs[len(right) :])]


def solve(
    vjp: Callable[..., Any],
    emit: Emit,
    node: Node,
    primals: Sequence[Any],
    active: Sequence[bool],
    useful: Sequence[bool],
) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """A solve and its pullback.

    Args:
        vjp: reverse mode.
        emit: runs operations.
        node: the solve.
        primals: its operands.
        active: which operands are differentiated.
        useful: which results may get a cotangent.

    Raises:
        TypeError: where the caller gave no solver for the transposed system.
    """
    jaxprs, lengths = node.params["jaxprs"], node.params["const_lengths"]
    if jaxprs.transpose_solve is None:
        raise TypeError(f"reverse mode through lax.custom_linear_solve needs its transpose_solve argument{place(node)}")
    outs = list(emit.default(node, *primals))
    system, marks = System.of(node, primals), System.of(node, active)
    x = outs[: len(system.right)]

    def transposed(values: Any) -> Any:
        return type(values)(values.vecmat, values.matvec, values.transpose_solve, values.solve)

    params = {**node.params, "jaxprs": transposed(jaxprs), "const_lengths": transposed(lengths)}
    consts = [*system.vecmat, *system.matvec, *system.transpose_solve, *system.solve]

    def pull(cotangents: Sequence[Any]) -> list[Any]:
        if all(ct is None for ct in cotangents[: len(x)]):
            return [None] * len(primals)
        given = [filled(ct, v) for ct, v in zip(cotangents, x)]
        right = _jax.bind(node.primitive, [*consts, *given], params)[: len(x)]
        back: list[Any] = [None] * len(primals)
        if any(marks.matvec):
            which = [*marks.matvec, *(False for _ in x)]
            _, pull_product = vjp(_product(node), emit.weights, which, [True] * len(x), *system.matvec, *x)
            back[: len(system.matvec)] = pull_product([lax.neg(ct) for ct in right])[: len(system.matvec)]
        back[len(primals) - len(x) :] = right
        return back

    return outs, pull
