"""Loops and branches in reverse mode.

A body and its pullback are traced together as one program and split: what depends on cotangents waits. Of the rest,
what the waiting part reads is kept: values that change from step to step as rows of a new result of the loop; rows of
xs and ys, a carry that was a row of ys the step before, and loop constants are there anyway, what depends on constants
alone is computed once, and what follows from kept values by a few cheap operations is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.loops import cut
from jaxinfer.differentiation.activity import active_outputs, useful_inputs
from jaxinfer.differentiation.forward import branch_index, carried_activity
from jaxinfer.differentiation.rules import add, filled, zeros_of
from jaxinfer.differentiation.split import Split, split
from jaxinfer.graph import Graph, Node, Value, run, trace_function
from jaxinfer.graph.emit import Emit

# vjp(graph, weights, active, useful, *inputs) -> (outputs, pullback), as in reverse.py.
Vjp = Callable[..., tuple[list[Any], Callable[[Sequence[Any]], Sequence[Any]]]]


def joint(
    vjp: Vjp,
    body: Graph,
    active: Sequence[bool],
    live: Sequence[bool],
    wanted: Sequence[bool],
    free: Collection[int],
    steady: Collection[int] = (),
) -> Split:
    """A body and its pullback, in two stages.

    Args:
        vjp: reverse mode.
        body: the program.
        active: which of its inputs are differentiated.
        live: which of its outputs get a cotangent.
        wanted: which inputs' cotangents are asked for; zeros are filled in where nothing comes back.
        free: positions of inputs that can be read again at no cost.
        steady: positions of inputs that are the same in all steps.

    Returns:
        Early: inputs → outputs, residuals. Late: what it keeps and the live cotangents → the wanted cotangents.
    """
    count = len(body.inputs)

    def both(*args: Any) -> list[Any]:
        given = iter(args[count:])
        outs, pull = vjp(body, {}, active, live, *args[:count])
        back = pull([next(given) if a else None for a in live])
        return [*outs, *(filled(ct, x) for ct, x, w in zip(back, args, wanted) if w)]

    cotangents = [a for a, is_live in zip(body.out_avals, live) if is_live]
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cotangents]
    graph = trace_function(both, *(n.aval for n in body.inputs), *structs, keep_custom=True)
    return split(graph, count, len(body.outputs), free, steady)


# -- scan -------------------------------------------------------------------------------------------------------------


def scan(
    vjp: Vjp, emit: Emit, node: Node, primals: Sequence[Any], active: Sequence[bool], useful: Sequence[bool]
) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """A loop and its pullback.

    Args:
        vjp: reverse mode.
        emit: runs graphs with the caller's weights.
        node: the loop.
        primals: its operands.
        active: which operands are differentiated.
        useful: which results may get a cotangent.
    """
    body, consts, carries = node.params["body"], node.params["num_consts"], node.params["num_carry"]
    first, last = consts, consts + carries
    moves, out_moves = carried_activity(body, active, consts, carries)
    live = _live_outputs(body, moves, [u and m for u, m in zip(useful, out_moves)], consts, carries)
    wanted = [m and (i < first or i >= last or live[i - first]) for i, m in enumerate(moves)]
    free = [i for i in range(len(body.inputs)) if not first <= i < last]
    parts = joint(vjp, body, moves, live, wanted, free, range(consts))

    count, fixed, length = len(node.avals), list(primals[:consts]), node.params["length"]
    options = {"length": length if isinstance(length, int) else None, "unroll": node.params["unroll"]}
    shown = _shown(parts.early.outputs, count, carries)
    plan, once = _plan(parts, count, consts, carries, shown)
    constants = run(_residuals(parts, count, once, consts), emit.weights, *fixed)
    forward, backward = emit.body(parts.early), emit.body(parts.late)

    def pick(kind: str, values: Sequence[Any]) -> list[Any]:
        return [values[i] for k, i in plan if k == kind]

    def step(carry: Any, row: Any) -> tuple[Any, Any]:
        found = forward(*fixed, *carry, *row)
        return found[:carries], (found[carries:count], pick("carry", carry), pick("residual", found[count:]))

    init = [_jax.with_aval(x, n.aval) for x, n in zip(primals[first:last], body.inputs[first:last])]
    with _jax.at_source(node.source, node.context):
        final, (ys, before, kept) = lax.scan(step, init, primals[last:], reverse=node.params["reverse"], **options)
    outs = [*final, *ys]
    earlier = [
        _step_before(ys[shown[i]], x, node.params["reverse"]) if i in shown else None for i, x in enumerate(init)
    ]
    rows = {
        "row": pick("row", primals[last:]),
        "y": pick("y", ys),
        "y before": pick("y before", earlier),
        "carry": before,
        "residual": kept,
    }

    def back_step(carry: Any, row: Any) -> tuple[Any, Any]:
        (totals, moving), (values, ct_rows) = carry, row
        sources = {
            "fixed": iter(pick("fixed", fixed)),
            "once": iter(constants),
            **{k: iter(v) for k, v in values.items()},
        }
        operands = [next(sources[kind]) for kind, _ in plan]
        back = iter(backward(*operands, *(ct for ct in (*moving, *ct_rows) if ct is not None)))
        found = [next(back) if w else None for w in wanted]
        totals = [add(total, ct) for total, ct in zip(totals, found)]
        return (totals, found[first:last]), found[last:]

    def pull(cotangents: Sequence[Any]) -> list[Any]:
        given = [filled(ct, x) if is_live else None for ct, x, is_live in zip(cotangents, outs, live)]
        start = ([zeros_of(x) if w else None for x, w in zip(fixed, wanted)], given[:carries])
        (totals, moving), back_rows = lax.scan(
            back_step, start, (rows, given[carries:]), reverse=not node.params["reverse"], **options
        )
        return [*totals, *moving, *back_rows]

    return outs, pull


def _shown(outputs: Sequence[Value], count: int, carries: int) -> dict[int, int]:
    """The carries whose new value is a row of ys as well, and which one.

    Args:
        outputs: what a step gives: carries, rows of ys, and what is kept.
        count: number of carries and rows of ys.
        carries: number of carries.
    """
    ys = {v: i for i, v in reversed(list(enumerate(outputs[carries:count])))}
    return {i: ys[v] for i, v in enumerate(outputs[:carries]) if v in ys and not _jax.is_extended(v.dtype)}


def _step_before(ys: Any, first: Any, reverse: bool) -> Any:
    """What a carry was before each step, where ys is what it was after it."""
    parts, start = ([ys, first[None]], 1) if reverse else ([first[None], ys], 0)
    # Written once: XLA would join the parts again in everything that reads them, element by element.
    return lax.optimization_barrier(lax.slice_in_dim(lax.concatenate(parts, 0), start, start + ys.shape[0]))


def _plan(
    parts: Split, count: int, consts: int, carries: int, shown: Collection[int]
) -> tuple[list[tuple[str, int]], set[int]]:
    """Where each operand that the late stage keeps comes from.

    Args:
        parts: the body and its pullback.
        count: number of the body's results.
        consts: number of loop constants.
        carries: number of carries.
        shown: the carries that are rows of ys in the next step.

    Returns:
        A kind and a position for each: a loop constant (fixed), a row of xs (row) or of ys (y), a carry before the step
        that was a row of ys (y before), which are there anyway, another carry before the step (carry), something else
        of the step (residual), or what is the same in all steps (once); and the positions of the last among the
        residuals.
    """
    once = _computed_once(parts, count, consts)
    ys = {v: i for i, v in reversed(list(enumerate(parts.early.outputs[carries:count])))}
    plan = []
    for i in parts.again:
        value = Value(parts.early.inputs[i], 0)
        if i < consts:
            plan.append(("fixed", i))
        elif i >= consts + carries:
            plan.append(("row", i - consts - carries))
        elif value in ys:
            plan.append(("y", ys[value]))
        else:
            plan.append(("y before" if i - consts in shown else "carry", i - consts))
    for i, value in enumerate(parts.early.outputs[count:]):
        plan.append(("once", i) if i in once else ("y", ys[value]) if value in ys else ("residual", i))
    return plan, once


def _live_outputs(body: Graph, moves: Sequence[bool], live: Sequence[bool], consts: int, carries: int) -> list[bool]:
    """Which results of a body get a cotangent in some step: a carry gets one where a later step gives it back."""
    outputs = list(live)
    while True:
        needed = useful_inputs(body, outputs)
        carried = slice(consts, consts + carries)
        grown = [a or (n and m) for a, n, m in zip(outputs, needed[carried], moves[carried])]
        if grown == outputs[:carries]:
            return outputs
        outputs[:carries] = grown


def _computed_once(parts: Split, outputs: int, consts: int) -> set[int]:
    """The residuals that depend on loop constants alone."""
    changing: set[Node] = set(parts.early.inputs[consts:])
    for node in parts.early.nodes:
        if not node.is_pure or any(v.node in changing for v in node.inputs):
            changing.add(node)
    return {i for i, v in enumerate(parts.early.outputs[outputs:]) if v.node not in changing}


def _residuals(parts: Split, outputs: int, which: set[int], consts: int) -> Graph:
    """The program that computes some of the residuals from loop constants."""
    values = [v for i, v in enumerate(parts.early.outputs[outputs:]) if i in which]
    return cut(values, [Value(n, 0) for n in parts.early.inputs[:consts]])


# -- cond -------------------------------------------------------------------------------------------------------------


def cond(
    vjp: Vjp, emit: Emit, node: Node, primals: Sequence[Any], active: Sequence[bool], useful: Sequence[bool]
) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """A choice between programs and its pullback; the arguments are those of :func:`scan`.

    Residuals of all branches share places by type, and places that the branch taken does not need hold zeros.
    """
    branches, index, operands = node.params["branches"], branch_index(primals[0]), list(primals[1:])
    wanted, count = list(active[1:]), len(node.avals)
    moves = [any(found) for found in zip(*(active_outputs(b, wanted) for b in branches))]
    live = [u and m for u, m in zip(useful, moves)]
    parts = [joint(vjp, branch, wanted, live, wanted, range(len(operands))) for branch in branches]
    types, places = _places(parts)

    def taken(part: Split, mine: Sequence[int]) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            found = emit.body(part.early)(*args)
            kept = dict(zip(mine, found[count:]))
            return found[:count], [
                kept[i] if i in kept else lax.full(shape, 0, dtype) for i, (shape, dtype) in enumerate(types)
            ]

        return forward

    with _jax.at_source(node.source, node.context):
        outs, kept = lax.switch(index, [taken(p, m) for p, m in zip(parts, places)], *operands)

    def back(part: Split, mine: Sequence[int]) -> Callable[..., Any]:
        def late(held: Any, given: Any) -> Any:
            return emit.body(part.late)(*(operands[i] for i in part.again), *(held[i] for i in mine), *given)

        return late

    def pull(cotangents: Sequence[Any]) -> list[Any]:
        given = [filled(ct, x) for ct, x, is_live in zip(cotangents, outs, live) if is_live]
        found = iter(lax.switch(index, [back(p, m) for p, m in zip(parts, places)], kept, given))
        return [None, *(next(found) if w else None for w in wanted)]

    return outs, pull


def _places(parts: Sequence[Split]) -> tuple[list[tuple[Any, Any]], list[list[int]]]:
    """Types of the places for residuals, and the places of each branch's residuals."""
    types: list[tuple[Any, Any]] = []
    places: list[list[int]] = []
    for part in parts:
        free = list(range(len(types)))
        mine = []
        for value in part.residuals:
            kind = (value.shape, value.dtype)
            place = next((i for i in free if types[i] == kind), None)
            if place is None:
                place = len(types)
                types.append(kind)
            else:
                free.remove(place)
            mine.append(place)
        places.append(mine)
    return types, places


# -- while ------------------------------------------------------------------------------------------------------------


def refuse_while(node: Node, active: Sequence[bool], useful: set[Value]) -> None:
    """Stops where a result of a ``while`` loop would need a cotangent.

    Raises:
        ValueError: if a useful result depends on active operands.
    """
    n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
    _, out = carried_activity(node.params["body"], active[n_cond:], n_body, len(node.avals))
    if any(a and Value(node, i) in useful for i, a in enumerate(out)):
        raise ValueError(
            "Reverse-mode differentiation does not work for lax.while_loop or lax.fori_loop with dynamic start/stop "
            "values: how many steps would have to be kept is not known. Use lax.scan, or lax.fori_loop with static "
            f"start/stop, or forward mode (autoinfer.jvp). The loop: {_jax.source_line(node.source)}"
        )
