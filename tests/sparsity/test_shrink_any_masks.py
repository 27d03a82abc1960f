"""Whatever the masks, the shrunk program equals the masked one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from shrinking import check, random_tree

from jaxinfer import autoinfer


def dense(p: Any, x: Any) -> Any:
    """A residual block with normalization, a gate, and a head that shares the first kernel."""
    h = x @ p["stem"] + p["stem_bias"]
    mean = h.mean(-1, keepdims=True)
    n = (h - mean) * lax.rsqrt(((h - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["shift"]
    up, gate = jnp.split(n @ p["up"] + p["up_bias"], 2, axis=-1)
    h = h + (jax.nn.silu(gate) * up) @ p["down"]
    return h @ p["stem"].T, jnp.concatenate([h, up], -1).max(-1)


DENSE = {
    "stem": (3, 5),
    "stem_bias": (5,),
    "scale": (5,),
    "shift": (5,),
    "up": (5, 8),
    "up_bias": (8,),
    "down": (4, 5),
}


def convolutional(p: Any, x: Any) -> Any:
    """Convolutions: padded, depthwise, in groups; flattened; and what is added to it."""

    def conv(x: Any, w: Any, groups: int = 1) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    h = jax.nn.sigmoid(conv(x, p["a"]) + p["b"])
    h = jax.nn.relu(conv(h, p["depth"], 4) + p["d"]) + h
    h = jnp.tanh(conv(h, p["grouped"], 2))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return h.reshape(h.shape[0], -1) @ p["out"]


CONVOLUTIONAL = {
    "a": (3, 3, 2, 4),
    "b": (4,),
    "depth": (3, 3, 1, 4),
    "d": (4,),
    "grouped": (3, 3, 2, 6),
    "out": (6, 2),
}


def recurrent(p: Any, x: Any) -> Any:
    """A gated recurrence whose state starts from a parameter, and attention over its steps."""

    def step(h: Any, now: Any) -> Any:
        z, n = jnp.split(now @ p["w"] + h @ p["u"] + p["b"], 2, axis=-1)
        h = jax.nn.sigmoid(z) * h + (1 - jax.nn.sigmoid(z)) * jnp.tanh(n)
        return h, h

    start = jnp.broadcast_to(p["start"], (x.shape[0], 4))
    _, hs = lax.scan(step, start, jnp.swapaxes(x, 0, 1))
    q, k = (jnp.einsum("tbd,dhe->bthe", hs, p[n]) for n in ("q", "k"))
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k), -1)
    return jnp.einsum("bhts,sbd,hdo->bto", weights, hs, p["out"])


RECURRENT = {
    "w": (3, 8),
    "u": (4, 8),
    "b": (8,),
    "start": (4,),
    "q": (4, 2, 3),
    "k": (4, 2, 3),
    "out": (2, 4, 3),
}

PROGRAMS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "dense": (dense, DENSE, (2, 3)),
    "convolutional": (convolutional, CONVOLUTIONAL, (2, 3, 3, 2)),
    "recurrent": (recurrent, RECURRENT, (2, 3, 3)),
}


@st.composite
def masks_of(draw: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """For each parameter nothing, single entries, whole slices along some axes, or both."""
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(draw(st.integers(0, 10**6)))
        kind = draw(st.sampled_from(["none", "entries", "slices", "slices", "both", "most"]))
        mask = np.ones(shape, bool)
        if kind in ("entries", "both"):
            mask &= rng.random(shape) < 0.7
        if kind in ("slices", "both", "most"):
            for axis in range(len(shape)):
                keep = rng.random(shape[axis]) < (0.3 if kind == "most" else 0.6)
                mask &= keep.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        found[name] = None if kind == "none" else mask
    return found


def run(name: str, masks: Any) -> None:
    fun, shapes, inputs = PROGRAMS[name]
    params = random_tree(**shapes)
    x = jnp.asarray(np.random.default_rng(7).standard_normal(inputs))
    try:
        small, small_params = check(fun, params, masks, x)
    except ValueError as error:
        assert "cut every path" in str(error)
        return
    # What is masked altogether and goes is not among the small arrays; what is left has the masks it had.
    for leaf in small.report.leaves:
        kept = small.kept[leaf.name]
        mask = np.ones(leaf.shape, bool) if masks[leaf.name] is None else masks[leaf.name]
        np.testing.assert_allclose(
            small_params[leaf.name], np.where(mask, params[leaf.name], 0)[np.ix_(*kept)], rtol=0, atol=0
        )


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_masks(name: str, data: Any) -> None:
    with jax.enable_x64(True):
        run(name, data.draw(masks_of(PROGRAMS[name][1])))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_masks(name: str, data: Any) -> None:
    with jax.enable_x64(True):
        run(name, data.draw(masks_of(PROGRAMS[name][1])))


def test_masks_from_a_learner_of_entries_lose_nothing() -> None:
    fun, shapes, inputs = PROGRAMS["dense"]
    with jax.enable_x64(True):
        params = random_tree(**shapes)
        masks = {name: np.abs(leaf) > 0.1 for name, leaf in params.items()}
        small, small_params = autoinfer.shrink(fun, params, masks, jnp.ones(inputs))
        assert jax.tree.map(jnp.shape, small_params) == shapes
        np.testing.assert_array_equal(small.masks["up"], masks["up"])
