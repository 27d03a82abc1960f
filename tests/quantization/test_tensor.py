"""Arrays in fewer bits, against float64 by the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.quantization.scheme import Format, Group
from jaxinfer.quantization.tensor import pack, quantize_array, unpack


def _nearest(x: np.ndarray, bits: int, affine: bool) -> np.ndarray:
    """All entries of a vector at the nearest of 2^bits values that cover it."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if affine:
        scale = np.float64(np.float32((high - low) / (most - least))) or 1.0
        zero = np.clip(least - np.round(low / scale), least, most)
    else:
        scale, zero = np.float64(np.float32(max(-low, high) / most)) or 1.0, 0
    return scale * (np.clip(np.round(x / scale) + zero, least, most) - zero)


def _blocks(shape: tuple[int, int], form: Format) -> list[tuple[slice, slice]]:
    rows, columns = shape
    if form.per == "tensor":
        return [(slice(None), slice(None))]
    step = form.per.size if isinstance(form.per, Group) else rows
    return [(slice(i, i + step), slice(j, j + 1)) for j in range(columns) for i in range(0, rows, step)]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("number", ["int8", "int4"])
@pytest.mark.parametrize("per", ["tensor", "channel", Group(16), Group(7), Group(100)], ids=str)
def test_every_entry_goes_to_the_nearest_value(number, per, affine) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(45, 6)) * np.array([1, 1e-6, 1e6, 0, 2, 3]) + np.array([0, 0, 0, 0, 5, -9])).astype(
        np.float32
    )
    form = Format(number, per, affine)
    axes, group_axis = {"tensor": ((), None), "channel": ((1,), None)}.get(str(per), ((1,), 0))
    q = jax.jit(lambda x: quantize_array(x, form, axes, group_axis))(x)
    assert q.shape == x.shape and q.dtype == "float32"
    got = np.asarray(q.dequantize(), np.float64)
    for block in _blocks(x.shape, form):
        want = _nearest(x[block].astype(np.float64), form.bits, affine)
        scale = np.abs(x[block]).max() / 2 ** (form.bits - 1)
        # float32 divides a little differently: entries in the middle between two values may go to either.
        differences = np.abs(got[block] - want)
        middle = differences > 1e-4 * scale
        assert middle.mean() < 0.05
        assert (np.abs(got[block] - x[block])[middle] <= 1.01 * np.abs(want - x[block])[middle] + 1e-30).all()


@pytest.mark.parametrize(
    ("number", "oracle"), [("fp8_e4m3", ml_dtypes.float8_e4m3fn), ("fp8_e5m2", ml_dtypes.float8_e5m2)]
)
def test_floats_of_eight_bits_are_scaled_to_their_range(number, oracle) -> None:
    x = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32) * np.array([1, 10, 1e-3, 1e3], np.float32)
    q = quantize_array(x, Format(number), (1,))
    largest = float(ml_dtypes.finfo(oracle).max)
    scale = np.abs(x).max(0, keepdims=True) / np.float32(largest)
    np.testing.assert_allclose(q.dequantize(), (x / scale).astype(oracle).astype(np.float32) * scale, rtol=1e-6)
    assert q.nbytes == x.size + 4 * 4


@pytest.mark.parametrize(("number", "oracle"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16)])
def test_floats_of_sixteen_bits_are_themselves(number, oracle) -> None:
    x = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
    q = quantize_array(x, Format(number, "tensor"))
    assert q.scale is None and q.nbytes == 2 * x.size
    np.testing.assert_array_equal(q.dequantize(), x.astype(oracle).astype(np.float32))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_two_in_a_byte_come_apart_again(rows, columns, axis, seed) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, columns)).astype(np.int8)
    packed = pack(jnp.asarray(codes), axis)
    assert packed.dtype == jnp.uint8 and packed.shape[axis] == -(-codes.shape[axis] // 2)
    np.testing.assert_array_equal(unpack(packed, axis, codes.shape[axis]), codes)


@pytest.mark.parametrize("number", ["int8", "int4"])
def test_values_may_lie_in_another_order(number) -> None:
    x = np.random.default_rng(3).normal(size=(6, 4, 10)).astype(np.float32)
    q = quantize_array(x, Format(number), (2,))
    turned = q.reordered((2, 0, 1))
    assert turned.shape == q.shape and turned.values.shape != q.values.shape and turned.nbytes == q.nbytes
    np.testing.assert_array_equal(turned.codes(), q.codes())
    np.testing.assert_array_equal(turned.dequantize(), q.dequantize())
    again = turned.reordered((1, 2, 0)).reordered((0, 1, 2))
    assert again.order is None
    np.testing.assert_array_equal(again.values, q.values)


def test_it_is_a_pytree() -> None:
    q = quantize_array(np.ones((4, 6), np.float32), Format("int4", Group(2), affine=True), (1,), 0)
    leaves, tree = jax.tree.flatten(q)
    assert [x.dtype for x in leaves] == [jnp.uint8, jnp.float32, jnp.int8]
    back = jax.tree.unflatten(tree, leaves)
    assert back.format == q.format and back.shape == (4, 6)
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(q), np.ones((4, 6)))


def test_groups_need_an_axis() -> None:
    with pytest.raises(ValueError, match="group_axis"):
        quantize_array(np.ones((4, 4), np.float32), Format("int8", Group(2)), (1,))
    with pytest.raises(ValueError, match="axes"):
        quantize_array(np.ones((4, 4), np.float32), Format("int8"), (2,))
