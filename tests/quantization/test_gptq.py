"""GPTQ, against a plain implementation that solves for the free rows at every step, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.quantization.gptq import Rounding, gptq
from jaxinfer.quantization.scheme import Format, Group

COUNT, CHANNELS, ROWS = 24, 5, 60


def _correlated(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(COUNT, COUNT)) @ np.diag(np.geomspace(1, 0.02, COUNT)) @ rng.normal(size=(COUNT, COUNT))
    return rng.normal(size=(ROWS, COUNT)) @ mixing, rng.normal(size=(COUNT, CHANNELS))


def _plain(w: np.ndarray, h: np.ndarray, nearest, order: np.ndarray) -> np.ndarray:
    """Rows are fixed one by one; those left solve the normal equations of what is still to be made good."""
    fixed: list[int] = []
    result = w.copy()
    for i in order:
        result[i] = nearest(i, result[i])
        fixed.append(int(i))
        free = [j for j in range(len(w)) if j not in fixed]
        difference = w[fixed] - result[fixed]
        result[free] = w[free] + np.linalg.solve(h[np.ix_(free, free)], h[np.ix_(free, fixed)] @ difference)
    return result


def _scales(w: np.ndarray, bits: int = 4) -> np.ndarray:
    return (np.abs(w).max(0) / (2 ** (bits - 1) - 1)).astype(np.float32)


def _loss(x: np.ndarray, w: np.ndarray, rounded: np.ndarray) -> float:
    return float(np.sum((x @ (w - rounded)) ** 2))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [5, 128])
def test_it_equals_a_plain_implementation(act_order, block, monkeypatch) -> None:
    monkeypatch.setattr("jaxinfer.quantization.gptq._BLOCK", block)
    x, w = _correlated()
    gram, scale = x.T @ x, _scales(w)
    order = np.argsort(-np.diag(gram)) if act_order else np.arange(COUNT)
    numbers = np.broadcast_to(np.arange(CHANNELS), w.shape)
    got = gptq(w, gram, Rounding(Format("int4"), numbers, scale, None, False), order, 0.01)
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(COUNT)
    s = scale.astype(np.float64)
    want = _plain(w, damped, lambda i, row: np.clip(np.round(row / s), -8, 7) * s, order)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
    nearest = np.clip(np.round(w / s), -8, 7) * s
    assert _loss(x, w, got) < 0.5 * _loss(x, w, nearest)


@pytest.mark.parametrize("block", [5, 128])
def test_groups_get_scales_by_the_rows_they_have_by_then(block, monkeypatch) -> None:
    monkeypatch.setattr("jaxinfer.quantization.gptq._BLOCK", block)
    x, w = _correlated(1)
    gram, size = x.T @ x, 10
    form = Format("int4", Group(size))
    groups = -(-COUNT // size)
    numbers = (np.arange(COUNT) // size)[:, None] * CHANNELS + np.arange(CHANNELS)
    rounding = Rounding(form, numbers, np.ones(groups * CHANNELS), None, False)
    got = gptq(w, gram, rounding, np.arange(COUNT), 0.01, settled=False)

    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(COUNT)
    work, scale = w.copy(), np.ones(CHANNELS)
    for i in range(COUNT):
        if i % size == 0:
            scale = _scales(work[i : i + size]).astype(np.float64)
        before = work[i].copy()
        work[i] = np.clip(np.round(before / scale), -8, 7) * scale
        inverse = np.linalg.inv(damped[i:, i:])
        work[i + 1 :] -= np.outer(inverse[1:, 0] / inverse[0, 0], before - work[i])
    np.testing.assert_allclose(got, work, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", ["fp8_e4m3", "bf16"])
def test_floats_too(number) -> None:
    x, w = _correlated(2)
    form = Format(number, "tensor")
    scale = np.float32([np.abs(w).max() / form.high]) if form.has_scale else None
    rounding = Rounding(form, np.zeros(w.shape, int), scale, None, False)
    got = gptq(w, x.T @ x, rounding, np.arange(COUNT), 0.01)
    nearest = np.stack([rounding.row(i, row) for i, row in enumerate(w)])
    np.testing.assert_array_equal(np.stack([rounding.row(i, row) for i, row in enumerate(got)]), got)
    assert _loss(x, w, got) < _loss(x, w, nearest)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    _, w = _correlated()
    scale = _scales(w)
    rounding = Rounding(Format("int4"), np.broadcast_to(np.arange(CHANNELS), w.shape), scale, None, False)
    s = scale.astype(np.float64)
    got = gptq(w, np.zeros((COUNT, COUNT)), rounding, np.arange(COUNT), 0.01)
    np.testing.assert_allclose(got, np.clip(np.round(w / s), -8, 7) * s, rtol=1e-12)
