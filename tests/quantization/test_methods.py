"""Ways to write parameters, through ``quantize``, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quantization.bias import BiasCorrected
from jaxinfer.quantization.gptq import GPTQ
from jaxinfer.quantization.method import Nearest
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.scheme import Format, Group, Int4, Int8, Scheme
from jaxinfer.quantization.smoothing import SmoothQuant, smoothing_scales

COUNT, CHANNELS = 20, 6


def _dense(params, x):
    return jnp.einsum("nk,mk->mn", params["w"], x)


@pytest.fixture(scope="module")
def data() -> tuple[dict[str, jax.Array], np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, COUNT)) @ rng.normal(size=(COUNT, COUNT)) / 4 + 1
    x[:, 3] *= 50
    return {"w": jnp.asarray(rng.normal(size=(CHANNELS, COUNT)), jnp.float32)}, x.astype(np.float32)


def _error(params, x: np.ndarray, scheme: Scheme, method) -> np.ndarray:
    """What the program with written parameters differs by, float64[rows, channels]."""
    program, new = quantize(_dense, params, scheme, [x[:40], x[40:]], method=method, tune="off")
    exact = x.astype(np.float64) @ np.asarray(params["w"], np.float64).T
    return np.asarray(program(new, x), np.float64) - exact


def test_bias_correction_zeroes_the_mean_error(data) -> None:
    params, x = data
    plain = _error(params, x, Int4(8), Nearest()).mean(0)
    corrected = _error(params, x, Int4(8), BiasCorrected()).mean(0)
    assert np.abs(plain).max() > 0.05
    assert np.abs(corrected).max() < 1e-4


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("per", ["channel", Group(8)], ids=str)
def test_gptq_is_better_than_nearest(data, per, act_order) -> None:
    params, x = data
    scheme = Scheme(Format("int4", per))
    nearest, gptq = (np.sum(_error(params, x, scheme, m) ** 2) for m in (Nearest(), GPTQ(act_order=act_order)))
    assert gptq < 0.5 * nearest


@pytest.mark.parametrize("per", ["channel", Group(3)], ids=str)
def test_convolutions(per) -> None:
    rng = np.random.default_rng(1)
    # Neighbours are alike, as in an image.
    x = np.cumsum(np.cumsum(rng.normal(size=(6, 7, 7, 4)) + 0.1, 1), 2).astype(np.float32)
    params = jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32)

    def convolution(w, x):
        return jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    exact, errors = np.asarray(convolution(params, x)), []
    for method in (Nearest(), BiasCorrected(GPTQ(clip=False))):
        program, new = quantize(convolution, params, Scheme(Format("int4", per)), [x], method=method, tune="off")
        errors.append(np.asarray(program(new, x)) - exact)
    assert np.sum(errors[1] ** 2) < 0.5 * np.sum(errors[0] ** 2)
    assert np.abs(errors[1].mean((0, 1, 2))).max() < 1e-4


@pytest.mark.parametrize("features", [1, 2])
def test_convolutions_in_groups(features) -> None:
    """Each group has inputs, and a Cholesky factor, of its own."""
    rng = np.random.default_rng(2)
    channels = 4 * features
    x = np.cumsum(np.cumsum(rng.normal(size=(6, 7, 7, channels)), 1), 2) * np.geomspace(1, 20, channels) + 1
    x = x.astype(np.float32)
    params = jnp.asarray(rng.normal(size=(3, 3, features, 8)), jnp.float32)

    def convolution(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    exact, errors = np.asarray(convolution(params, x)), []
    for method in (Nearest(), GPTQ(clip=False), BiasCorrected()):
        program, new = quantize(convolution, params, Scheme(Format("int4")), [x], method=method, tune="off")
        errors.append(np.asarray(program(new, x)) - exact)
    nearest, gptq, corrected = errors
    ratios = np.sum(gptq**2, (0, 1, 2)) / np.sum(nearest**2, (0, 1, 2))
    assert ratios.mean() < 0.75
    assert np.abs(corrected.mean((0, 1, 2))).max() < 1e-4 * np.abs(exact).max()


def test_smoothing_helps_where_a_channel_sticks_out(data) -> None:
    params, x = data
    plain, smooth = (np.sum(_error(params, x, Int8(), m) ** 2) for m in (Nearest(), SmoothQuant(0.5)))
    assert smooth < 0.5 * plain


def test_smoothing_is_left_where_it_does_harm() -> None:
    """Channels that are large only now and then: most of their entries would be lost in steps made for the largest."""
    rng = np.random.default_rng(4)
    x = np.where(rng.random((400, COUNT)) < 0.01, rng.uniform(2, 4, (400, COUNT)), rng.normal(size=(400, COUNT)) * 0.05)
    x[:, :4] = rng.uniform(-0.1, 0.1, (400, 4))
    params = {"w": jnp.asarray(rng.normal(size=(CHANNELS, COUNT)), jnp.float32)}
    methods = (Nearest(), SmoothQuant(0.75), SmoothQuant())
    plain, forced, chosen = (np.sum(_error(params, x.astype(np.float32), Int8(), m) ** 2) for m in methods)
    assert forced > 1.2 * plain
    assert chosen <= plain


def test_the_share_is_chosen_by_layer(data) -> None:
    params, x = data
    chosen, *fixed = (np.sum(_error(params, x, Int8(), SmoothQuant(a)) ** 2) for a in (None, 0.25, 0.5, 0.75))
    assert chosen < 1.1 * min(fixed)


def test_methods_are_combined(data) -> None:
    params, x = data
    error = _error(params, x, Int8(), SmoothQuant(0.5, BiasCorrected(GPTQ())))
    assert np.sum(error**2) < 0.5 * np.sum(_error(params, x, Int8(), Nearest()) ** 2)


def test_with_one_factor_for_both_operands_the_function_is_the_same(data) -> None:
    params, x = data
    w, x = np.asarray(params["w"], np.float64).T, x.astype(np.float64)
    s = smoothing_scales(np.abs(x).max(0), np.abs(w).max(1), 0.5).astype(np.float64)
    np.testing.assert_allclose((x / s) @ (w * s[:, None]), x @ w, rtol=1e-12)
    # With α = ½ both operands have the same largest entries (equation 4).
    np.testing.assert_allclose(np.abs(x / s).max(0), np.abs(w * s[:, None]).max(1), rtol=1e-6)


def test_channels_that_are_zero_are_not_scaled() -> None:
    np.testing.assert_array_equal(smoothing_scales(np.array([0.0, 4.0, 2.0]), np.array([3.0, 0.0, 2.0]), 0.5), 1)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_is_a_share(alpha) -> None:
    with pytest.raises(ValueError, match="alpha"):
        SmoothQuant(alpha)
