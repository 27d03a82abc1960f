"""JAX's own table of operations to differentiate, as data.

Source: ``LAX_GRAD_OPS``, ``LAX_GRAD_OPS_WITH_OUT_DTYPE`` and ``LAX_GRAD_SPECIAL_VALUE_TESTS`` of
``tests/lax_autodiff_test.py`` in jax-ml/jax, commit cec06d1.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

# Operands of one operation have shapes of one group.
SHAPES = [[(3,)], [(), (3, 4), (3, 1), (1, 4)], [(2, 3, 4), (2, 1, 4)]]

FLOAT, COMPLEX = "float", "complex"
DTYPES = {
    (FLOAT, 64): np.float64,
    (FLOAT, 32): np.float32,
    (COMPLEX, 64): np.complex128,
    (COMPLEX, 32): np.complex64,
}


class Case(NamedTuple):
    """An operation of ``jax.lax``, how many operands it has, where they are drawn, and the kinds of dtypes."""

    op: str
    operands: int
    drawn: tuple
    kinds: tuple[str, ...] = (FLOAT,)


DEFAULT = ("normal", 3.0)
SMALL = ("normal", 1e-3)
POSITIVE = ("positive", 3.0)
NOT_SMALL = ("away from zero", 3.0)
BOTH = (FLOAT, COMPLEX)


def uniform(low, high):
    """Uniformly between two numbers."""
    return ("uniform", low, high)


CASES = [
    Case("neg", 1, DEFAULT, BOTH),
    Case("floor", 1, uniform(0.1, 0.4)),
    Case("ceil", 1, uniform(0.1, 0.4)),
    Case("round", 1, uniform(0.1, 0.4)),
    Case("exp", 1, SMALL, BOTH),
    Case("exp2", 1, SMALL, BOTH),
    Case("expm1", 1, DEFAULT, BOTH),
    Case("log", 1, POSITIVE, BOTH),
    Case("log1p", 1, POSITIVE, BOTH),
    Case("sinh", 1, DEFAULT, BOTH),
    Case("cosh", 1, DEFAULT, BOTH),
    Case("tanh", 1, DEFAULT, BOTH),
    Case("sin", 1, DEFAULT, BOTH),
    Case("cos", 1, DEFAULT, BOTH),
    Case("tan", 1, uniform(-1.3, 1.3), BOTH),
    Case("asin", 1, uniform(-1.3, 1.3)),
    Case("acos", 1, uniform(-1.3, 1.3)),
    Case("atan2", 2, DEFAULT),
    Case("erf", 1, SMALL),
    Case("erfc", 1, SMALL),
    Case("erf_inv", 1, SMALL),
    Case("bessel_i0e", 1, DEFAULT),
    Case("bessel_i1e", 1, DEFAULT),
    Case("real", 1, DEFAULT, (COMPLEX,)),
    Case("imag", 1, DEFAULT, (COMPLEX,)),
    Case("complex", 2, DEFAULT),
    Case("conj", 1, DEFAULT, BOTH),
    Case("abs", 1, POSITIVE, BOTH),
    Case("pow", 2, POSITIVE, BOTH),
    Case("sqrt", 1, POSITIVE),
    Case("sqrt", 1, DEFAULT, (COMPLEX,)),
    Case("rsqrt", 1, POSITIVE),
    Case("rsqrt", 1, DEFAULT, (COMPLEX,)),
    Case("cbrt", 1, NOT_SMALL),
    Case("logistic", 1, DEFAULT, BOTH),
    Case("add", 2, DEFAULT, BOTH),
    Case("sub", 2, DEFAULT, BOTH),
    Case("mul", 2, DEFAULT, BOTH),
    Case("div", 2, NOT_SMALL, BOTH),
    Case("max", 2, DEFAULT),
    Case("min", 2, DEFAULT),
]

SPECIAL_VALUES = {
    "sinh": [0.0],
    "cosh": [0.0],
    "tanh": [0.0, 1000.0],
    "sin": [0.0, math.pi, math.pi / 2, math.pi / 4],
    "cos": [0.0, math.pi, math.pi / 2, math.pi / 4],
    "tan": [0.0],
    "asin": [0.0],
    "acos": [0.0],
    "atan": [0.0, 1000.0],
    "erf": [0.0, 10.0],
    "erfc": [0.0, 10.0],
}


def shapes(operands):
    """All the operand shapes of an operation."""
    return [s for group in SHAPES for s in itertools.combinations_with_replacement(group, operands)]


def draw(rng, drawn, shape, dtype):
    """A random operand; both parts of complex ones are drawn alike."""
    if np.issubdtype(dtype, np.complexfloating):
        re, im = (draw(rng, drawn, shape, np.float64) for _ in range(2))
        return np.asarray(re + 1j * im, dtype)
    name, *bounds = drawn
    if name == "uniform":
        return np.asarray(rng.uniform(*bounds, shape), dtype)
    value = rng.standard_normal(shape) * bounds[0]
    if name == "positive":
        value = np.abs(value)
    elif name == "away from zero":
        value = value + np.where(value > 0, 10, -10)
    return np.asarray(value, dtype)
