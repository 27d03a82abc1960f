"""What convolutions come to in float64, and how far from it sums in float32 may be."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.native import Tail, Window, library, pack, packed_convolution

EVERYWHERE, AS_THEY_ARE = Window(), Tail()
_EPSILON = 2.0**-24  # half a unit in the last place of a float32


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 values."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def packed(x: Any, w: Any, window: Window = EVERYWHERE, tail: Tail = AS_THEY_ARE, panel: int | None = None) -> Any:
    """A convolution by the kernel, of weights [a, b, k, features] and a bias [features].

    Panels are as wide as the kernel's, or as ``panel`` says where there is none.
    """
    features, panel = w.shape[-1], panel or library().panel
    if tail.bias is not None:
        tail = tail._replace(bias=jnp.pad(tail.bias, (0, -features % panel)))
    return packed_convolution(x, pack(w, panel), features, window, tail)


def exact(x: Any, w: Any, window: Window = EVERYWHERE, tail: Tail = AS_THEY_ARE) -> tuple[np.ndarray, np.ndarray]:
    """A convolution in float64, and the largest error of one whose sums are rounded to float32 at every step.

    Args:
        x: [images, height, width, k].
        w: [a, b, k, c], or [a, b, k] for each channel under a window of its own.
        window: how the window moves.
        tail: what becomes of the sums.
    """
    sums, terms = _sums(x, w, window), _sums(np.abs(x), np.abs(w), window)
    for term in (tail.bias, tail.addend):
        if term is not None:
            sums, terms = sums + np.asarray(term, np.float64), terms + np.abs(np.asarray(term, np.float64))
    steps = w.shape[0] * w.shape[1] * (w.shape[2] if w.ndim == 4 else 1) + 2
    with np.errstate(invalid="ignore"):
        return np.minimum(np.maximum(sums, tail.low), tail.high), 1.01 * steps * _EPSILON * terms


def _sums(x: Any, w: Any, window: Window) -> np.ndarray:
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    images = np.pad(x, ((0, 0), *window.padding, (0, 0)))
    steps, apart = window.strides, window.dilation
    reach = [(w.shape[i] - 1) * apart[i] + 1 for i in (0, 1)]
    height, width = (max(0, (images.shape[1 + i] - reach[i]) // steps[i] + 1) for i in (0, 1))
    total = np.zeros((len(x), height, width, w.shape[-1]))
    for a in range(w.shape[0]):
        for b in range(w.shape[1]):
            rows = images[:, a * apart[0] :][:, :: steps[0]][:, :height]
            seen = rows[:, :, b * apart[1] :][:, :, :: steps[1]][:, :, :width]
            if total.size:
                with np.errstate(invalid="ignore"):
                    total += seen @ w[a, b] if w.ndim == 4 else seen * w[a, b]
    return total


def assert_close(have: Any, x: Any, w: Any, window: Window = EVERYWHERE, tail: Tail = AS_THEY_ARE) -> None:
    """Asserts that a result is the convolution, but for what rounding explains; NaN and ∞ are where they should be."""
    want, error = exact(x, w, window, tail)
    assert have.shape == want.shape and have.dtype == np.float32
    have, finite = np.asarray(have), np.isfinite(want)
    np.testing.assert_array_equal(have[~finite], want[~finite])
    with np.errstate(invalid="ignore"):
        wrong = finite & ~(np.abs(have - want) <= np.where(np.isfinite(error), error, 0))
    assert not wrong.any(), f"{have[wrong][:5]} should be {want[wrong][:5]}, within {error[wrong][:5]}"
