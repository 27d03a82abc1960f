"""Calibration: a program runs over batches, and what its products are fed with is noted.

A domain of the interpreter gathers the other operand of each product that reads a parameter, inside loops too; what is
asked of them is computed in the same compiled program, and added up over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.progress import track

from jaxinfer import _jax
from jaxinfer.analysis.matrices import rows_of
from jaxinfer.analysis.weights import OnWeights, Weights, bound, carries_of, loop_options, run_on
from jaxinfer.graph import Graph, Node
from jaxinfer.graph.retrace import Program, split
from jaxinfer.quantization.layers import is_weights, matrix_form, product_positions
from jaxinfer.quantization.observers import BINS, Seen


class CalibrationError(ValueError):
    """A batch that nothing can be learned from."""


class Wanted(NamedTuple):
    """What is to be known of the input of a product.

    Attributes:
        counts: its histogram.
        gram: XᵀX of all rows X that the weights are multiplied with.
        columns: sums, least and greatest entries of the columns of X.

    In a convolution in groups, each group has rows of its own.
    """

    counts: bool = False
    gram: bool = False
    columns: bool = False


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a product was fed with over all batches; X are the rows that its weights were multiplied with.

    Each group of a convolution in groups has an X of its own, and its own entry in a first axis of what follows.

    Attributes:
        seen: its range, and the histogram if it was asked for.
        rows: how many rows there were.
        gram: XᵀX, float64[k, k]; None if not asked for.
        sums: sum of X over rows, float64[k]; None if not asked for.
        lows, highs: least and greatest entry of each column of X, float64[k]; None if not asked for.
    """

    seen: Seen
    rows: int
    gram: np.ndarray | None = None
    sums: np.ndarray | None = None
    lows: np.ndarray | None = None
    highs: np.ndarray | None = None

    @property
    def largest(self) -> np.ndarray | None:
        """Largest magnitude of each column of X, float64[k]; None if not asked for."""
        return None if self.lows is None or self.highs is None else np.maximum(-self.lows, self.highs)

    def merged(self, other: Inputs) -> Inputs:
        """Both together."""

        def both(a: Any, b: Any, how: Callable[[Any, Any], Any]) -> Any:
            return None if a is None else how(a, b)

        return Inputs(
            self.seen.merged(other.seen),
            self.rows + other.rows,
            both(self.gram, other.gram, np.add),
            both(self.sums, other.sums, np.add),
            both(self.lows, other.lows, np.minimum),
            both(self.highs, other.highs, np.maximum),
        )


def calibrate(
    program: Program,
    names: Sequence[str],
    params: Any,
    batches: Iterable[Any],
    wanted: Mapping[int, Wanted],
    *,
    progress: bool = False,
) -> dict[int, Inputs]:
    """Runs a program over batches.

    Args:
        program: the program.
        names: key paths of its parameters.
        params: the parameters.
        batches: each a tuple or list of the further arguments, or the only one.
        wanted: what is to be known, by the number of the product.
        progress: whether to show a progress bar.

    Returns:
        By the number of the product.

    Raises:
        CalibrationError: for no batch, and for one that is empty, holds NaN or infinity, differs from the first in
            structure, rank or dtype, does not fit the program, or makes it give numbers that are not finite.
    """
    runs: dict[Any, Any] = {}
    found: dict[int, Inputs] = {}
    first: Any = None
    shown: Iterable[Any] = track(batches, "calibrating", disable=not progress)
    for number, batch in enumerate(shown):
        args = arguments(batch)
        _check(number, args, first)
        first = args if first is None else first
        given, static = split((params, args, {}))
        count = len(names)
        kind = (static, *(_jax.type_key(x) for x in given[count:]))
        try:
            if kind not in runs:
                runs[kind] = jax.jit(_watcher(program, given, static, count, wanted))
            seen = jax.device_get(runs[kind](given[:count], given[count:]))
        except (TypeError, ValueError) as error:
            raise CalibrationError(
                f"batch {number} of the calibration data does not fit the program: {error}"
            ) from error
        for position, raw in seen.items():
            new = _inputs(number, raw)
            found[position] = found[position].merged(new) if position in found else new
    if first is None:
        raise CalibrationError("no calibration data: give one batch at least")
    return found


def arguments(batch: Any) -> tuple[Any, ...]:
    """The arguments that a batch stands for."""
    return tuple(batch) if type(batch) in (tuple, list) else (batch,)


def _check(number: int, args: Any, first: Any) -> None:
    """Raises for a batch that is not like the first or holds what no number can be made of."""
    where = f"batch {number} of the calibration data"
    leaves = jax.tree_util.tree_flatten_with_path(args)[0]
    arrays = [(path, np.asarray(x)) for path, x in leaves if hasattr(x, "dtype") and not _jax.is_extended(x.dtype)]
    if not leaves or not any(x.size for _, x in arrays):
        raise CalibrationError(f"{where} is empty")
    for path, x in arrays:
        if not x.size:
            raise CalibrationError(f"{where} is empty: argument {_name(path)} has shape {x.shape}")
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x.astype(np.float32, copy=False)).all():
            raise CalibrationError(f"{where} holds NaN or infinity in argument {_name(path)}")
    if first is None:
        return
    mine: Any = jax.tree.structure(args)
    if mine != jax.tree.structure(first):
        raise CalibrationError(f"{where} has another structure than batch 0: {mine}, not {jax.tree.structure(first)}")
    old = jax.tree.leaves(first)
    for (path, x), y in zip(leaves, old):
        if not hasattr(x, "dtype") or not hasattr(y, "dtype"):
            continue
        if x.dtype != y.dtype:
            raise CalibrationError(f"{where}: argument {_name(path)} is {x.dtype}, in batch 0 it is {y.dtype}")
        if np.ndim(x) != np.ndim(y):
            raise CalibrationError(
                f"{where}: argument {_name(path)} has shape {np.shape(x)}, in batch 0 it has {np.shape(y)}"
            )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path) or "0"


# -- the domain -------------------------------------------------------------------------------------------------------


class _Operand(NamedTuple):
    """What a product was fed with: [runs, *its shape]; runs are the steps of the loops around it."""

    node: Node
    side: int
    values: Any


class Watching(OnWeights):
    """Runs a program and keeps what products that read parameters are fed with."""

    def __init__(self, positions: Mapping[Node, int], wanted: Mapping[int, Wanted]) -> None:
        super().__init__()
        self.positions, self.wanted = positions, wanted
        self.operands: dict[int, _Operand] = {}

    def meets(self, node: Node, side: int) -> bool:
        return matrix_form(node, side) is not None

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        position = self.positions[node]
        if position in self.wanted:
            self.operands[position] = _Operand(node, side, x[None])
        w = self.array(weights)
        return bound(node, [x, w] if side else [w, x])

    def loop(self, node: Node, inputs: Sequence[Any]) -> list[Any]:
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        body: Graph = node.params["body"]
        nodes: dict[int, tuple[Node, int]] = {}

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            inner = Watching(self.positions, self.wanted)
            out = inner.body(body)(*inputs[:consts], *carry, *xs)
            nodes.update((p, (o.node, o.side)) for p, o in inner.operands.items())
            return tuple(out[:carries]), (tuple(out[carries:]), {p: o.values for p, o in inner.operands.items()})

        carry, (ys, values) = lax.scan(
            step, carries_of(node, inputs), tuple(inputs[consts + carries :]), **loop_options(node)
        )
        for position, found in values.items():
            merged = found.reshape(-1, *found.shape[2:])
            self.operands[position] = _Operand(*nodes[position], merged)
        return [*carry, *ys]


def _watcher(
    program: Program, given: Sequence[Any], static: Any, count: int, wanted: Mapping[int, Wanted]
) -> Callable[..., dict[int, dict[str, Any]]]:
    graph, _ = program.trace(given, static, keep_custom=True)
    positions = product_positions(graph)

    def watch(params: Sequence[Any], others: Sequence[Any]) -> dict[int, dict[str, Any]]:
        domain = Watching(positions, wanted)
        inputs = [Weights.of(i, x) if is_weights(x) else x for i, x in enumerate(map(jnp.asarray, params))]
        run_on(graph, domain, [*inputs, *others])
        return {p: _statistics(o, wanted[p]) for p, o in domain.operands.items()}

    return watch


def _statistics(operand: _Operand, wanted: Wanted) -> dict[str, Any]:
    node, side, values = operand
    x = values.astype(jnp.float32)
    found: dict[str, Any] = {"low": jnp.min(x), "high": jnp.max(x), "finite": jnp.isfinite(x).all()}
    found["reach"] = jnp.maximum(-found["low"], found["high"])
    if wanted.counts:
        step = jnp.maximum(found["reach"], jnp.finfo(jnp.float32).tiny) / (BINS / 2)
        places = jnp.clip(jnp.floor(x / step) + BINS // 2, 0, BINS - 1).astype(jnp.int32)
        found["counts"] = jnp.zeros(BINS, jnp.int32).at[places.reshape(-1)].add(1)
    if wanted.gram or wanted.columns:
        rows = _rows(node, side, x)
        found["rows"] = jnp.asarray(rows.shape[0])
        if wanted.gram:
            groups = (tuple(range(1, rows.ndim - 1)),) * 2
            found["gram"] = lax.dot_general(rows, rows, (((0,), (0,)), groups), precision=lax.Precision.HIGHEST)
        if wanted.columns:
            found["sums"], found["lows"], found["highs"] = rows.sum(0), rows.min(0), rows.max(0)
    return found


def _rows(node: Node, side: int, x: Any) -> Any:
    """What weights are multiplied with, over all runs: [rows, k], or [rows, groups, k] of a convolution in groups."""
    every = jax.vmap(lambda v: rows_of(node, side, v))(x)
    rows = every.reshape(-1, every.shape[-1])
    groups = int(node.params.get("feature_group_count", 1))
    if groups == 1:
        return rows
    # Features, those of a group side by side, follow one another faster than positions of the window.
    numbers = node.params["dimension_numbers"]
    features = x.shape[1 + numbers.lhs_spec[1]] // groups
    apart = rows.reshape(rows.shape[0], -1, groups, features)
    return jnp.swapaxes(apart, 1, 2).reshape(rows.shape[0], groups, -1)


def _inputs(number: int, raw: Mapping[str, Any]) -> Inputs:
    if not raw["finite"]:
        raise CalibrationError(
            f"batch {number} of the calibration data makes the program give numbers that are not finite"
        )
    counts = raw["counts"].astype(np.float64) if "counts" in raw else None
    seen = Seen(float(raw["low"]), float(raw["high"]), counts, float(raw["reach"]))
    wide = {k: raw[k].astype(np.float64) for k in ("gram", "sums", "lows", "highs") if k in raw}
    return Inputs(seen, int(raw.get("rows", 0)), **wide)
