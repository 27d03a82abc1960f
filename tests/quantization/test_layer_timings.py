"""Timings of forms: kept between calls, of equal layers taken once, and quantized only where pairs say it is faster."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer
from jaxinfer.quantization import measure, quantize
from jaxinfer.search.cache import Cache
from jaxinfer.search.measure import PairedRatio


@pytest.fixture
def cache(tmp_path, monkeypatch):
    found = Cache(tmp_path)
    monkeypatch.setattr(quantize, "default_cache", lambda: found)
    yield found
    found.close()


@pytest.fixture
def timed(monkeypatch):
    """How many forms were timed at each call; nothing is run, and each takes a microsecond less than the last."""
    calls = []

    def time_candidates(fns, **_):
        calls.append(len(fns))
        return [1e-6 * (len(fns) - i) for i in range(len(fns))]

    monkeypatch.setattr(measure, "_call", lambda *_: None)
    monkeypatch.setattr(measure, "time_candidates", time_candidates)
    monkeypatch.setattr(measure, "compare", lambda *_, **__: PairedRatio(0.5, 0.4, 0.6, 8, 2.0, 1.0))
    return calls


def _layers(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def _params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(24, 24)).astype(np.float32) for name in "ab"}


def test_timings_are_kept_and_equal_layers_timed_once(cache, timed) -> None:
    x = np.ones((4, 24), np.float32)
    first, _ = autoinfer.quantize(_layers, _params(), autoinfer.Int8Dynamic(), [x])
    assert len(timed) == 1
    again, _ = autoinfer.quantize(_layers, _params(), autoinfer.Int8Dynamic(), [x])
    assert len(timed) == 1
    assert [r.seconds for r in again.explain().layers] == [r.seconds for r in first.explain().layers]
    autoinfer.quantize(_layers, _params(), autoinfer.Int8Dynamic(), [x[:2]])
    autoinfer.quantize(_layers, _params(), autoinfer.Int8Weights(), [x])
    assert len(timed) == 3
    autoinfer.quantize(_layers, _params(), autoinfer.Int8Dynamic(), [x], tune="off")
    assert len(timed) == 3


def test_what_cannot_be_timings_is_not_used(cache, timed) -> None:
    x = np.ones((4, 24), np.float32)
    autoinfer.quantize(_layers, _params(), autoinfer.Int8Dynamic(), [x])
    (name,) = _keys(cache)
    stored = cache.get(name)
    for wrong in ([1], dict.fromkeys(stored, -1.0), {**stored, "another": 1.0}):
        cache.put(name, wrong)
        autoinfer.quantize(_layers, _params(), autoinfer.Int8Dynamic(), [x])
        assert cache.get(name) == stored
    assert len(timed) == 4


def _keys(cache):
    cache.get("")
    return [key for (key,) in cache._connection.execute("SELECT key FROM entries")]


@pytest.mark.parametrize(("high", "is_quantized"), [(0.6, True), (0.99, True), (1.01, False)])
def test_pairs_decide(cache, timed, monkeypatch, high, is_quantized) -> None:
    """A form that looked faster alone is taken only if the bound of pairs says that it is."""
    monkeypatch.setattr(measure, "compare", lambda *_, **__: PairedRatio(0.5, 0.4, high, 8, 2.0, 1.0))
    q, _ = autoinfer.quantize(_layers, _params(), autoinfer.Int8Dynamic(), [np.ones((4, 24), np.float32)])
    for layer in q.explain().layers:
        assert layer.is_quantized == is_quantized
        fastest = min(t for form, t in layer.seconds.items() if form != "float")
        assert fastest == pytest.approx(layer.seconds["float"] * (0.5 if is_quantized else 1.01))


def test_products_in_turn_are_those_products() -> None:
    """What waits for what does not change the results: the largest of them comes out."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 5)).astype(np.float32)
    weights = [rng.normal(size=(5, 4)).astype(np.float32) for _ in range(4)]
    found = jax.jit(measure._in_turn(lambda x, w: x @ w))(x, weights)
    np.testing.assert_allclose(found, np.max([x @ w for w in weights], 0), rtol=1e-5, atol=1e-6)
