"""Rewrites functions by given rules and compares what they compute with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.analysis.cost import flops
from jaxinfer.graph import Graph, check, run, trace
from jaxinfer.rewriting import Rewriter, Rule, fold


def rewrite(
    function: Callable[..., Any], arguments: Sequence[Any], rules: Sequence[Rule], known: Sequence[int] = ()
) -> tuple[Graph, Graph]:
    """A function before and after rewriting and folding.

    Args:
        function: takes the arguments by position.
        arguments: pytrees of arrays.
        rules: the rules; offers are taken wherever they are made.
        known: positions of the arguments whose values are known.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments)
    before = trace(jaxpr, _known_leaves(arguments, known))
    rewriter = Rewriter(rules)
    after = rewriter.fixpoint(fold(rewriter.fixpoint(before)))
    for _ in range(4):
        offers = {node: found[0] for node, found in rewriter.offers(after).items()}
        if not offers:
            break
        after = rewriter.fixpoint(fold(rewriter.fixpoint(rewriter.apply(after, offers))))
    check(after)
    return before, after


def _known_leaves(arguments: Sequence[Any], known: Sequence[int]) -> dict[int, Any]:
    found, position = {}, 0
    for i, argument in enumerate(arguments):
        for leaf in jax.tree.leaves(argument):
            if i in known:
                found[position] = leaf
            position += 1
    return found


def compare(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    rules: Sequence[Rule],
    known: Sequence[int] = (),
    tolerance: float = 1e-5,
) -> Graph:
    """Rewrites a float32 function, checks it against the function run in float64, and returns the new graph."""
    _, after = rewrite(function, arguments, rules, known)
    unknown = [leaf for i, a in enumerate(arguments) if i not in known for leaf in jax.tree.leaves(a)]
    found = run(after, {}, *unknown)
    with jax.enable_x64(True):
        exact = jax.tree.leaves(function(*jax.tree.map(_widened, list(arguments))))
    for have, want in zip(found, exact, strict=True):
        want = np.asarray(want)
        assert have.shape == want.shape
        scale = float(np.max(np.abs(want), initial=1.0))
        np.testing.assert_allclose(np.asarray(have, want.dtype), want, atol=tolerance * scale, rtol=0)
    return after


def _widened(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype == np.float32 else x


def total_flops(graph: Graph) -> float:
    """Operations of a graph; what is computed from constants alone is folded and counts as nothing."""
    return sum(flops(node) for node in graph.nodes if node not in graph.known)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 values."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
