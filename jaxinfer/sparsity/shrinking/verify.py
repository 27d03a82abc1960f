"""Comparing a small program with the masked one it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.search.verify import nudge

# What differences may be, relative to the largest result; of other types this many units in the last place.
_LIMITS = {"float64": 1e-9, "complex128": 1e-9, "float32": 1e-5, "complex64": 1e-5}
_UNITS = 64.0
# Or this many times what moving parameters and inputs by one unit in the last place does.
_SENSITIVITY = 16.0


@dataclass(frozen=True)
class Difference:
    """How far results are from a reference.

    Attributes:
        relative: largest difference of finite results, relative to the largest result of its array.
        reason: what is wrong, where something is.
    """

    relative: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within rounding."""
        return not self.reason

    def __str__(self) -> str:
        return self.reason or f"results agree to {self.relative:.2g}"


def drawn(value: Any, seed: int) -> Any:
    """An argument to compare with: itself, or random numbers of its type, of which whole ones are 0 or 1."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    rng = np.random.default_rng(seed)
    if _jax.is_extended(value.dtype):
        return jax.random.split(jax.random.key(seed), value.shape) if value.shape else jax.random.key(seed)
    if _jax.is_inexact(value.dtype):
        return jnp.asarray(rng.standard_normal(value.shape), value.dtype)
    return jnp.asarray(rng.integers(0, 2, value.shape), value.dtype)


def difference(
    reference: Callable[[Sequence[Any]], Any], arguments: Sequence[Any], candidate: Callable[[], Any]
) -> Difference:
    """Compares results with those of a reference.

    Where the reference is not finite nothing is compared: a masked zero times an infinity is NaN in it alone.

    Args:
        reference: the masked program, as a function of a list of arrays.
        arguments: its arguments.
        candidate: gives the small program's results.
    """
    want, have = jax.tree.leaves(reference(arguments)), jax.tree.leaves(candidate())
    moved: list[Any] | None = None
    worst = 0.0
    for i, (w, h) in enumerate(zip(want, have, strict=True)):
        if not hasattr(w, "dtype") or _jax.is_extended(w.dtype):
            continue
        if not _jax.is_inexact(w.dtype):
            if not np.array_equal(w, h):
                return Difference(worst, f"result {i} ({w.dtype}) differs")
            continue
        wide = np.complex128 if jnp.issubdtype(w.dtype, jnp.complexfloating) else np.float64
        a, b = np.asarray(w).astype(wide), np.asarray(h).astype(wide)
        finite = np.isfinite(a)
        if not finite.any():
            continue
        scale = float(np.abs(a[finite]).max())
        error = float(np.abs(a - b)[finite].max())
        limit = _LIMITS.get(str(w.dtype), _UNITS * float(jnp.finfo(w.dtype).eps)) * scale
        if not error <= limit:
            moved = jax.tree.leaves(reference(nudge(arguments))) if moved is None else moved
            shift = np.abs(np.asarray(moved[i]).astype(wide) - a)[finite]
            limit += _SENSITIVITY * float(np.max(shift[np.isfinite(shift)], initial=0.0))
        if not error <= limit:
            return Difference(worst, f"result {i} is off by {error:.3g} where rounding explains {limit:.3g}")
        worst = max(worst, error / scale if scale else 0.0)
    return Difference(worst)
