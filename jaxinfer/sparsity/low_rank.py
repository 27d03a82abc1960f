"""``autoinfer.low_rank``: weights become two thin factors where that is accurate enough and measures faster.

With X the rows that a product multiplies its weights W with, the best factors of a rank are those that make
‖X(W − L R)‖ least: with XᵀX = C Cᵀ, the truncated singular value decomposition of Cᵀ W, its left factor multiplied
with C⁻ᵀ.

Reference: Wang, Zheng, Wan and Zhang, "SVD-LLM: truncation-aware singular value decomposition for large language model
compression", ICLR 2025.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxinfer import _jax
from jaxinfer.analysis.matrices import matrix_of
from jaxinfer.analysis.reparametrized import Reparametrized
from jaxinfer.analysis.weights import Read, Weights, bound, run_on
from jaxinfer.graph import Graph, Node
from jaxinfer.graph.retrace import Parameters, Program, Static, split
from jaxinfer.search.measure import time_candidates
from jaxinfer.sparsity.errors import ShrinkError
from jaxinfer.sparsity.factors import (
    Factors,
    FactorsError,
    Gathering,
    OnFactors,
    factors_of,
    with_factors,
)

# A matrix of more rows than this has a Gram matrix too large to decompose in reasonable time.
_MOST_ROWS = 4608
# Faster by less than this is within the noise; estimated, it takes more to be sure.
_MARGIN = {"auto": 0.95, "off": 0.8}
# Of the mean square of the inputs, added to all of them: directions that calibration never saw still count a little.
_DAMPING = 1e-6


@dataclass(frozen=True)
class LayerRank:
    """What became of one parameter.

    Attributes:
        name: its key path.
        shape: [summed, kept], as the matrix it is.
        rank: of its factors; None where it was left as it was.
        error: ‖X(W − L R)‖ / ‖X W‖ over the calibration data, at the least rank within the budget.
        before_s, after_s: seconds of the product, and of the two in its place; None where not timed.
        reason: why it was left, or "".
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    error: float | None
    before_s: float | None
    after_s: float | None
    reason: str


@dataclass(frozen=True)
class LowRankReport:
    """What became of each parameter that a product reads."""

    layers: tuple[LayerRank, ...]

    def table(self) -> Table:
        """The layers as a table."""
        table = Table(title="Weights in two factors")
        for heading in ("parameter", "summed × kept", "rank", "error", "before", "after", ""):
            table.add_column(heading, justify="left" if heading in ("parameter", "") else "right")
        for layer in self.layers:
            table.add_row(
                layer.name,
                "×".join(map(str, layer.shape)),
                "whole" if layer.rank is None else str(layer.rank),
                "" if layer.error is None else f"{layer.error:.3f}",
                _microseconds(layer.before_s),
                _microseconds(layer.after_s),
                layer.reason,
            )
        return table


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.0f} µs"


class LowRank(Reparametrized):
    """A program some of whose parameters are :class:`Factors`; called like the original, with the new parameters.

    Attributes:
        program: the original.
        names: key paths of the parameters.
        factored: positions of those that are factored.
        report: what became of each parameter.
    """

    form = Factors

    def __init__(self, program: Program, names: Sequence[str], factored: frozenset[int], report: LowRankReport):
        super().__init__(program, names)
        self.factored, self.report = factored, report

    def domain(self, graph: Graph) -> OnFactors:
        return OnFactors()

    def values(self, params: Any) -> list[Any]:
        found = super().values(params)
        for i, (name, x) in enumerate(zip(self.names, found)):
            if self.is_held(x) != (i in self.factored):
                raise ValueError(f"{name} is {'not ' if i in self.factored else ''}factored in this program")
        return found

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(params, *args, **kwargs)
        except FactorsError as error:
            raise ShrinkError(
                f"for arguments of these shapes the program reads {self.names[error.leaf]} otherwise than in the call "
                "it was factored for: factor it with such arguments"
            ) from error

    def explain(self) -> LowRankReport:
        """What became of each parameter, and why."""
        return self.report


def low_rank(
    fun: Callable[..., Any],
    params: Any,
    calibration: Iterable[Any],
    *,
    error: float = 0.1,
    multiple_of: int = 8,
    tune: Literal["auto", "off"] = "auto",
) -> tuple[LowRank, Any]:
    """Replaces weights of products and convolutions with two thin factors, where that measures faster.

    Each layer gets the least rank at which its results on the calibration data differ by no more than ``error``, as a
    share of their norm. Errors of layers add up: measure what the whole program loses.

    Args:
        fun: a function of a tree of parameters and further arguments.
        params: the parameters; arrays, not tracers.
        calibration: batches, each a tuple of the further arguments (or the only one, if it is an array).
        error: how much a layer may differ, 0 to 1.
        multiple_of: ranks are rounded up to multiples of this.
        tune: "auto" times each layer's product against the two in its place, at the shapes of the first batch; "off"
            compares multiply-accumulates.

    Returns:
        The program and its parameters: a tree like ``params`` in which :class:`Factors` stand for the arrays replaced.

    Raises:
        ValueError: for an error outside (0, 1), no batch, or calibration data that gives numbers that are not finite.
    """
    if not 0 < error < 1:
        raise ValueError(f"error={error}: it takes a share of the norm, more than 0 and less than 1")
    given = Parameters(params)
    names, arrays = given.names, given.arrays
    program = Program(fun, given.shapes, ShrinkError)
    gathered = _gather(program, params, arrays, calibration)
    ranked = {leaf: _Layer(names[leaf], arrays[leaf], *found) for leaf, found in sorted(gathered.items())}
    for layer in ranked.values():
        layer.settle(error, multiple_of, tune)
    found = {leaf: layer.factors for leaf, layer in ranked.items() if layer.factors is not None}
    new = given.with_arrays(found.get(i, jnp.asarray(x)) for i, x in enumerate(arrays))
    report = LowRankReport(tuple(layer.report for layer in ranked.values()))
    return LowRank(program, names, frozenset(found), report), new


# -- calibration ------------------------------------------------------------------------------------------------------


def _gather(
    program: Program, params: Any, arrays: Sequence[Any], calibration: Iterable[Any]
) -> Mapping[int, tuple[Node, int, Callable[[Any], Any], np.ndarray]]:
    """For each parameter that exactly one product reads: the product, its side, how it comes there, and its XᵀX."""
    reads: dict[int, dict[Node | None, Read]] = {}
    total: dict[int, np.ndarray] = {}
    runs: dict[Any, Callable[..., Any]] = {}
    for number, batch in enumerate(calibration):
        args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        given, static = split((params, args, {}))
        kind = (static, *(_jax.type_key(x) for x in given[len(arrays) :]))
        if kind not in runs:
            runs[kind] = jax.jit(functools.partial(_grams, program, static, reads if not runs else {}))
        grams = jax.device_get(runs[kind](given[: len(arrays)], given[len(arrays) :]))
        for leaf, gram in grams.items():
            if not np.isfinite(gram).all():
                raise ValueError(f"batch {number} of the calibration data gives numbers that are not finite")
            total[leaf] = total.get(leaf, 0.0) + gram.astype(np.float64)
    if not runs:
        raise ValueError("no calibration data: low_rank takes one batch at least")
    found = {}
    for leaf, by_node in reads.items():
        (node, (side, move)), *others = by_node.items()
        if node is not None and not others and leaf in total:
            found[leaf] = (node, side, move, total[leaf])
    return found


def _grams(program: Program, static: Static, reads: dict[int, Any], params: Any, others: Any) -> dict[int, Any]:
    graph, _ = program.trace([*params, *others], static, keep_custom=True)
    domain = Gathering(_MOST_ROWS)
    inputs = [Weights.of(i, x) if x.ndim > 1 else x for i, x in enumerate(map(jnp.asarray, params))]
    run_on(graph, domain, [*inputs, *others])
    reads.update(domain.reads)
    return domain.grams


# -- one layer --------------------------------------------------------------------------------------------------------


class _Layer:
    """A parameter, the product that reads it and what that is fed with."""

    def __init__(self, name: str, array: Any, node: Node, side: int, move: Callable[[Any], Any], gram: np.ndarray):
        self.name, self.node, self.side, self.gram = name, node, side, gram
        self.weights = move(jnp.asarray(array))
        self.dtype = np.dtype(array.dtype)
        self.factors: Factors | None = None
        self.report = LayerRank(name, (0, 0), None, None, None, None, "")

    def settle(self, error: float, multiple_of: int, tune: Literal["auto", "off"]) -> None:
        """Finds the factors and whether they are worth it."""
        matrix = np.asarray(matrix_of(self.node, self.side, self.weights), np.float64)
        rows, columns = matrix.shape
        whitened, root = _whitened(matrix, self.gram)
        u, s, vt = np.linalg.svd(whitened, full_matrices=False)
        tails = np.sqrt(np.append(np.cumsum((s**2)[::-1])[::-1], 0.0) / max(float(np.sum(s**2)), 1e-300))
        least = max(int(np.argmax(tails <= error)), 1)
        rank = min(-(-least // multiple_of) * multiple_of, len(s))
        share = rank * (rows + columns) / (rows * columns)
        before = after = None
        reason = ""
        if share >= 1:
            reason = f"rank {rank} is needed: two products would be more work"
        else:
            scale = np.sqrt(s[:rank])
            left = np.linalg.solve(root.T, u[:, :rank] * scale)
            factors = factors_of(self.node, self.side, left, scale[:, None] * vt[:rank])
            factors = Factors(*(jnp.asarray(f, self.dtype) for f in factors))
            if tune == "auto":
                before, after = self._timed(factors)
                share = after / before
            if share < _MARGIN[tune]:
                self.factors = factors
            else:
                reason = "not faster" if tune == "auto" else f"{share:.0%} of the work: too little is saved"
        self.report = LayerRank(
            self.name,
            (rows, columns),
            None if self.factors is None else rank,
            float(tails[rank]),
            before,
            after,
            reason,
        )

    def _timed(self, factors: Factors) -> list[float]:
        rng = np.random.default_rng(0)
        other = self.node.inputs[1 - self.side]
        x = jnp.asarray(rng.normal(size=other.shape), other.dtype)

        def whole(x: Any, w: Any) -> Any:
            return bound(self.node, [x, w] if self.side else [w, x])

        def thin(x: Any, f: Factors) -> Any:
            return with_factors(self.node, self.side, x, f)

        forms = [functools.partial(jax.jit(whole), x, self.weights), functools.partial(jax.jit(thin), x, factors)]
        return time_candidates(forms, budget_s=1.0)


def _whitened(matrix: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cᵀ W and C, where C Cᵀ is the Gram matrix, damped so that it has an inverse."""
    damping = _DAMPING * max(float(np.trace(gram)) / len(gram), 1e-30)
    while True:
        try:
            root = np.linalg.cholesky(gram + damping * np.eye(len(gram)))
            return root.T @ matrix, root
        except np.linalg.LinAlgError:
            damping *= 10
