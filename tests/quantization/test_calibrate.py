"""Calibration: figures against NumPy, batches that nothing can be learned from, ranges that observers choose."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.graph.retrace import Program
from jaxinfer.quantization.calibrate import CalibrationError, Wanted, calibrate
from jaxinfer.quantization.observers import BINS, KL, MSE, AbsMax, Percentile, Seen


def _dense(params, x):
    return jnp.maximum(x @ params["first"], 0) @ params["second"]


def _recurrent(params, x):
    def step(h, x):
        h = jnp.tanh(h @ params["first"] + x)
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[0], 6)), jnp.swapaxes(x, 0, 1))[0] @ params["second"]


def _params(rng, k=6):
    return {"first": rng.normal(size=(k, 6)).astype(np.float32), "second": rng.normal(size=(6, 3)).astype(np.float32)}


def _run(fun, params, batches, wanted):
    shapes = [np.shape(params[name]) for name in sorted(params)]
    return calibrate(Program(fun, shapes, TypeError), sorted(params), params, batches, wanted)


def test_figures_are_those_of_all_batches() -> None:
    rng = np.random.default_rng(0)
    params = _params(rng, 5)
    batches = [rng.normal(size=(n, 5)).astype(np.float32) * n for n in (4, 7, 1)]
    found = _run(_dense, params, iter(batches), {0: Wanted(True, True, True), 1: Wanted()})
    x = np.concatenate(batches).astype(np.float64)
    first = found[0]
    assert (first.seen.low, first.seen.high, first.rows) == (x.min(), x.max(), len(x))
    np.testing.assert_allclose(first.gram, x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(first.sums, x.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(first.largest, np.abs(x).max(0), rtol=1e-6)
    np.testing.assert_allclose(first.lows, x.min(0), rtol=1e-6)
    np.testing.assert_allclose(first.highs, x.max(0), rtol=1e-6)
    assert first.seen.counts.sum() == x.size and first.seen.reach == pytest.approx(np.abs(x).max())
    # Every entry is counted within two bins of where it is.
    ends = np.linspace(-first.seen.reach, first.seen.reach, BINS + 1)
    below = np.array([(x <= e).sum() for e in ends[1:]])
    counted = np.cumsum(first.seen.counts)
    assert (counted >= np.roll(below, 2)[2:].min()).all()
    assert (np.abs(counted[2:-2] - below[2:-2]) <= below[4:] - below[:-4]).all()
    hidden = np.maximum(x @ params["first"], 0)
    assert found[1].seen.high == pytest.approx(hidden.max(), rel=1e-5) and found[1].gram is None


def test_loops_are_looked_into() -> None:
    rng = np.random.default_rng(1)
    params = _params(rng)
    x = rng.normal(size=(3, 5, 6)).astype(np.float32)
    found = _run(_recurrent, params, [x], {0: Wanted(gram=True)})
    h, states = np.zeros((3, 6)), []
    for t in range(5):
        states.append(h)
        h = np.tanh(h @ params["first"] + x[:, t])
    rows = np.concatenate(states)
    assert found[0].rows == 15
    np.testing.assert_allclose(found[0].gram, rows.T @ rows, rtol=1e-4, atol=1e-5)
    assert found[0].seen.low == pytest.approx(rows.min(), rel=1e-5)


def _with(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x.flat[3] = value
    return x


_GOOD = np.ones((2, 5), np.float32)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration data"),
        (_GOOD, "put a single one into a list"),
        ([_GOOD, _with(_GOOD, np.nan)], r"batch 1 .* NaN"),
        ([_with(_GOOD, -np.inf)], r"batch 0 .* infinity"),
        ([_GOOD, np.ones((0, 5), np.float32)], r"batch 1 .* empty"),
        ([_GOOD, ()], r"batch 1 .* empty"),
        ([_GOOD, np.ones((2, 4), np.float32)], r"batch 1 .* does not fit"),
        ([np.ones((2, 4), np.float32)], r"batch 0 .* does not fit"),
        ([_GOOD, np.ones((2, 2, 5), np.float32)], r"batch 1.* shape \(2, 2, 5\)"),
        ([_GOOD, np.ones((2, 5), np.int32)], r"batch 1.* int32"),
        ([_GOOD, (_GOOD, _GOOD)], r"batch 1 .* another structure"),
        ([_GOOD, np.full((2, 5), 3e38, np.float32)], r"batch 1 .* not finite"),
    ],
)
def test_bad_batches_are_named(batches, message) -> None:
    params = {"first": np.full((5, 6), 9.0, np.float32), "second": np.ones((6, 3), np.float32)}
    with pytest.raises(CalibrationError, match=message):
        autoinfer.quantize(_dense, params, autoinfer.Int8(), batches, tune="off")


def _seen(x: np.ndarray) -> Seen:
    reach = float(np.abs(x).max())
    counts, _ = np.histogram(x, BINS, (-reach, reach))
    return Seen(float(x.min()), float(x.max()), counts.astype(np.float64), reach)


def _error(x: np.ndarray, low: float, high: float, levels: int) -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (levels - 1)
    return float(np.mean((np.clip(np.round((x - low) / step), 0, levels - 1) * step + low - x) ** 2))


def test_observers_choose_as_defined() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=200_000)
    x[:3] = [40.0, -35.0, 50.0]
    seen = _seen(x)
    assert AbsMax().range(seen, 256, False) == (-50.0, 50.0)
    assert AbsMax().range(seen, 256, True) == (-35.0, 50.0)
    low, high = Percentile(99.0).range(seen, 256, False)
    assert low == -high and high == pytest.approx(np.quantile(np.abs(x), 0.99), abs=0.05)
    low, high = Percentile(99.0).range(seen, 256, True)
    assert (low, high) == pytest.approx(tuple(np.quantile(x, [0.005, 0.995])), abs=0.06)
    assert Percentile(100.0).range(seen, 256, True) == (-35.0, 50.0)
    for observer in (MSE(), KL()):
        low, high = observer.range(seen, 16, False)
        assert low == -high and 1.5 < high < 12, observer
    # No narrower or wider range has an error that is clearly less.
    _, high = MSE().range(seen, 16, False)
    best = min(_error(x, -h, h, 16) for h in np.linspace(0.5, 50, 300))
    assert _error(x, -high, high, 16) < 1.1 * best


@pytest.mark.parametrize("observer", [AbsMax(), Percentile(), MSE(), KL()], ids=lambda o: type(o).__name__)
def test_observers_take_any_values(observer) -> None:
    for x in (np.zeros(10), np.full(5, 3.0), np.array([-1e-30, 0.0]), np.linspace(0, 1, 1000)):
        low, high = observer.range(
            _seen(x) if x.any() else Seen(0.0, 0.0, np.eye(1, BINS, BINS // 2)[0], 0.0), 256, True
        )
        assert np.isfinite([low, high]).all() and low <= high
