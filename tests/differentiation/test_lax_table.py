"""Every case of JAX's gradient table to order 2, forward, reverse and mixed, equals JAX's and is by our own rules."""

import zlib

import numpy as np
import pytest
from derivatives_like_jax import check
from jax import lax
from lax_table import CASES, DTYPES, SPECIAL_VALUES, draw, shapes

pytestmark = pytest.mark.usefixtures("float64")
_RTOL = {64: 1e-9, 32: 2e-4}

# One of each kind of broadcasting, for the quick test.
_FEW = {1: [[(3,)]], 2: [[(3,), (3,)], [(), (2, 3)], [(3, 1), (1, 4)]]}


def _check(case, kind, bits, order, groups):
    # One function applies the operation to operands of every shape, so that they are compiled together.
    rng = np.random.default_rng(zlib.crc32(f"{case.op} {kind}".encode()))
    args = [draw(rng, case.drawn, shape, DTYPES[kind, bits]) for group in groups for shape in group]
    op, n = getattr(lax, case.op), case.operands

    def fun(*args):
        return [op(*args[i : i + n]) for i in range(0, len(args), n)]

    assert not check(fun, *args, order=order, rtol=_RTOL[bits])


_CASES = [pytest.param(case, kind, id=f"{case.op}-{kind}") for case in CASES for kind in case.kinds]


@pytest.mark.parametrize("case, kind", _CASES)
def test_table_to_order_1(case, kind):
    _check(case, kind, 64, 1, _FEW[case.operands])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("case, kind", _CASES)
def test_table_to_order_2(case, kind, bits):
    _check(case, kind, bits, 2, shapes(case.operands) if bits == 64 else _FEW[case.operands])


def test_special_values_to_order_2():
    pairs = [(getattr(lax, op), x) for op, values in SPECIAL_VALUES.items() for x in values]
    borrowed = check(lambda *args: [op(x) for (op, _), x in zip(pairs, args)], *(x for _, x in pairs))
    assert not borrowed


def test_products_in_another_dtype():
    dtypes = [np.float32, np.float64]
    kinds = [(a, b, c) for a in dtypes for b in dtypes for c in dtypes]
    rng = np.random.default_rng(0)
    args = [np.asarray(rng.standard_normal((2, 3)), dtype) for a, b, _ in kinds for dtype in (a, b)]

    def products(*args):
        return [lax.mul(x, y, out_dtype=c) for x, y, (_, _, c) in zip(args[::2], args[1::2], kinds)]

    assert not check(products, *args, rtol=_RTOL[32])
