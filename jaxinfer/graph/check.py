"""Checks that a graph is well formed; run at pass boundaries."""

from __future__ import annotations

from jaxinfer import _jax
from jaxinfer.graph.node import Graph, Node, Value


class GraphError(Exception):
    """A graph breaks one of its own rules: a defect of the pass that built it, never of the user's program."""


def check(graph: Graph) -> None:
    """Checks a graph and the graphs nested in it.

    Every operand is a constant, an input, or a result of an earlier node; loop bodies give back their carries' types;
    branches agree; outputs have the shape and dtype that were promised.

    Raises:
        GraphError: naming the node and the user's source line.
    """
    available: set[Node] = set(graph.inputs)
    for node in graph.nodes:
        for value in node.inputs:
            _require(
                value.node.is_const or value.node in available,
                node,
                f"uses {value.node!r} before it is computed",
            )
            _require(value.index < len(value.node.avals), node, f"uses result {value.index} of {value.node!r}")
        _check_nested(node)
        available.add(node)
    for value, aval in zip(graph.outputs, graph.out_avals, strict=True):
        known = value.node.is_const or value.node in available
        _require(known, value.node, "is an output but never computed")
        _require(_jax.same_type(value.aval, aval), value.node, f"is an output of type {value.aval}, not {aval}")


def _check_nested(node: Node) -> None:
    for sub in node.subgraphs:
        check(sub)
    if node.op == "scan":
        body, consts, carries = node.params["body"], node.params["num_consts"], node.params["num_carry"]
        _require(len(body.inputs) == len(node.inputs), node, "and its body take different numbers of operands")
        _same(node, [n.aval for n in body.inputs[consts : consts + carries]], body.out_avals[:carries])
        _same(node, _types(node.inputs[: consts + carries]), [n.aval for n in body.inputs[: consts + carries]])
    elif node.op == "while":
        body, consts = node.params["body"], node.params["body_nconsts"]
        _same(node, [n.aval for n in body.inputs[consts:]], body.out_avals)
    elif node.op == "cond":
        for branch in node.params["branches"]:
            _same(node, _types(node.inputs[1:]), [n.aval for n in branch.inputs])
            _same(node, node.avals, branch.out_avals)


def _types(values: tuple[Value, ...]) -> list[object]:
    return [v.aval for v in values]


def _same(node: Node, have: object, want: object) -> None:
    pairs = list(zip(have, want, strict=True))  # type: ignore[call-overload]
    _require(all(_jax.same_type(a, b) for a, b in pairs), node, f"has operands or results of other types: {pairs}")


def _require(condition: bool, node: Node, what: str) -> None:
    if not condition:
        where = _jax.source_line(node.source)
        raise GraphError(f"{node!r}{f' from {where}' if where else ''} {what}")
