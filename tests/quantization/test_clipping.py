"""Scales that clip, against a search by brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.quantization.clipping import clipped_array, clipped_scale
from jaxinfer.quantization.scheme import Format, Group
from jaxinfer.quantization.tensor import quantize_array


def _error(x: np.ndarray, scale: float, zero: float, form: Format) -> float:
    return float(np.sum((scale * (np.clip(np.round(x / scale) + zero, form.low, form.high) - zero) - x) ** 2))


def _least(x: np.ndarray, form: Format) -> float:
    """The least error over ten times as many ranges as are tried."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    found = []
    for share in np.linspace(1, 0.2, 801):
        if form.affine:
            scale = share * (high - low) / (form.high - form.low)
            zero = np.clip(form.low - np.round(share * low / scale), form.low, form.high)
        else:
            scale, zero = share * max(-low, high) / form.high, 0.0
        found.append(_error(x, scale, zero, form))
    return min(found)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("per", ["tensor", "channel", Group(40)], ids=str)
def test_the_error_is_nearly_the_least_there_is(per, affine) -> None:
    x = np.random.default_rng(0).standard_t(3, size=(120, 3)).astype(np.float32) + np.array([0, 1, 0], np.float32)
    form = Format("int4", per, affine)
    axes, group_axis = {"tensor": ((), None), "channel": ((1,), None)}.get(str(per), ((1,), 0))
    clipped = np.asarray(clipped_array(x, form, axes, group_axis).dequantize(), np.float64)
    whole = np.asarray(quantize_array(x, form, axes, group_axis).dequantize(), np.float64)
    step = {"tensor": 120, "channel": 120}.get(str(per), 40)
    columns = [slice(None)] if per == "tensor" else [slice(j, j + 1) for j in range(3)]
    for column in columns:
        for i in range(0, 120, step):
            block = x[i : i + step, column].astype(np.float64)
            error = np.sum((clipped[i : i + step, column] - block) ** 2)
            assert error <= 1.02 * _least(block, form)
            assert error <= 1.0001 * np.sum((whole[i : i + step, column] - block) ** 2)
    assert np.sum((clipped - x) ** 2) < np.sum((whole - x) ** 2)


def test_what_is_exact_is_left_so() -> None:
    x = np.concatenate([np.zeros((7, 1)), np.arange(-3, 4)[:, None]], 1).astype(np.float32)
    x[:, 1] *= 7 / 3
    q = clipped_array(x, Format("int4"), (1,))
    np.testing.assert_allclose(q.dequantize()[:, 0], 0)
    assert np.abs(np.asarray(q.dequantize()[:, 1]) - x[:, 1]).max() <= 0.5


def test_sixteen_bits_have_nothing_to_clip() -> None:
    x = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        clipped_array(x, Format("bf16", "tensor")).dequantize(),
        quantize_array(x, Format("bf16", "tensor")).dequantize(),
    )


def test_scales_have_the_shape_of_plain_ones() -> None:
    x = np.random.default_rng(2).normal(size=(5, 10, 4)).astype(np.float32)
    form = Format("int4", Group(4), affine=True)
    scale, zero_point = clipped_scale(x, form, (0, 2), 1)
    plain = quantize_array(x, form, (0, 2), 1)
    assert scale.shape == plain.scale.shape and zero_point.shape == plain.zero_point.shape
    assert zero_point.dtype == plain.zero_point.dtype
