"""Weights in two factors: accurate as asked, against decompositions by hand; the program around them unchanged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.sparsity.factors import Factors


def _low(rng: np.random.Generator, *shape: int, rank: int) -> np.ndarray:
    """An array of that rank, the last axis against all others."""
    rows = int(np.prod(shape[:-1]))
    return (rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, shape[-1]))).reshape(shape).astype(np.float32)


def _dense(params, x):
    hidden = jax.nn.relu(x @ params["first"] + params["bias"])
    return jnp.tanh(hidden @ params["second"].T)


def _convolution(params, x):
    y = lax.conv_general_dilated(
        x, params["kernel"], (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(y).mean((1, 2))


def _recurrent(params, x):
    def step(h, x):
        h = jnp.tanh(h @ params["hidden"] + x @ params["input"])
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[0], params["hidden"].shape[0])), jnp.swapaxes(x, 0, 1))[1].swapaxes(0, 1)


def _programs():
    rng = np.random.default_rng(0)
    bias = rng.normal(size=40).astype(np.float32)
    yield _dense, {"first": _low(rng, 32, 40, rank=3), "second": _low(rng, 24, 40, rank=4), "bias": bias}, (32,)
    yield _convolution, {"kernel": _low(rng, 3, 3, 8, 24, rank=4)}, (9, 10, 8)
    yield _recurrent, {"hidden": 0.1 * _low(rng, 32, 32, rank=3), "input": _low(rng, 16, 32, rank=2)}, (5, 16)


@pytest.mark.parametrize(("fun", "params", "shape"), list(_programs()), ids=lambda p: getattr(p, "__name__", ""))
def test_weights_of_low_rank_become_factors_without_loss(fun, params, shape) -> None:
    rng = np.random.default_rng(1)
    batches = [rng.normal(size=(64, *shape)).astype(np.float32) for _ in range(2)]
    small, factored = autoinfer.low_rank(fun, params, batches, error=1e-3, multiple_of=1, tune="off")

    count = sum(isinstance(x, Factors) for x in jax.tree.leaves(factored, is_leaf=lambda x: isinstance(x, Factors)))
    assert count == sum(x.ndim > 1 for x in params.values())
    assert sum(x.size for x in jax.tree.leaves(factored)) < sum(x.size for x in params.values()) / 1.5
    for size in (1, 3):
        x = rng.normal(size=(size, *shape)).astype(np.float32)
        np.testing.assert_allclose(small(factored, x), fun(params, x), rtol=2e-3, atol=2e-3)


def test_errors_are_those_of_the_outputs_and_the_least_rank_is_taken() -> None:
    rng = np.random.default_rng(2)
    params = {"w": rng.normal(size=(24, 20)).astype(np.float32) @ np.diag(0.6 ** np.arange(20)).astype(np.float32)}
    # Inputs lie near a subspace: the weights' own decomposition would not do.
    x = (rng.normal(size=(400, 24)) * 0.7 ** np.arange(24)[::-1]).astype(np.float32)
    small, factored = autoinfer.low_rank(lambda p, x: x @ p["w"], params, [x], error=0.05, multiple_of=1, tune="off")

    (layer,) = small.report.layers
    want = x.astype(np.float64) @ params["w"]
    error = np.linalg.norm(np.asarray(small(factored, x), np.float64) - want) / np.linalg.norm(want)
    np.testing.assert_allclose(error, layer.error, rtol=1e-2)
    assert error <= 0.05
    # No factors of that rank do better, and none of a lower rank is within the budget (Eckart and Young).
    tails = np.sqrt(np.cumsum(np.linalg.svd(want, compute_uv=False)[::-1] ** 2)[::-1]) / np.linalg.norm(want)
    np.testing.assert_allclose(error, tails[layer.rank], rtol=1e-2)
    assert tails[layer.rank - 1] > 0.05


def test_full_rank_weights_stay() -> None:
    rng = np.random.default_rng(3)
    params = {"w": rng.normal(size=(16, 16)).astype(np.float32)}
    x = rng.normal(size=(50, 16)).astype(np.float32)
    small, same = autoinfer.low_rank(lambda p, x: x @ p["w"], params, [x], error=0.01, tune="off")
    assert small.report.layers[0].rank is None
    assert "two products would be more work" in small.report.layers[0].reason
    np.testing.assert_array_equal(same["w"], params["w"])
    np.testing.assert_allclose(small(same, x), x @ params["w"], rtol=1e-5, atol=1e-5)


def test_parameters_read_twice_or_otherwise_stay() -> None:
    rng = np.random.default_rng(4)
    params = {"tied": _low(rng, 16, 16, rank=1), "added": _low(rng, 16, 16, rank=1)}

    def fun(p, x):
        return (x @ p["tied"]) @ p["tied"].T + x @ (p["added"] + 1)

    x = rng.normal(size=(50, 16)).astype(np.float32)
    small, same = autoinfer.low_rank(fun, params, [x], tune="off")
    assert not small.report.layers
    np.testing.assert_allclose(small(same, x), fun(params, x), rtol=1e-4, atol=1e-3)


def test_composes() -> None:
    rng = np.random.default_rng(5)
    params = {"w": _low(rng, 16, 12, rank=2)}

    def fun(p, x):
        return jnp.sin(x @ p["w"])

    x = rng.normal(size=(30, 16)).astype(np.float32)
    small, factored = autoinfer.low_rank(fun, params, [x], error=1e-3, multiple_of=1, tune="off")
    want = jax.grad(lambda x: fun(params, x).sum())(x)
    np.testing.assert_allclose(jax.grad(lambda x: small(factored, x).sum())(x), want, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(
        jax.vmap(small, (None, 0))(factored, x[:, None])[:, 0], fun(params, x), rtol=1e-3, atol=1e-3
    )
    slopes = jax.grad(lambda p: small(p, x).sum())(factored)
    assert jax.tree.structure(slopes) == jax.tree.structure(factored)
    np.testing.assert_allclose(autoinfer.optimize(small)(factored, x), fun(params, x), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_done_is_said() -> None:
    params, x = {"w": np.ones((4, 4), np.float32)}, np.ones((2, 4), np.float32)

    def fun(p, x):
        return x @ p["w"]

    with pytest.raises(ValueError, match="share of the norm"):
        autoinfer.low_rank(fun, params, [x], error=1.0)
    with pytest.raises(ValueError, match="one batch at least"):
        autoinfer.low_rank(fun, params, [])
    with pytest.raises(ValueError, match=r"batch 1 .* not finite"):
        autoinfer.low_rank(fun, params, [x, x * np.nan], tune="off")
    small, _ = autoinfer.low_rank(fun, {"w": np.ones((16, 16), np.float32)}, [np.ones((2, 16), np.float32)])
    with pytest.raises(ValueError, match="expected 1 parameters, got 0"):
        small({}, x)


def test_timed_forms_are_kept_only_where_they_are_faster(monkeypatch) -> None:
    rng = np.random.default_rng(6)
    params = {"first": _low(rng, 64, 64, rank=4), "second": _low(rng, 64, 64, rank=4)}
    timed = iter([[2.0, 1.0], [1.0, 0.97]])
    monkeypatch.setattr("jaxinfer.sparsity.low_rank.time_candidates", lambda forms, budget_s: next(timed))

    def fun(p, x):
        return (x @ p["first"]) @ p["second"]

    x = rng.normal(size=(128, 64)).astype(np.float32)
    small, factored = autoinfer.low_rank(fun, params, [x], error=1e-2)
    assert isinstance(factored["first"], Factors)
    assert not isinstance(factored["second"], Factors)
    assert [(layer.before_s, layer.after_s) for layer in small.explain().layers] == [(2.0, 1.0), (1.0, 0.97)]


def test_programs_with_refs_are_refused_by_the_public_error() -> None:
    def fun(p, x):
        ref = jax.new_ref(x)
        ref[...] += 1.0
        return ref[...] @ p["w"]

    params, x = {"w": np.ones((4, 4), np.float32)}, np.ones((2, 4), np.float32)
    with pytest.raises(autoinfer.ShrinkError, match="Refs"):
        autoinfer.low_rank(fun, params, [x])
    with pytest.raises(autoinfer.ShrinkError, match="Refs"):
        autoinfer.shrink(fun, params, {"w": np.ones((4, 4), bool)}, x)
