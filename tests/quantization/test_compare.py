"""Errors of single products, against products written out in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer
from jaxinfer.quantization.calibrate import CalibrationError
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.scheme import Int4, Int8, Int8Dynamic
from jaxinfer.quantization.smoothing import SmoothQuant
from jaxinfer.quantization.tensor import Quantized


def _params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
    }


def _two_layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_each_product_is_fed_with_what_the_original_one_is_fed_with() -> None:
    params, rng = _params(), np.random.default_rng(1)
    x = rng.normal(size=(10, 8)).astype(np.float32)
    program, new = quantize(_two_layers, params, Int4(None), [x], tune="off")
    found = autoinfer.product_errors(program, new, params, [x[:4], x[4:]])
    assert [e.name for e in found] == ["a", "b"]
    inputs = {"a": x.astype(np.float64), "b": np.tanh(x.astype(np.float64) @ np.asarray(params["a"], np.float64))}
    for error in found:
        exact = inputs[error.name] @ np.asarray(params[error.name], np.float64)
        written = inputs[error.name] @ np.asarray(new[error.name].dequantize(), np.float64)
        assert error.size == pytest.approx(np.sum(exact**2), rel=1e-5)
        assert error.error == pytest.approx(np.sum((written - exact) ** 2), rel=1e-3)


@pytest.mark.parametrize(("scheme", "method"), [(Int8(), None), (Int8Dynamic(), None), (Int8(), SmoothQuant())])
def test_rounded_inputs_count(scheme, method) -> None:
    params, rng = _params(), np.random.default_rng(2)
    x = rng.normal(size=(16, 8)).astype(np.float32)

    def one(params, x):
        return x @ params["a"]

    program, new = quantize(one, params, scheme, [x], method=method, tune="off")
    (found,) = autoinfer.product_errors(program, new, params, [x])
    exact = x.astype(np.float64) @ np.asarray(params["a"], np.float64)
    assert found.error == pytest.approx(np.sum((np.asarray(program(new, x), np.float64) - exact) ** 2), rel=1e-2)
    only_weights = x.astype(np.float64) @ np.asarray(new["a"].dequantize(), np.float64)
    if method is None:
        assert found.error > 1.2 * np.sum((only_weights - exact) ** 2)


def test_steps_of_a_loop_are_added_up() -> None:
    params, rng = _params(), np.random.default_rng(3)
    x = rng.normal(size=(5, 3, 8)).astype(np.float32)

    def loop(params, x):
        def step(carry, row):
            return carry + 1, row @ params["a"]

        return jax.lax.scan(step, 0, x)[1]

    program, new = quantize(loop, params, Int4(None), [x], tune="off")
    assert isinstance(new["a"], Quantized)
    (found,) = autoinfer.product_errors(program, new, params, [x])
    difference = np.asarray(new["a"].dequantize(), np.float64) - np.asarray(params["a"], np.float64)
    assert found.error == pytest.approx(np.sum((x.reshape(-1, 8) @ difference) ** 2), rel=1e-3)


def test_without_batches_there_is_nothing_to_compare() -> None:
    params = _params()
    program, new = quantize(_two_layers, params, Int4(None), [np.ones((2, 8), np.float32)], tune="off")
    with pytest.raises(CalibrationError, match="no batch"):
        autoinfer.product_errors(program, new, params, [])
