"""Rounding that is trained through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.quantization.aware import quantization_aware
from jaxinfer.quantization.learned_steps import rounded
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.scheme import BF16, Format, Int4, Int8, Int8Dynamic, Override, Scheme, SchemeError


def _derivatives(v: np.ndarray, s: float, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """By v and s of each entry: equation 3 of the paper, and the straight-through estimate."""
    inside = (v / s > low) & (v / s < high)
    by_step = np.where(inside, np.round(v / s) - v / s, np.where(v / s <= low, low, high))
    return inside.astype(np.float64), by_step


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-128, 127)])
@pytest.mark.parametrize("sign", [1, -1])
def test_derivatives_are_those_of_the_paper(low, high, sign) -> None:
    rng = np.random.default_rng(0)
    v, s = rng.normal(size=200).astype(np.float32) * 20, np.float32(0.9)
    cotangent = rng.normal(size=200).astype(np.float32)

    def value(v, s):
        return jnp.sum(cotangent * rounded(v, s, low, high, v.size))

    by_v, by_s = jax.grad(value, (0, 1))(v, sign * s)
    inside, by_step = _derivatives(v.astype(np.float64), float(s), low, high)
    np.testing.assert_allclose(by_v, cotangent * inside, rtol=1e-6)
    np.testing.assert_allclose(by_s, sign * np.sum(cotangent * by_step) / np.sqrt(200 * high), rtol=1e-3)
    np.testing.assert_allclose(
        rounded(v, s, low, high, v.size), np.clip(np.round(v / s), low, high) * s, rtol=1e-6, atol=1e-6
    )


def _network(params, x):
    return jnp.maximum(x @ params["a"] + params["b"], 0) @ params["c"]


def _params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    shapes = {"a": (8, 24), "b": (24,), "c": (24, 2)}
    return {k: jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for k, s in shapes.items()}


X = np.random.default_rng(2).normal(size=(32, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "scheme",
    [Int4(8, affine=True), Int8(), Int8(affine=False), Int8Dynamic()],
    ids=str,
)
def test_it_computes_what_the_quantized_program_computes(scheme) -> None:
    params = _params()
    program, trainable = quantization_aware(_network, params, scheme, [X])
    trainable["weights"] = {k: 0.8 * v for k, v in trainable["weights"].items()}
    trainable["activations"] = {k: 0.9 * v for k, v in trainable["activations"].items()}
    settled = program.settled(trainable)
    fast, new = quantize(_network, settled.params, settled.scheme, [X], method=settled.method, tune="off")
    found, want = program(trainable, X), fast(new, X)
    # A code may go to either neighbour where float32 rounds the other way.
    assert np.mean(np.abs(found - want) > 1e-4) < 0.1
    assert np.abs(found - want).max() < 0.05 * np.abs(want).max()


def test_training_recovers_what_rounding_loses() -> None:
    params = _params()
    target = _network(params, X)

    def loss(params, x):
        return jnp.mean((_network(params, x) - target) ** 2)

    scheme = Scheme(Format("int4", "tensor"), overrides=(Override("c", Int8()),))
    program, trainable = quantization_aware(loss, params, scheme, [X])
    assert set(trainable["weights"]) == {"a", "c"} and set(trainable["activations"]) == {"c"}
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))

    def step(carry, _):
        now, state = carry
        value, gradients = jax.value_and_grad(program)(now, X)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(now, updates), state), value

    start = (trainable, optimizer.init(trainable))
    (trained, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, None, 400))(start)
    assert losses[-10:].mean() < 0.5 * losses[0]
    assert all(not np.allclose(trained["weights"][k], trainable["weights"][k]) for k in ("a", "c"))
    settled = program.settled(trained)
    fast, new = quantize(_network, settled.params, settled.scheme, [X], method=settled.method, tune="off")
    assert np.mean((fast(new, X) - target) ** 2) < 0.6 * losses[0]


def test_only_integers_learn_steps() -> None:
    with pytest.raises(SchemeError, match="bf16"):
        quantization_aware(_network, _params(), BF16(), [X])
