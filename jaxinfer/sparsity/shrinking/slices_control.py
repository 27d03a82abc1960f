"""Loops, branches and rematerialised calls: bodies run on what is left.

What a loop carries keeps its form from step to step. At first everything that is known at the start is taken to stay
missing; what a step makes of it says what has to be kept after all, until nothing changes any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, Node, interpret
from jaxinfer.sparsity.shrinking.slices import (
    LARGEST_KNOWN,
    NONE,
    Indices,
    Sliced,
    dense,
    made,
    merged,
    part,
    whole,
    without,
)


@dataclass(frozen=True, eq=False)
class Form:
    """All of a value but its array.

    Attributes:
        shape: of the whole value.
        keep: as in :class:`Sliced`.
        fill: as there; known.
        void: as there.
    """

    shape: tuple[int, ...]
    keep: tuple[Indices | None, ...]
    fill: np.ndarray
    void: tuple[Indices, ...]

    def value(self, array: Any) -> Sliced:
        """The value of this form with the given array."""
        return made(self.shape, array, self.keep, None, self.fill, self.void)

    def same(self, other: Form) -> bool:
        """Whether two forms keep the same, and know as much of the rest."""
        kept = zip(self.keep, other.keep)
        return all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in kept) and all(
            map(np.array_equal, self.void, other.void)
        )


def form_of(x: Any) -> Form | None:
    """The form of a value; None where it is no array of known size."""
    return Form(x.shape, x.keep, x.fill, x.void) if isinstance(x, Sliced) else None


def settled(domain: Any, x: Any) -> Any:
    """The value with nothing repeated and a fill that is known, for where only its array can go."""
    if not isinstance(x, Sliced):
        return x
    array = part(x, {}) if any(x.repeated) else x.array
    x = made(x.shape, array, x.keep, None, x.fill, x.void, x.known, x.fill_known)
    if not x.is_whole and not x.fill_known:
        x = whole(dense(x, log=domain.log))
    return x


def array_in(x: Any, form: Form | None) -> Any:
    """The array of a value in a form that keeps at least as much."""
    if form is None or not isinstance(x, Sliced):
        return dense(x)
    return jnp.asarray(part(x, dict(enumerate(form.keep))))


def joined(a: Form, b: Form) -> Form:
    """What keeps what either keeps, and what stands at different values in the two; void is what is void in one."""
    keep: list[Indices | None] = []
    void = []
    for axis, n in enumerate(a.shape):
        ka, kb = a.keep[axis], b.keep[axis]
        if ka is None or kb is None:
            keep.append(None)
            void.append(NONE)
            continue
        gone = np.intersect1d(without(n, ka), without(n, kb))
        free = merged(np.intersect1d(a.void[axis], gone), np.intersect1d(b.void[axis], gone))
        differ = [i for i in np.setdiff1d(gone, free) if not np.array_equal(_at(a, axis, i), _at(b, axis, i))]
        keep.append(without(n, np.setdiff1d(gone, differ)))
        void.append(free)
    fill = np.broadcast_arrays(a.fill, b.fill)[0]
    return Form(
        a.shape, tuple(k if k is None or len(k) < n else None for k, n in zip(keep, a.shape)), fill, tuple(void)
    )


def _at(form: Form, axis: int, index: int) -> np.ndarray:
    """What stands at a missing index, in the axes' full sizes."""
    fill = form.fill if form.fill.shape[axis] == 1 else form.fill[(slice(None),) * axis + ([index],)]
    return np.broadcast_to(fill, [1 if a == axis else n for a, n in enumerate(form.shape)])


def _hopeful(x: Any) -> Form | None:
    """The form of what a loop starts from, if all that is known of it stayed as it is."""
    form = form_of(x)
    if form is None or not x.known or x.array.size > LARGEST_KNOWN or x.rank == 0 or 0 in x.shape:
        return form
    array = dense(x, anything=True)
    return Form(x.shape, (NONE,) * x.rank, array, (NONE,) * x.rank)


def _usable(form: Form | None) -> Form | None:
    """A form that keeps something along each axis, or everything."""
    if form is None or all(k is None or len(k) for k in form.keep):
        return form
    return Form(form.shape, (None,) * len(form.shape), form.fill, (NONE,) * len(form.shape))


def _typed(x: Any, aval: Any) -> Any:
    """An array with the weak type of a loop's carry."""
    return _jax.with_aval(x, aval) if hasattr(aval, "dtype") else x


class _Body:
    """A nested graph on values of which something is missing, as a function of arrays."""

    def __init__(self, domain: Any, graph: Graph, fixed: Sequence[Any] = ()):
        self.domain, self.graph, self.fixed = domain, graph, list(fixed)

    def __call__(self, *values: Any) -> list[Any]:
        found = interpret(self.graph, self.domain, *self.fixed, *values)
        return [settled(self.domain, y) for y in found]

    def forms(self, inputs: Sequence[Form | None], arrays: Sequence[Any]) -> list[Form | None]:
        """The forms of the results for values of the given forms."""
        found: list[Form | None] = []

        def walk(*inside: Any) -> list[Any]:
            results = self(*(value_in(f, a) for f, a in zip(inputs, inside)))
            found.extend(map(form_of, results))
            return [dense(r, anything=True) for r in results]

        with self.domain.unlogged():
            jax.eval_shape(walk, *arrays)
        return found


def value_in(form: Form | None, array: Any) -> Any:
    """The value of a form; what has none is its array."""
    return array if form is None else form.value(array)


def _struct(x: Any, form: Form | None) -> Any:
    if form is None or not isinstance(x, Sliced):
        return x
    shape = [n if k is None else len(k) for n, k in zip(form.shape, form.keep)]
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _fixed_forms(
    carry: Sequence[Any], step: Callable[[list[Form | None], list[Any]], list[Form | None]]
) -> list[Form | None]:
    """The forms in which carries stay."""
    forms = [_hopeful(c) for c in carry]
    first = [form_of(c) for c in carry]
    while True:
        after = step(forms, [_struct(c, f) for c, f in zip(carry, forms)])
        new = [a if a is None or b is None else joined(a, b) for a, b in zip(forms, after)]
        if all(a is None or b is None or a.same(b) for a, b in zip(forms, new)):
            break
        forms = new
    usable = [_usable(f) for f in new]
    if all(a is b for a, b in zip(usable, new)):
        return new
    # What stays the same throughout is carried in full, which may make more of the others dynamic.
    forms = usable
    while True:
        after = step(forms, [_struct(c, f) for c, f in zip(carry, forms)])
        new = [a if a is None or b is None else _usable(joined(a, b)) for a, b in zip(forms, after)]
        if all(a is None or b is None or a.same(b) for a, b in zip(forms, new)):
            return [f if f is not None else g for f, g in zip(new, first)]
        forms = new


def scan(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    p = node.params
    consts, carries, graph = p["num_consts"], p["num_carry"], p["body"]
    body = _Body(domain, graph, inputs[:consts])
    carry = [settled(domain, c) for c in inputs[consts : consts + carries]]
    scanned = [_steps(domain, x) for x in inputs[consts + carries :]]
    each = [None if f is None else _one(f) for f in map(form_of, scanned)]
    xs = [x.array if isinstance(x, Sliced) else x for x in scanned]
    one = [jax.eval_shape(lambda a: a[0], x) if p["length"] else None for x in xs]
    if not p["length"]:
        return domain.densely(node, *inputs)

    def step_forms(forms: list[Form | None], arrays: list[Any]) -> list[Form | None]:
        return body.forms([*forms, *each], [*arrays, *one])[:carries]

    forms = _fixed_forms(carry, step_forms)
    out: list[Form | None] = []

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        values = [value_in(f, a) for f, a in zip([*forms, *each], [*state, *x])]
        results = body(*values)
        out[:] = map(form_of, results[carries:])
        new = [array_in(r, f) for r, f in zip(results[:carries], forms)]
        ys = [r.array if isinstance(r, Sliced) else r for r in results[carries:]]
        return tuple(map(_typed, new, graph.out_avals[:carries])), tuple(ys)

    init = [array_in(c, f) for c, f in zip(carry, forms)]
    init = list(map(_typed, init, [n.aval for n in graph.inputs[consts : consts + carries]]))
    last, ys = jax.lax.scan(step, tuple(init), tuple(xs), length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    stacked = [y if f is None else _stacked(f, p["length"]).value(y) for f, y in zip(out, ys)]
    return [*(value_in(f, a) for f, a in zip(forms, last)), *stacked]


def _steps(domain: Any, x: Any) -> Any:
    """A scanned array: all steps are there, and miss the same."""
    if not isinstance(x, Sliced):
        return x
    x = settled(domain, domain.full(x, 0))
    if not x.is_whole and x.fill.shape[0] > 1:
        return whole(dense(x, log=domain.log))
    return x


def _one(form: Form) -> Form:
    return Form(form.shape[1:], form.keep[1:], form.fill[0], form.void[1:])


def _stacked(form: Form, length: int) -> Form:
    return Form((length, *form.shape), (None, *form.keep), form.fill[None], (NONE, *form.void))


def while_loop(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    p = node.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    body = _Body(domain, p["body"], inputs[n_cond : n_cond + n_body])
    test = _Body(domain, p["cond"], inputs[:n_cond])
    carry = [settled(domain, c) for c in inputs[n_cond + n_body :]]
    forms = _fixed_forms(carry, body.forms)
    avals = [n.aval for n in p["body"].inputs[n_body:]]

    def values(state: Sequence[Any]) -> list[Any]:
        return [value_in(f, a) for f, a in zip(forms, state)]

    def going(state: Any) -> Any:
        return dense(test(*values(state))[0])

    def step(state: Any) -> Any:
        found = body(*values(state))
        new = [_typed(array_in(r, f), a) for r, f, a in zip(found, forms, p["body"].out_avals)]
        # Under vmap each example stops at its own time, and then stays as it is.
        active = going(state)
        return tuple(_where(active, y, x, f) if active.ndim else y for y, x, f in zip(new, state, forms))

    init = tuple(_typed(array_in(c, f), a) for c, f, a in zip(carry, forms, avals))
    return values(jax.lax.while_loop(lambda s: jnp.any(going(s)), step, init))


def _where(active: Any, new: Any, old: Any, form: Form | None) -> Any:
    """New values for the examples, along leading axes, that go on."""
    for axis in range(active.ndim):
        if form is not None and (keep := form.keep[axis]) is not None:
            active = jnp.take(active, keep, axis)
    return jnp.where(active.reshape(active.shape + (1,) * (new.ndim - active.ndim)), new, old)


def cond(domain: Any, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
    bodies = [_Body(domain, g, inputs) for g in node.params["branches"]]
    forms: list[Form | None] | None = None
    for body in bodies:
        found = body.forms([], [])
        forms = (
            found if forms is None else [a if a is None or b is None else joined(a, b) for a, b in zip(forms, found)]
        )
    assert forms is not None
    chosen = forms

    def branch(body: _Body) -> Callable[[], Any]:
        return lambda: tuple(
            _typed(array_in(r, f), a) for r, f, a in zip(body(), chosen, body.graph.out_avals, strict=True)
        )

    which = dense(index)
    which = which.astype(jnp.int32) if which.dtype == bool else which
    arrays = jax.lax.switch(which, [branch(b) for b in bodies])
    return [value_in(f, a) for f, a in zip(chosen, arrays)]


def remat(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """The body is computed again where derivatives need it, as in the whole program."""
    p = node.params
    values = [settled(domain, x) for x in inputs]
    body = _Body(domain, p["body"])
    out: list[Form | None] = []

    def fun(*arrays: Any) -> Any:
        results = body(*(x if _is_known(x) else like(x, a) for x, a in zip(values, arrays)))
        out[:] = map(form_of, results)
        return tuple(r.array if isinstance(r, Sliced) else r for r in results)

    call = jax.checkpoint(fun, prevent_cse=p["prevent_cse"], policy=p["policy"])
    arrays = call(*(x.array if isinstance(x, Sliced) else x for x in values))
    return [value_in(f, a) for f, a in zip(out, arrays)]


def _is_known(x: Any) -> bool:
    return isinstance(x, Sliced) and x.known


def like(x: Any, array: Any) -> Any:
    """A value that misses what another one does, with its own array."""
    form = form_of(x)
    return array if form is None else form.value(array)
