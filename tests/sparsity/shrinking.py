"""What tests of `shrink` share: masks, a small network, and the masked program to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.sparsity.groups import Groups

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


@contextmanager
def precision(dtype: Any) -> Iterator[None]:
    """The configuration in which arrays of a type can be made."""
    with jax.enable_x64(jnp.dtype(dtype) == jnp.float64):
        yield


def masked(params: Any, masks: Any) -> Any:
    """Parameters with zeros where masks are False."""

    def one(mask: Any, subtree: Any) -> Any:
        return subtree if mask is None else jnp.where(mask, subtree, jnp.zeros((), subtree.dtype))

    return jax.tree.map(one, masks, params, is_leaf=lambda node: node is None)


def pruned(groups: Groups, share: float, seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """Masks that remove a share of the units of each group, rounded up, at random; and what they keep by group."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in groups:
        gone = min(int(np.ceil(share * group.size)), group.size - 1)
        kept[group.name] = np.ones(group.size, bool)
        kept[group.name][rng.permutation(group.size)[:gone]] = False
    return groups.masks(kept), kept


def error(fun: Callable[..., Any], params: Any, masks: Any, small: Any, small_params: Any, *args: Any) -> float:
    """Largest difference from the masked program, relative to the largest result of its array."""
    want = jax.tree.leaves(jax.jit(fun)(masked(params, masks), *args))
    have = jax.tree.leaves(small(small_params, *args))
    worst = 0.0
    for w, h in zip(want, have, strict=True):
        assert w.shape == h.shape and w.dtype == h.dtype
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            np.testing.assert_array_equal(w, h)
        elif w.size:
            a, b = np.asarray(w, np.float64), np.asarray(h, np.float64)
            assert np.isfinite(a).all() and np.isfinite(b).all()
            assert np.abs(a).max() > 0
            worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
    return worst


def rounding(fun: Callable[..., Any], params: Any, masks: Any, *args: Any) -> float:
    """How far a masked program in float32 is from itself in float64, relative to the largest result of its array."""

    def wide(x: Any) -> Any:
        return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def results(params: Any, args: Any) -> list[np.ndarray]:
        return [np.asarray(y, np.float64) for y in jax.tree.leaves(jax.jit(fun)(masked(params, masks), *args))]

    have = results(params, args)
    with precision(jnp.float64):
        want = results(*jax.tree.map(wide, (params, args)))
    return max(float(np.abs(h - w).max() / np.abs(w).max()) for h, w in zip(have, want, strict=True))


def check(fun: Callable[..., Any], params: Any, masks: Any, *args: Any, shapes: Any = None) -> tuple[Any, Any]:
    """Shrinks a float64 program and compares it with the masked one; ``shapes`` are those its arrays must have."""
    small, small_params = autoinfer.shrink(fun, params, masks, *args)
    assert error(fun, params, masks, small, small_params, *args) <= TOLERANCE["float64"]
    if shapes is not None:
        assert jax.tree.map(lambda x: x.shape, small_params) == shapes
    return small, small_params


def random_tree(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Normal random arrays by name."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """A normal random array."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def without(size: int, *gone: int) -> np.ndarray:
    """A mask of a vector without some entries."""
    keep = np.ones(size, bool)
    keep[list(gone)] = False
    return keep


def columns(shape: tuple[int, ...], *gone: int, axis: int = -1) -> np.ndarray:
    """A mask without some slices along an axis."""
    mask = np.ones(shape, bool)
    np.moveaxis(mask, axis, 0)[list(gone)] = False
    return mask


def mlp(p: Any, x: Any) -> Any:
    """Three dense layers."""
    h = jax.nn.relu(x @ p["a"] + p["b"])
    h = jnp.tanh(h @ p["c"] + p["d"])
    return h @ p["e"] + p["f"]


MLP = {"a": (4, 8), "b": (8,), "c": (8, 6), "d": (6,), "e": (6, 3), "f": (3,)}


def mlp_masks(**masks: Any) -> dict[str, Any]:
    """Masks of some of its parameters."""
    return {**dict.fromkeys(MLP), **masks}


def conv(x: Any, w: Any, groups: int = 1, padding: str = "SAME", stride: int = 1) -> Any:
    """A convolution over channels-last images."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )
