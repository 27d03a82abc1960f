"""Function → graph.

Plain calls are inlined; control flow becomes nodes that hold graphs; what is not known passes through as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxinfer import _jax
from jaxinfer.graph.node import Graph, GraphBuilder, Value


def trace(
    jaxpr: Any, known: Mapping[int, Any] | None = None, *, keep_custom: bool = False, known_inside: bool = False
) -> Graph:
    """The graph of a closed jaxpr.

    Args:
        jaxpr: a closed jaxpr.
        known: arrays for some of the arguments, by position; those become constants and are no inputs of the graph.
        keep_custom: keep ``custom_jvp``/``custom_vjp`` calls as opaque nodes, and rematerialised ones as nodes that
            hold a graph, instead of inlining the function they wrap. Inlining is right only for a program that will
            not be differentiated any more.
        known_inside: constants that a loop is given become constants of its body. JAX itself makes operands of
            whatever a loop closes over, so a program traced again has them outside.

    Returns:
        A graph with one input for each argument that is not known.
    """
    known = known or {}
    open_, consts = _jax.open_jaxpr(jaxpr)
    builder = GraphBuilder()
    arguments = [
        builder.const(known[i], v.aval) if i in known else builder.input(v.aval) for i, v in enumerate(open_.invars)
    ]
    outputs = splice(builder, open_, consts, arguments, keep_custom=keep_custom, known_inside=known_inside)
    return builder.build(outputs, origin=None if known else jaxpr, out_avals=[v.aval for v in open_.outvars])


def trace_function(fun: Callable[..., Any], *avals: Any, keep_custom: bool = False) -> Graph:
    """The graph of a function of flat array arguments that returns a flat sequence of arrays."""
    return trace(_jax.make_jaxpr(fun, avals), keep_custom=keep_custom)


def splice(
    builder: GraphBuilder,
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Value],
    *,
    keep_custom: bool = False,
    known_inside: bool = False,
    outer: Any = None,
) -> list[Value]:
    """Adds the equations of an open jaxpr to a graph under construction.

    Args:
        builder: where the nodes go.
        jaxpr: an open jaxpr.
        consts: values of ``jaxpr.constvars``.
        arguments: values of ``jaxpr.invars``.
        keep_custom: as in :func:`trace`.
        known_inside: as in :func:`trace`.
        outer: source info of the call being inlined, whose name stack encloses the equations'.

    Returns:
        The values of ``jaxpr.outvars``.
    """
    env: dict[Any, Value] = dict(zip(jaxpr.invars, arguments))
    env.update((v, builder.const(c, v.aval)) for v, c in zip(jaxpr.constvars, consts))

    def read(atom: Any) -> Value:
        return builder.const(atom.val, atom.aval) if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(a) for a in eqn.invars]
        source = _jax.nested_source(outer, eqn.source_info)
        body = _inlined_body(_jax.operation(eqn.primitive), eqn.params, keep_custom)
        if body is not None:
            inner, inner_consts = _jax.open_jaxpr(body)
            options = {"keep_custom": keep_custom, "known_inside": known_inside, "outer": source}
            results = splice(builder, inner, inner_consts, inputs, **options)
        else:
            op = _jax.operation(eqn.primitive)
            inside = _known_operands(op, eqn.params, inputs) if known_inside else {}
            node = builder.apply(
                eqn.primitive,
                _structured(op, eqn.params, keep_custom, known_inside, inside),
                [v for i, v in enumerate(inputs) if i not in inside],
                [v.aval for v in eqn.outvars],
                frozenset(eqn.effects),
                eqn.ctx,
                source,
            )
            results = [Value(node, i) for i in range(len(node.avals))]
        env.update(zip(eqn.outvars, results))
    return [read(v) for v in jaxpr.outvars]


def _inlined_body(op: str, params: Mapping[str, Any], keep_custom: bool) -> Any:
    """The jaxpr to inline for a call that means nothing but its body, else None."""
    if op == "jit":
        return params["jaxpr"] if _jax.is_inlinable_call(dict(params)) else None
    if op == "remat":
        # After differentiation, rematerialisation is what keeps memory down; before it, the call is transparent.
        return None if params["differentiated"] or keep_custom else params["jaxpr"]
    if op in ("closed_call", "core_call"):
        return params["call_jaxpr"] if "call_jaxpr" in params else params.get("jaxpr")
    if op == "optimized_call":
        return params["jaxpr"]
    if op in ("custom_jvp_call", "custom_vjp_call") and not keep_custom:
        return params["call_jaxpr"] if "call_jaxpr" in params else params.get("fun_jaxpr")
    return None


def _known_operands(op: str, params: Mapping[str, Any], inputs: Sequence[Value]) -> Mapping[int, Any]:
    """The loop constants among the operands of an equation whose arrays are known, by position."""
    count = 0
    if op == "scan":
        count = _jax.scan_counts(dict(params))[0]
    elif op == "while":
        count = params["cond_nconsts"] + params["body_nconsts"]
    return {i: v.node.value for i, v in enumerate(inputs[:count]) if v.node.is_const}


def _structured(
    op: str, params: Mapping[str, Any], keep_custom: bool, known_inside: bool, inside: Mapping[int, Any]
) -> Mapping[str, Any]:
    """Parameters in the graph's own form: graphs instead of jaxprs, the same names in every JAX version.

    ``_original`` holds JAX's own parameters, which are bound again as long as the graphs are untouched. ``inside`` are
    the arrays of operands that become constants of the loop's body.
    """

    def graph(jaxpr: Any, known: Mapping[int, Any] | None = None) -> Graph:
        return trace(_jax.close_jaxpr(jaxpr), known, keep_custom=keep_custom, known_inside=known_inside)

    if op == "scan":
        consts, carries = _jax.scan_counts(dict(params))
        return {
            "body": graph(params["jaxpr"], inside),
            "num_consts": consts - len(inside),
            "num_carry": carries,
            "length": params["length"],
            "reverse": params["reverse"],
            "unroll": params["unroll"],
            "_original": params,
        }
    if op == "while":
        count = params["cond_nconsts"]
        for_cond = {i: x for i, x in inside.items() if i < count}
        for_body = {i - count: x for i, x in inside.items() if i >= count}
        return {
            "cond": graph(params["cond_jaxpr"], for_cond),
            "body": graph(params["body_jaxpr"], for_body),
            "cond_nconsts": count - len(for_cond),
            "body_nconsts": params["body_nconsts"] - len(for_body),
            "_original": params,
        }
    if op == "cond":
        return {"branches": tuple(graph(b) for b in params["branches"]), "_original": params}
    if op == "remat":
        options = {k: params[k] for k in ("prevent_cse", "differentiated", "policy")}
        return {"body": graph(params["jaxpr"]), **options, "_original": params}
    return params
