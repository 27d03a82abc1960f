"""Random variables for a model, drawn with NumPy from the shapes of its parameters.

Flax's own initialisation compiles a program per model and changes with the version of JAX; this takes
milliseconds, gives the same numbers everywhere, and gives batch normalisation statistics and offsets that are
not 0 and 1, so that folding them wrongly shows.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import linen as nn


def random_variables(module: nn.Module, inputs: tuple[Any, ...], seed: int, gain: float) -> Any:
    """Variables of `module` that keep activations near unit size.

    Kernels have variance gain / fan-in; scales and variances lie in [0.5, 1.5]; the scale that closes a
    residual branch ("project") is a quarter of that, so that the sum over many blocks does not grow.

    Args:
        module: the model.
        inputs: example inputs, of which only shapes and dtypes matter.
        seed: of the generator.
        gain: 2 where ReLU halves the second moment, 1 elsewhere.

    Returns:
        The variables, as float32 NumPy arrays.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [key.key for key in path]
        return _draw(keys, leaf.shape, rng, gain).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _draw(keys: list[str], shape: tuple[int, ...], rng: np.random.Generator, gain: float) -> np.ndarray:
    match keys[-1]:
        case "kernel":
            split_heads = keys[-2] in ("query", "key", "value")
            fan_in = shape[0] if split_heads else np.prod(shape[:-1])
            return rng.standard_normal(shape) * np.sqrt(gain / fan_in)
        case "scale":
            closing = "project" in keys
            return rng.uniform(0.5, 1.5, shape) * (0.25 if closing else 1.0)
        case "var":
            return rng.uniform(0.5, 1.5, shape)
        case "bias" | "mean":
            return rng.standard_normal(shape) * 0.1
        case "embedding" | "position" | "segment" | "class_token":
            return rng.standard_normal(shape)
        case other:
            raise ValueError(f"no rule to draw the parameter {other!r} at {'/'.join(keys)}")
