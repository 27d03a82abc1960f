"""What a program to be shrunk is, and how its parameters and inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

OWN = "own"


@dataclass(frozen=True)
class Made:
    """A program ready to run.

    Attributes:
        fun: (params, *inputs) → arrays, every one of which has the batch as its leading axis.
        params: the tree to prune and shrink.
        inputs: batch size → the inputs.
    """

    fun: Callable[..., Any]
    params: Any
    inputs: Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class Program:
    """One line of the list.

    Attributes:
        name: of the program; unique.
        source: project and file the architecture was taken from, or OWN.
        make: the floating-point type of parameters and inputs → the program; float64 needs x64 enabled.
        tags: what is in it.
    """

    name: str
    source: str
    make: Callable[[Any], Made]
    tags: frozenset[str]

    @property
    def third_party(self) -> bool:
        return self.source != OWN


def listed(source: str, *tags: str) -> Callable[[Callable[[Any], Made]], Program]:
    """Turn the function that makes a program into its line of the list, under the function's own name."""

    def entry(make: Callable[[Any], Made]) -> Program:
        return Program(make.__name__, source, make, frozenset(tags))

    return entry


class Draw:
    """Random inputs of one floating-point type."""

    def __init__(self, dtype: Any, seed: int):
        self.dtype = dtype
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.standard_normal(shape), self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.uniform(low, high, shape), self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(low, high, shape), jnp.int32)


MakeInputs = Callable[[Draw, int], tuple[Any, ...]]


def given(inputs: MakeInputs, dtype: Any) -> Callable[[int], tuple[Any, ...]]:
    """Batch size → inputs: the same for the same batch size."""
    return lambda batch: inputs(Draw(dtype, 1000 + batch), batch)


def random_params(shapes: Any, dtype: Any, out_axis: int = -1, seed: int = 0) -> Any:
    """Values for a tree of things with a shape: no parameter is 0 or 1 throughout, activations keep unit size.

    Args:
        shapes: arrays or ShapeDtypeStructs; integer and boolean leaves are not allowed.
        dtype: of the values.
        out_axis: which axis of a matrix or kernel is its output; all others are summed over.
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{jax.tree_util.keystr(path)} is {leaf.dtype}, not a parameter")
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        name = next((name for name in reversed(names) if name and name not in ("value", "raw_value")), "")
        return jnp.asarray(_values(name, leaf.shape, out_axis, rng), dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _values(name: str, shape: tuple[int, ...], out_axis: int, rng: np.random.Generator) -> np.ndarray:
    if "scale" in name or "var" in name or (name in ("weight", "gamma") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape)
    if "bias" in name or "mean" in name or len(shape) < 2:
        return 0.2 * rng.standard_normal(shape)
    if "embed" in name or "token" in name:
        return rng.standard_normal(shape)
    fan_in = np.prod(shape) / shape[out_axis]
    return rng.standard_normal(shape) / np.sqrt(fan_in)


def plain(fun: Callable[..., Any], shapes: Any, inputs: MakeInputs, dtype: Any) -> Made:
    """A pure function of a tree of parameters, given as a tree of shapes (tuples of integers)."""
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=_is_shape)
    return Made(fun, random_params(tree, dtype), given(inputs, dtype))


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def linen(module: nn.Module, inputs: MakeInputs, dtype: Any) -> Made:
    """A Linen module; its variables, statistics included, are the parameters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs(Draw(dtype, 0), 2))
    return Made(module.apply, random_params(shapes, dtype), given(inputs, dtype))


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], inputs: MakeInputs, dtype: Any) -> Made:
    """An NNX module split into its state, which is the parameters, and a function."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def fun(state: Any, *args: Any) -> Any:
        return nnx.merge(graph, state)(*args)

    return Made(fun, random_params(state, dtype), given(inputs, dtype))


def from_equinox(
    build: Callable[[Any], Any], inputs: MakeInputs, dtype: Any, call: Callable[..., Any] | None = None
) -> Made:
    """An Equinox module: its arrays are the parameters; one example's function, mapped over the batch.

    Args:
        build: key → the module.
        inputs: as everywhere.
        dtype: of the parameters.
        call: (module, *batched inputs) → outputs, where that is not `jax.vmap(module)`.
    """
    arrays, static = eqx.partition(
        eqx.filter_eval_shape(build, jax.random.key(0)), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def fun(params: Any, *args: Any) -> Any:
        module = eqx.combine(params, static)
        return jax.vmap(module)(*args) if call is None else call(module, *args)

    return Made(fun, random_params(arrays, dtype, out_axis=0), given(inputs, dtype))
