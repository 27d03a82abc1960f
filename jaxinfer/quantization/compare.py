"""What each product of a quantized program errs by, when it is fed with what the original one is fed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.weights import Weights, bound, carries_of, loop_options, run_on
from jaxinfer.graph import Graph, Node
from jaxinfer.graph.retrace import is_data, split
from jaxinfer.quantization.calibrate import CalibrationError, arguments
from jaxinfer.quantization.layers import product_positions
from jaxinfer.quantization.program import OnCodes, QuantizedProgram, Treated
from jaxinfer.quantization.tensor import Quantized


class ProductError(NamedTuple):
    """What one product errs by.

    Attributes:
        name: key path of its parameter.
        position: its number in the program.
        error: Σ (Ŷ − Y)² over all entries of all batches; Y = X W is the original product, Ŷ the quantized one of the
            same X.
        size: Σ Y².
    """

    name: str
    position: int
    error: float
    size: float


def product_errors(
    program: QuantizedProgram, quantized: Any, params: Any, batches: Iterable[Any]
) -> tuple[ProductError, ...]:
    """Compares every quantized product with the original one, on the inputs that it has in the original program.

    So errors do not add up from layer to layer, and what one method does to a layer can be compared with another's.

    Args:
        program, quantized: what ``quantize`` returned.
        params: the parameters that it was given.
        batches: each a tuple of the further arguments, or the only one.

    Returns:
        In the order of the program; those in loops over all steps.

    Raises:
        CalibrationError: there is no batch.
    """
    originals = [jnp.asarray(x) for x in jax.tree.leaves(params) if is_data(x)]
    values = program.values(quantized)
    runs: dict[Any, Any] = {}
    sums: dict[int, np.ndarray] = {}
    for batch in batches:
        given, static = split((params, arguments(batch), {}))
        others = given[len(originals) :]
        kind = (static, *(_jax.type_key(x) for x in others))
        if kind not in runs:
            graph, _ = program.program.trace([*originals, *others], static, keep_custom=True)
            runs[kind] = jax.jit(_comparison(program, graph))
        for position, found in runs[kind](values, originals, others).items():
            sums[position] = sums.get(position, np.zeros(2)) + np.asarray(found, np.float64)
    if not sums:
        raise CalibrationError("no batch, or no quantized product to compare")
    names = {p: program.names[t.leaf] for p, t in program.treated.items()}
    return tuple(ProductError(names[p], p, float(e), float(s)) for p, (e, s) in sorted(sums.items()))


def _comparison(program: QuantizedProgram, graph: Graph) -> Any:
    positions = product_positions(graph)

    def run(values: Sequence[Any], originals: Sequence[Any], others: Sequence[Any]) -> dict[int, Any]:
        domain = _Comparing(graph, program.treated, program.names, positions, originals)
        inputs = [Weights.of(i, x) if program.is_held(x) else x for i, x in enumerate(values)]
        run_on(graph, domain, [*inputs, *others])
        return domain.sums

    return run


class _Comparing(OnCodes):
    """Runs the original program, and beside each of its quantized products the quantized one."""

    def __init__(
        self,
        graph: Graph,
        treated: Mapping[int, Treated],
        names: Sequence[str],
        positions: Mapping[Node, int],
        originals: Sequence[Any],
    ) -> None:
        super().__init__(graph, treated, names)
        # No value is rounded but where it is compared.
        self._wanted = {}
        self._all = (graph, treated, names, positions, originals)
        self._positions, self._originals = positions, originals
        self.sums: dict[int, Any] = {}

    def array(self, weights: Weights) -> Any:
        return weights.move(self._originals[weights.leaf])

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        w, x = self.array(weights), self.other(x)
        exact = bound(node, [x, w] if side else [w, x])
        if isinstance(weights.value, Quantized):
            written = super().product(node, side, weights, x)
            pair = (written.astype(jnp.float32) - exact, exact.astype(jnp.float32))
            self.sums[self._positions[node]] = jnp.stack([jnp.sum(jnp.square(part)) for part in pair])
        return exact

    def loop(self, node: Node, inputs: Sequence[Any]) -> list[Any]:
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        body: Graph = node.params["body"]

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            inner = _Comparing(*self._all)
            out = inner.body(body)(*inputs[:consts], *carry, *xs)
            return tuple(out[:carries]), (tuple(out[carries:]), inner.sums)

        first = carries_of(node, inputs)
        carry, (ys, sums) = lax.scan(step, first, tuple(inputs[consts + carries :]), **loop_options(node))
        self.sums.update((position, found.sum(0)) for position, found in sums.items())
        return [*carry, *ys]
