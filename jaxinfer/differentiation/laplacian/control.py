"""The Laplacian through branches and loops: bodies carry value, Jacobian and Laplacian.

Which values a loop carries depend on the inputs, and on which of them, is found first, by walking the body abstractly
until nothing is added any more; the loop itself then runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.laplacian.blocks import (
    Block,
    compress,
    occurring,
    rows_over,
    same_rows,
    uniform_rows,
    union,
)
from jaxinfer.differentiation.laplacian.terms import Term, Triple, is_active, primal
from jaxinfer.graph import Graph, Node, interpret

# After so many rounds every value that depends on some inputs is taken to depend on all that any value depends on.
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Form:
    """What is carried beside a value: nothing (rows is None), or its Jacobian with these rows and its Laplacian."""

    rows: np.ndarray | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Form) or (self.rows is None) != (other.rows is None):
            return False
        return self.rows is None or other.rows is None or same_rows(self.rows, other.rows)

    __hash__ = None  # type: ignore[assignment]


def form_of(value: Any) -> Form:
    """What is carried beside a value."""
    return Form(value.block.rows if is_active(value) else None)


def joined(a: Form, b: Form) -> Form:
    """What holds either of two."""
    if a.rows is None or b.rows is None:
        return a if b.rows is None else b
    return Form(union(a.rows, b.rows))


def packed(values: Sequence[Any], forms: Sequence[Form]) -> list[Any]:
    """Arrays, for JAX's control flow: a value alone, or with rows and Laplacian."""
    arrays = []
    for value, form in zip(values, forms, strict=True):
        arrays.append(primal(value))
        if form.rows is None:
            continue
        shape, dtype = jnp.shape(primal(value)), jnp.result_type(primal(value))
        whole = (form.rows.shape[0], *shape)
        if is_active(value):
            arrays += [jnp.broadcast_to(value.block.at(form.rows), whole).astype(dtype), value.curvature]
        else:
            arrays += [jnp.zeros(whole, dtype), jnp.zeros(shape, dtype)]
    return arrays


def unpacked(arrays: Sequence[Any], forms: Sequence[Form]) -> list[Any]:
    """The values that :func:`packed` took apart."""
    rest, values = iter(arrays), []
    for form in forms:
        value = next(rest)
        if form.rows is None:
            values.append(value)
        else:
            block = Block(next(rest), form.rows, jnp.shape(value))
            values.append(Triple(value, (Term(None, block),), next(rest)))
    return values


def forms_out(fun: Callable[..., Sequence[Any]], arrays: Sequence[Any], forms: Sequence[Form]) -> list[Form]:
    """What the results of a body carry."""
    found: list[Form] = []

    def walk(*inside: Any) -> list[Any]:
        results = fun(*unpacked(inside, forms))
        found.extend(map(form_of, results))
        return [primal(r) for r in results]

    jax.eval_shape(walk, *arrays)
    return found


def _as_walked(domain: Any, graph: Graph) -> Callable[..., list[Any]]:
    """A body, and its results with the types that the program says."""

    def body(*values: Any) -> list[Any]:
        results = interpret(graph, domain, *values)
        return [
            Triple(_jax.with_aval(r.value, a), r.terms, r.laplacian)
            if is_active(r)
            else (_jax.with_aval(r, a) if hasattr(a, "dtype") else r)
            for r, a in zip(results, graph.out_avals)
        ]

    return body


def _typed(values: Sequence[Any], nodes: Sequence[Node]) -> list[Any]:
    """Values with the weak types of the graph inputs they go to."""
    return [
        Triple(_jax.with_aval(v.value, n.aval), v.terms, v.laplacian)
        if is_active(v)
        else (_jax.with_aval(v, n.aval) if hasattr(n.aval, "dtype") else v)
        for v, n in zip(values, nodes)
    ]


def branches(domain: Any, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
    """Each branch carries what it finds; results carry what any branch gives."""
    forms = [form_of(x) for x in inputs]
    arrays = packed(inputs, forms)
    bodies = [_as_walked(domain, g) for g in node.params["branches"]]
    out: list[Form] | None = None
    for body in bodies:
        found = forms_out(body, arrays, forms)
        out = found if out is None else [joined(a, b) for a, b in zip(out, found)]
    assert out is not None

    def branch(body: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        return lambda *inside: packed(body(*unpacked(inside, forms)), out)

    index = primal(index)
    index = index.astype(jnp.int32) if index.dtype == bool else index
    return unpacked(lax.switch(index, [branch(b) for b in bodies], *arrays), out)


def _settled(step: Callable[[list[Form]], list[Form]], start: list[Form], ranks: Sequence[int]) -> list[Form]:
    """What carries hold in the end: the least that holds the start and whatever one more step adds."""
    forms, rounds = start, 0
    while True:
        after = [joined(a, b) for a, b in zip(forms, step(forms))]
        if after == forms:
            return forms
        rounds += 1
        if rounds >= _ROUNDS:
            named = [occurring(f.rows) for f in after if f.rows is not None]
            names = np.unique(np.concatenate(named)) if named else np.zeros(0, np.int32)
            after = [f if f.rows is None else Form(uniform_rows(names, r)) for f, r in zip(after, ranks)]
            if after == forms:
                return forms
        forms = after


def scan(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """Carries, steps and results carry rows; what a scanned array depends on at any step, it depends on at each."""
    p, body = node.params, _as_walked(domain, node.params["body"])
    consts, carries = p["num_consts"], p["num_carry"]
    fixed = [_flattened(x) for x in inputs[:consts]]
    first = _typed(inputs[consts : consts + carries], p["body"].inputs[consts : consts + carries])
    scanned = [_of_steps(x) for x in inputs[consts + carries :]]
    step_forms = [Form(None if not is_active(x) else _one_step(x.block.rows)) for x in scanned]
    fixed_forms = [form_of(x) for x in fixed]
    steps = [_steps_first(x) for x in scanned]
    one = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), s) for s in steps]

    def walk(forms: list[Form]) -> list[Form]:
        arrays = [*packed(fixed, fixed_forms), *packed(_as_formed(first, forms), forms), *chain(*one)]
        return forms_out(body, arrays, [*fixed_forms, *forms, *step_forms])

    ranks = [jnp.ndim(primal(c)) for c in first]
    forms = _settled(lambda f: walk(f)[:carries], [form_of(c) for c in first], ranks)
    out_forms = walk(forms)[carries:]

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        out = body(*fixed, *unpacked(carry, forms), *unpacked(xs, step_forms))
        ys = packed(out[carries:], out_forms)
        return packed(out[:carries], forms), ys

    length = p["length"]
    carry, ys = lax.scan(
        step,
        packed(first, forms),
        list(chain(*steps)),
        length=length if isinstance(length, int) else None,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*unpacked(carry, forms), *_stacked(ys, out_forms)]


def _as_formed(values: Sequence[Any], forms: Sequence[Form]) -> list[Any]:
    return [primal(v) if f.rows is None else v for v, f in zip(values, forms)]


def _flattened(x: Any) -> Any:
    """A value whose Jacobian is computed before the loop, not in every step of it."""
    return Triple(x.value, (Term(None, x.block),), x.laplacian) if is_active(x) else x


def _of_steps(x: Any) -> Any:
    """A scanned value with the same rows at every step."""
    if not is_active(x):
        return x
    block = Block(x.block.at(rows := rows_over(x.block.rows, [0])), rows, x.shape)
    return Triple(x.value, (Term(None, block),), x.laplacian)


def _one_step(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(rows.shape[0], *rows.shape[2:])


def _steps_first(x: Any) -> list[Any]:
    """The arrays that are scanned: steps lead."""
    if not is_active(x):
        return [x]
    return [x.value, jnp.moveaxis(x.block.full, 1, 0), x.curvature]


def _stacked(arrays: Sequence[Any], forms: Sequence[Form]) -> list[Any]:
    """The results of all steps, rows first again."""
    rest, values = iter(arrays), []
    for form in forms:
        value = next(rest)
        if form.rows is None:
            values.append(value)
            continue
        rows = compress(form.rows.reshape(form.rows.shape[0], 1, *form.rows.shape[1:]))
        block = Block(jnp.moveaxis(next(rest), 0, 1), rows, jnp.shape(value))
        values.append(Triple(value, (Term(None, block),), next(rest)))
    return values


def while_loop(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """The condition sees values only; the body carries rows."""
    p, cond = node.params, node.params["cond"]
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    for_cond = [primal(x) for x in inputs[:n_cond]]
    fixed = [_flattened(x) for x in inputs[n_cond : n_cond + n_body]]
    first = _typed(inputs[n_cond + n_body :], p["body"].inputs[n_body:])
    body, fixed_forms = _as_walked(domain, p["body"]), [form_of(x) for x in fixed]

    def walk(forms: list[Form]) -> list[Form]:
        arrays = [*packed(fixed, fixed_forms), *packed(_as_formed(first, forms), forms)]
        return forms_out(body, arrays, [*fixed_forms, *forms])

    ranks = [jnp.ndim(primal(c)) for c in first]
    forms = _settled(walk, [form_of(c) for c in first], ranks)

    def goes_on(carry: Any) -> Any:
        return interpret(cond, domain, *for_cond, *(primal(v) for v in unpacked(carry, forms)))[0]

    carry = lax.while_loop(
        goes_on, lambda carry: packed(body(*fixed, *unpacked(carry, forms)), forms), packed(first, forms)
    )
    return unpacked(carry, forms)
