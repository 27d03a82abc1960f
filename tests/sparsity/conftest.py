"""Fixtures of the tests of sparsity."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import pytest
from shrinking import precision


@pytest.fixture
def double() -> Iterator[None]:
    """Arrays of float64 can be made."""
    with precision(jnp.float64):
        yield
