"""One interpreter, many domains.

``interpret`` walks a graph once; a :class:`Domain` says what flows along the edges. Running the program, emitting it,
counting its cost, finding what depends on what: each is a domain with a table ``operation -> rule`` and a default, so a
new primitive is a table entry and never a change here. Control flow is handled once, below, for every domain that can
join two values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from jaxinfer.graph.node import Graph, Node, Value

T = TypeVar("T")
Transfer = Callable[..., Sequence[Any]]


class Domain(Generic[T]):
    """What flows along the edges of a graph.

    A rule is called as ``rule(domain, node, *inputs)`` and returns one value for each result of the node. Domains over
    abstract values define ``join`` (and ``element``/``stack`` where a scanned array differs from its steps) and get
    loops and branches for nothing: bodies are interpreted until carries no longer change.
    """

    rules: ClassVar[Mapping[str, Transfer]] = {}

    def constant(self, node: Node) -> T:
        """The value of a known array."""
        raise NotImplementedError(f"{type(self).__name__} says nothing about constants")

    def default(self, node: Node, *inputs: T) -> Sequence[T]:
        """The results of an operation without a rule of its own."""
        raise NotImplementedError(f"{type(self).__name__} has no rule for {node.op!r}")

    def join(self, a: T, b: T) -> T:
        """The least value that describes both ``a`` and ``b``; must reach a fixpoint when repeated."""
        raise NotImplementedError(f"{type(self).__name__} cannot join values: give it rules for control flow")

    def element(self, value: T) -> T:
        """One step of a scanned array."""
        return value

    def stack(self, value: T) -> T:
        """The array made of the values of all steps."""
        return value

    # -- control flow, for every abstract domain --

    def scan(self, node: Node, *inputs: T) -> Sequence[T]:
        """Carries are joined over steps until they stay the same."""
        body, consts = node.params["body"], node.params["num_consts"]
        carries = node.params["num_carry"]
        fixed, carry = list(inputs[:consts]), list(inputs[consts : consts + carries])
        steps = [self.element(x) for x in inputs[consts + carries :]]
        while True:
            out = interpret(body, self, *fixed, *carry, *steps)
            joined = [self.join(a, b) for a, b in zip(carry, out[:carries])]
            if joined == carry:
                return [*carry, *(self.stack(y) for y in out[carries:])]
            carry = joined

    def while_loop(self, node: Node, *inputs: T) -> Sequence[T]:
        """Carries are joined over iterations until they stay the same; the condition is only looked at."""
        cond_consts, body_consts = node.params["cond_nconsts"], node.params["body_nconsts"]
        for_cond, for_body = inputs[:cond_consts], inputs[cond_consts : cond_consts + body_consts]
        carry = list(inputs[cond_consts + body_consts :])
        while True:
            interpret(node.params["cond"], self, *for_cond, *carry)
            out = interpret(node.params["body"], self, *for_body, *carry)
            joined = [self.join(a, b) for a, b in zip(carry, out)]
            if joined == carry:
                return carry
            carry = joined

    def cond(self, node: Node, index: T, *inputs: T) -> Sequence[T]:
        """What any branch may give."""
        results = [list(interpret(branch, self, *inputs)) for branch in node.params["branches"]]
        joined = results[0]
        for other in results[1:]:
            joined = [self.join(a, b) for a, b in zip(joined, other)]
        return joined

    def remat(self, node: Node, *inputs: T) -> Sequence[T]:
        """A rematerialised call computes its body."""
        return interpret(node.params["body"], self, *inputs)


_CONTROL_FLOW: Mapping[str, str] = {"scan": "scan", "while": "while_loop", "cond": "cond", "remat": "remat"}


def interpret(graph: Graph, domain: Domain[T], *inputs: T) -> list[T]:
    """Walks a graph in a domain.

    Args:
        graph: the program.
        domain: what flows along its edges.
        *inputs: the domain's values for ``graph.inputs``.

    Returns:
        The domain's values for ``graph.outputs``.

    Raises:
        ValueError: if the number of inputs is not the graph's.
    """
    if len(inputs) != len(graph.inputs):
        raise ValueError(f"the graph takes {len(graph.inputs)} inputs, {len(inputs)} were given")
    results: dict[Node, Sequence[T]] = {node: (x,) for node, x in zip(graph.inputs, inputs)}

    def read(value: Value) -> T:
        if value.node not in results and value.node.is_const:
            results[value.node] = (domain.constant(value.node),)
        return results[value.node][value.index]

    for node in graph.nodes:
        operands = [read(v) for v in node.inputs]
        if (rule := domain.rules.get(node.op)) is not None:
            results[node] = rule(domain, node, *operands)
        elif node.op in _CONTROL_FLOW:
            results[node] = getattr(domain, _CONTROL_FLOW[node.op])(node, *operands)
        else:
            results[node] = domain.default(node, *operands)
    return [read(v) for v in graph.outputs]
