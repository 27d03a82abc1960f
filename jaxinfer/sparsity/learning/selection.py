"""Which units to keep: those with the best scores, as many as the target allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def select(scores: jax.Array, protected: jax.Array, cost: Callable[[jax.Array], Any], left: Any) -> jax.Array:
    """The largest set of best units whose cost is at most ``left``.

    Works under ``jit``. The threshold is found by bisection over the bits of the scores, which is exact for any cost
    that only grows when units are added, and cheaper than sorting. Equal scores are taken in order.

    Args:
        scores: float32[units]; NaN counts as the worst.
        protected: bool[units], kept in any case.
        cost: float32[units] of zeros and ones → what they cost, a scalar.
        left: what may be left.

    Returns:
        bool[units]. If the protected ones cost more than ``left`` by themselves, just those.
    """
    keys = jnp.where(protected, jnp.uint32(2**32 - 1), _ordered(scores))
    limit = left * (1 + 1e-6)  # sums are rounded

    def fits(keep: Any) -> Any:
        return cost(keep.astype(jnp.float32)) <= limit

    def halve(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = ends  # keeping keys ≥ high fits, keeping keys ≥ low does not (or was not tried)
        middle = low + (high - low) // 2
        ok = fits(keys >= middle)
        return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

    ends = (jnp.uint32(0), jnp.uint32(2**32 - 1))
    low, threshold = jax.lax.fori_loop(0, 32, halve, ends)
    threshold = jnp.where(fits(keys >= low), low, threshold)
    order = jnp.arange(scores.size, dtype=jnp.int32)
    tied = keys == threshold - 1

    def halve_ties(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = ends  # taking `low` more fits
        middle = low + (high - low + 1) // 2
        ok = fits((keys >= threshold) | (tied & (order < middle)))
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    bits = max(int(scores.size).bit_length(), 1)
    count, _ = jax.lax.fori_loop(0, bits, halve_ties, (jnp.int32(0), jnp.int32(scores.size)))
    return (keys >= threshold) | (tied & (order < count))


def ranks(scores: jax.Array) -> jax.Array:
    """Scores → their ranks within the array, spread over (0, 1]: what makes layers of different scales alike."""
    order = jnp.argsort(scores, stable=True)
    places = jnp.zeros(scores.size, jnp.float32).at[order].set(jnp.arange(1, scores.size + 1, dtype=jnp.float32))
    return places / max(scores.size, 1)


def _ordered(scores: jax.Array) -> jax.Array:
    """float32 → uint32 in the same order, at least 1 and less than the key of what is protected; NaN lowest."""
    clean = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    clean = jnp.where(clean == 0, 0.0, clean)  # −0.0 becomes 0.0
    bits = jax.lax.bitcast_convert_type(clean, jnp.uint32)
    sign = jnp.uint32(2**31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
