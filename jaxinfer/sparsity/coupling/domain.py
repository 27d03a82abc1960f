"""Which axes move together: the domain that follows the indices of parameters through a program.

Every axis of every parameter starts with an id for each of its indices, and operations say which indices of which
axes are one (see :mod:`jaxinfer.sparsity.coupling.index_sets`). Nothing here decides whether a program may shrink: that
is proved where it is shrunk. What is found here is which slices are worth removing together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxinfer import _jax
from jaxinfer.analysis.cost import trips
from jaxinfer.graph import Domain, Node, Value, interpret
from jaxinfer.graph.interpret import Transfer
from jaxinfer.sparsity.coupling import elementwise as coupling_elementwise
from jaxinfer.sparsity.coupling import moves as coupling_moves
from jaxinfer.sparsity.coupling import products as coupling_products
from jaxinfer.sparsity.coupling.elementwise import Axes
from jaxinfer.sparsity.coupling.index_sets import IndexSets, Vector, free, given, is_real


@dataclass(frozen=True, eq=False)
class Work:
    """What a product costs.

    Attributes:
        node: the product.
        macs: multiply-accumulates of all its runs.
        axes: what runs along the axes that the multiply-accumulates are spread over.
    """

    node: Node
    macs: float
    axes: tuple[Vector, ...]


class Coupling(Domain[Axes]):
    """Follows the indices of parameters.

    Attributes:
        units: what is known of them.
        work: the products met, the steps of the loops around them counted.
    """

    rules: ClassVar[Mapping[str, Transfer]] = {
        **coupling_elementwise.RULES,
        **coupling_products.RULES,
        **coupling_moves.RULES,
    }

    def __init__(self) -> None:
        self.units = IndexSets()
        self.work: list[Work] = []
        self._times = 1
        self._readers: dict[tuple[Value, int], Vector] = {}

    def constant(self, node: Node) -> Axes:
        known = _jax.is_concrete(node.value)
        return tuple(map(free if known else given, _shape(node.aval)))

    def default(self, node: Node, *inputs: Axes) -> Sequence[Axes]:
        for x in inputs:
            for vector in x:
                self.units.lock(vector, f"{node.op}, for which there is no rule")
        return [tuple(map(given, _shape(aval))) for aval in node.avals]

    def join(self, a: Axes, b: Axes) -> Axes:
        return tuple(map(self.units.unify, a, b))

    # -- what rules are made of --

    def meet(self, values: Sequence[Axes]) -> Axes:
        """The axes of values that are used alike."""
        return functools.reduce(self.join, values)

    def spread(self, x: Axes, shape: Sequence[int], op: str) -> Axes:
        """An operand's axes as those of a result of this shape: scalars and axes of length one are repeated."""
        if len(x) != len(shape):
            return tuple(map(free, shape))
        axes = []
        for vector, size in zip(x, shape):
            if len(vector) != size:
                self.units.lock(vector, f"{op} repeats it")
            axes.append(vector if len(vector) == size else free(size))
        return tuple(axes)

    def read(self, value: Value, axis: int, units: Vector) -> None:
        """Notes which units read an axis of data. A feature that is not read by one product is not read by any."""
        if is_real(units).any():
            before = self._readers.get((value, axis), free(len(units)))
            if len(before) == len(units):
                self._readers[value, axis] = self.units.unify(before, units)

    def record(self, node: Node, macs: float, axes: tuple[Vector, ...]) -> None:
        """Notes what a product costs."""
        self.work.append(Work(node, macs * self._times, tuple(v for v in axes if is_real(v).any())))

    # -- control flow --

    def scan(self, node: Node, *inputs: Axes) -> Sequence[Axes]:
        body, consts = node.params["body"], node.params["num_consts"]
        carries = node.params["num_carry"]
        fixed, start = inputs[:consts], inputs[consts : consts + carries]
        steps = []
        for x in inputs[consts + carries :]:
            self.units.lock(x[0], "the axis that a loop runs over")
            steps.append(x[1:])
        length = node.params["length"]
        carry, out = self._settled(start, lambda c: self._run(trips(node), body, *fixed, *c, *steps))
        return [*carry, *((given(length), *y) for y in out[carries:])]

    def while_loop(self, node: Node, *inputs: Axes) -> Sequence[Axes]:
        cond, body = node.params["cond"], node.params["body"]
        n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
        for_cond, for_body = inputs[:n_cond], inputs[n_cond : n_cond + n_body]

        def step(carry: Sequence[Axes]) -> list[Axes]:
            interpret(cond, self, *for_cond, *carry)
            return interpret(body, self, *for_body, *carry)

        return self._settled(inputs[n_cond + n_body :], step)[0]

    def cond(self, node: Node, index: Axes, *inputs: Axes) -> Sequence[Axes]:
        """Results of all branches go together; what runs is counted as the branch that costs most."""
        before, results, works = self.work, [], []
        for branch in node.params["branches"]:
            self.work = []
            results.append(interpret(branch, self, *inputs))
            works.append(self.work)
        self.work = [*before, *max(works, key=lambda work: sum(w.macs for w in work))]
        return [self.meet(found) for found in zip(*results)]

    def _run(self, times: int, body: Any, *inputs: Axes) -> list[Axes]:
        outside, self._times = self._times, self._times * times
        try:
            return interpret(body, self, *inputs)
        finally:
            self._times = outside

    def _settled(
        self, carry: Sequence[Axes], step: Callable[[Sequence[Axes]], list[Axes]]
    ) -> tuple[Sequence[Axes], list[Axes]]:
        """The carries of a loop that stay the same, and what its last step gives; earlier steps leave no notes."""
        works = len(self.work)
        while True:
            before = len(self.units.marks)
            out = step(carry)
            noted = len(self.units.marks)
            joined = [self.join(a, b) for a, b in zip(carry, out)]
            if all(map(self._same, carry, joined)):
                return joined, out
            # What a step noted of carries that were not all there yet may be wrong; what was joined is not.
            del self.units.marks[before:noted], self.work[works:]
            carry = joined

    def _same(self, a: Axes, b: Axes) -> bool:
        return all((self.units.roots(v) == self.units.roots(w)).all() for v, w in zip(a, b))


def _shape(aval: Any) -> tuple[int, ...]:
    return tuple(getattr(aval, "shape", ()))
