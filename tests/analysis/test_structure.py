"""Numbers that are known without running the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jaxinfer.analysis.structure import known_number
from jaxinfer.graph import trace_function

BINARY = (lax.add, lax.sub, lax.mul, lax.max, lax.min, lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge)
NUMBERS = st.integers(-(2**31), 2**31 - 1)


def _known(function, *values):
    graph = trace_function(lambda: [function(*values)])
    return known_number(graph, graph.outputs[0])


@pytest.mark.parametrize("operation", BINARY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8])
@given(a=NUMBERS, b=NUMBERS)
def test_whole_numbers_wrap_around_as_in_jax(operation, dtype, a, b) -> None:
    x, y = (np.asarray(n, np.int64).astype(dtype) for n in (a, b))
    found, want = _known(operation, x, y), np.asarray(operation(x, y))
    assert found.dtype == want.dtype and found == want


@pytest.mark.parametrize("which", [True, False])
def test_one_of_two_numbers(which) -> None:
    found = _known(lax.select, np.asarray(which), np.asarray(3, np.int32), np.asarray(-4, np.int32))
    assert found == (3 if which else -4) and found.dtype == np.int32


def test_other_numbers_are_computed_by_jax() -> None:
    dtypes = (jnp.float32, jnp.bfloat16)
    for dtype in dtypes:
        x = np.asarray(1 / 3, dtype)
        assert _known(lax.mul, x, x) == np.asarray(lax.mul(x, x))
    assert _known(lambda x: jnp.sign(x) * jnp.abs(x), np.float32(-2)) == -2


def test_what_depends_on_an_input_is_not_known() -> None:
    graph = trace_function(lambda x: [x + 1], jax.ShapeDtypeStruct((), np.int32))
    assert known_number(graph, graph.outputs[0]) is None
