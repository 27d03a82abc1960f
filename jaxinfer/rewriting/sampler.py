"""Random programs' ingredients: what a rule's ``cases`` draw shapes and arrays from.

A case is written once and tried in every dtype: the prover calls ``rule.cases(sampler)`` with samplers whose ``dtype``
is float64, float32, bfloat16, float16 and int32 in turn, and ``sampler.array(...)`` follows. The same seed gives the
same shapes and choices in every dtype. A case that makes no sense in some of them says so in its first line::

    def cases(s):
        s.floating_only()             # skip int32
        s.only("float32", "float64")  # or: the form exists for these dtypes only
        rows, columns = s.shape(2)
        yield lambda x, w: x @ w, (s.array(rows, columns), s.frozen(columns, s.dim()))

In edge trials ``dim`` and ``shape`` also give 0 and 1, and arrays hold zeros of both signs; there a case may be invalid
and the rule may decline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

T = TypeVar("T")

# Whole numbers up to this size keep what a rule computes from known arrays exact in float64.
_WHOLE = 64


class UnsupportedDtype(Exception):
    """A case says that it makes no sense in the dtype it is tried in."""


@dataclass(frozen=True)
class Frozen:
    """An argument of a case whose value is known when the program is rewritten.

    Attributes:
        array: the value.
    """

    array: Any


class Sampler:
    """Draws the shapes, choices and arrays of a case.

    Args:
        seed: seed of every draw.
        dtype: dtype of the arrays that ask for none.
        edge: also draw sizes 0 and 1 and zeros of both signs.
        whole: draw whole numbers, so that the program can be run over the integers.

    Attributes:
        dtype: the dtype that this run of the case is about.
        rng: the generator behind every draw.
    """

    def __init__(self, seed: Any = 0, dtype: Any = "float64", *, edge: bool = False, whole: bool = False):
        self.dtype = jnp.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.edge = edge
        self._whole = whole

    # -- sizes and choices --

    def dim(self, low: int = 1, high: int = 6) -> int:
        """A size from ``low`` up to and including ``high``; 0 or 1 in about half of the draws of an edge trial."""
        drawn, small = int(self.rng.integers(low, high + 1)), int(self.rng.integers(0, 4))
        return small if self.edge and small < 2 else drawn

    def shape(self, rank: int) -> tuple[int, ...]:
        """``rank`` sizes."""
        return tuple(self.dim() for _ in range(rank))

    def integers(self, low: int, high: int) -> int:
        """A number from ``low`` up to but not including ``high``, as NumPy counts."""
        return int(self.rng.integers(low, high))

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    # -- arrays --

    def array(self, *shape: int, dtype: Any = None) -> Any:
        """Standard normal values (complex ones in both parts), small whole numbers, or booleans, by dtype."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        rng = self._array_rng()
        normal, whole = rng.standard_normal(shape), rng.integers(-8, 9, shape)
        if dtype == np.bool_:
            return jnp.asarray(whole > 0)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.asarray(np.abs(whole) if jnp.issubdtype(dtype, jnp.unsignedinteger) else whole, dtype)
        if self._whole:
            return jnp.asarray(np.rint(normal * _WHOLE / 4), dtype)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return jnp.asarray(normal + 1j * rng.standard_normal(shape), dtype)
        if self.edge:
            kind = rng.integers(0, 10, shape)
            normal = np.where(kind == 0, 0.0, np.where(kind == 1, -0.0, normal))
        return jnp.asarray(normal, dtype)

    def positive(self, *shape: int, dtype: Any = None) -> Any:
        """Values between 1/2 and 2 (whole numbers from 1 on, where the dtype or the trial wants whole ones)."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        values = self._array_rng().uniform(0.5, 2.0, shape)
        if self._whole or not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.asarray(np.ceil(values * 4), dtype)
        return jnp.asarray(values, dtype)

    def frozen(self, *shape: int, dtype: Any = None) -> Frozen:
        """:meth:`array`, known when the program is rewritten."""
        return Frozen(self.array(*shape, dtype=dtype))

    def _array_rng(self) -> np.random.Generator:
        # One draw for each array whatever its dtype, so that later choices are the same in all.
        return np.random.default_rng(self.rng.integers(2**63))

    # -- what a case needs --

    def floating_only(self) -> None:
        """Leaves the case out when it is tried in an integer dtype."""
        if not jnp.issubdtype(self.dtype, jnp.inexact):
            raise UnsupportedDtype(f"needs a floating-point dtype, not {self.dtype}")

    def only(self, *dtypes: Any) -> None:
        """Leaves the case out when it is tried in any other dtype."""
        if self.dtype not in [jnp.dtype(d) for d in dtypes]:
            raise UnsupportedDtype(f"not meant for {self.dtype}")
