"""Coupling against brute force: parameters of whole models are zeroed and what still matters is measured.

Two things can be wrong with a group. A member that does not belong to it still matters when all the others are zero:
random numbers in its place change the results. A slice that belongs to it but was missed has become useless when all
members are zero: results no longer depend on it, though they did before. Both are asked of the program itself, in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import PROGRAMS
from programs_base import Made

from jaxinfer import autoinfer
from jaxinfer.models.zoo import ZOO, load
from jaxinfer.sparsity.groups import Group, Groups

EVERY_RUN = ("cnn", "vit", "gru")
BATCH = 6
# Where a member matters although all others are zero, and why that is right. Members of programs with normalization
# may matter too: they make a channel differ from zero, and all channels are normalized over.
MATTERS = {
    "equinox_neural_ode": "a softplus of nothing is read",
    "equinox_mnist_cnn": "a sigmoid makes a half of nothing, which is read",
    "flax_ensemble": "members are summed",
    "flax_pixelcnn": "a kernel that reads the channel is divided by its norm",
    "flax_vmapped_heads": "heads are summed",
    "haiku_char_rnn": "characters are data",
    "haiku_vqvae": "distances are summed",
    "jax2onnx_cond": "channels are summed",
    "jax2onnx_exclusive_attention": "features of a head are divided by their norm",
    "jax2onnx_vmapped_while": "the mean of all channels says when to stop",
    "jax_mnist_vae": "noise is added to nothing",
}


class Measured:
    """A program, and how its results and their derivatives depend on its parameters.

    Args:
        fun: the program.
        inputs: its arguments after the parameters.
        draws: equal trees of parameters, drawn independently.
    """

    def __init__(self, fun: Callable[..., Any], inputs: tuple[Any, ...], draws: list[Any]):
        self.draws = draws

        def results(params: Any) -> list[Any]:
            return [y for y in jax.tree.leaves(fun(params, *inputs)) if jnp.issubdtype(y.dtype, jnp.floating)]

        rng = np.random.default_rng(9)
        weights = [rng.standard_normal(y.shape) for y in jax.eval_shape(results, draws[0])]

        def weighted(params: Any) -> Any:
            return sum((w * y).sum() for w, y in zip(weights, results(params), strict=True))

        self._results = jax.jit(results)
        self._gradient = jax.jit(jax.grad(weighted))

    def results(self, params: Any) -> list[np.ndarray]:
        return [np.asarray(y) for y in self._results(params)]

    def gradient(self, params: Any) -> list[np.ndarray]:
        return [np.asarray(y) for y in jax.tree.leaves(self._gradient(params))]


def _masked(params: Any, masks: Any) -> Any:
    return jax.tree.map(lambda p, m: p * np.asarray(m), params, masks)


def _slices(group: Group, unit: int) -> Iterator[tuple[str, int, np.ndarray]]:
    for member in group.members:
        yield jax.tree_util.keystr(member.path), member.axis, member.unit_of == unit


def still_matters(program: Measured, group: Group, unit: int, masked: Any) -> list[str]:
    """The members of a unit in whose place random numbers change the results while all other members are zero."""
    rng = np.random.default_rng(3)
    before, found = program.results(masked), []
    for name, axis, owned in _slices(group, unit):

        def fill(path: Any, leaf: Any, name: str = name, axis: int = axis, owned: np.ndarray = owned) -> Any:
            if jax.tree_util.keystr(path) != name:
                return leaf
            place = owned.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])
            return jnp.where(place, rng.uniform(0.5, 1.5, leaf.shape), leaf)

        after = program.results(jax.tree_util.tree_map_with_path(fill, masked))
        scale = max(float(jnp.abs(y).max()) for y in before)
        if any(float(jnp.abs(a - b).max()) > 1e-9 * scale for a, b in zip(after, before)):
            found.append(f"{name}.{axis}")
    return found


def became_useless(program: Measured, params: Any, masks: Any) -> set[str]:
    """Slices outside of the masks that results depended on before and do not depend on any more."""
    before, after = program.gradient(params), program.gradient(_masked(params, masks))
    leaves = jax.tree_util.tree_leaves_with_path(masks)
    found = set()
    for (path, leaf), old, new in zip(leaves, before, after, strict=True):
        mask = np.asarray(leaf)
        for axis in range(mask.ndim):
            rest = tuple(i for i in range(mask.ndim) if i != axis)
            was = (np.abs(old) * mask).max(axis=rest)
            now = (np.abs(new) * mask).max(axis=rest)
            useless = np.flatnonzero((was > 1e-9) & (now < 1e-13))
            found |= {f"{jax.tree_util.keystr(path)}.{axis}[{i}]" for i in useless}
    return found


def check(program: Measured, groups: Groups, mixes: Callable[[Group], bool], reverse: bool = True) -> None:
    """Asks the program about the first and the last unit of each group.

    Args:
        program: the program.
        groups: what was found.
        mixes: whether a group's channels are normalized over: then a channel must be zero, and what makes it matters.
        reverse: whether the program can be differentiated in reverse.
    """
    for group in groups:
        for unit in sorted({0, group.size - 1}):
            masks = groups.masks({group.name: np.arange(group.size) != unit})
            if group.kind != "input" and not mixes(group):
                alive = still_matters(program, group, unit, _masked(program.draws[0], masks))
                assert not alive, (group.name, unit, alive)
            useless = became_useless(program, program.draws[0], masks) if reverse else set()
            for params in program.draws[1:]:
                # A rectifier may happen to be off in one draw, not in all.
                useless &= became_useless(program, params, masks) if useless else set()
            assert not useless, (group.name, unit, useless)


def _check_zoo(name: str) -> None:
    with jax.enable_x64(True):
        models = [load(name, tiny=True, dtype=jnp.float64, seed=seed) for seed in range(4)]
        model = models[0]
        program = Measured(model.apply, model.make_inputs(BATCH), [m.variables for m in models])
        groups = autoinfer.channel_groups(model.apply, model.variables, *model.inputs)

        def mixes(group: Group) -> bool:
            layers = name in ("encoder", "decoder", "vit", "minilm") and any("norm" in m.name for m in group.members)
            return layers or (name == "two_tower" and any("item1" in m.name for m in group.members))

        check(program, groups, mixes)


@pytest.mark.parametrize("name", EVERY_RUN)
def test_models(name: str) -> None:
    _check_zoo(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in EVERY_RUN])
def test_more_models(name: str) -> None:
    _check_zoo(name)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_programs(program: Any) -> None:
    with jax.enable_x64(True):
        made: Made = program.make(jnp.float64)
        rng = np.random.default_rng(100)
        draws = [made.params]
        for _ in range(7):
            signs = jax.tree.map(lambda p: rng.choice([-1.0, 1.0], p.shape) if p.ndim > 1 else 1.0, made.params)
            draws.append(jax.tree.map(lambda p, s: p * rng.uniform(0.5, 1.5, p.shape) * s, made.params, signs))
        groups = autoinfer.channel_groups(made.fun, made.params, *made.inputs(2))
        matters = "norm" in program.tags or program.name in MATTERS
        check(Measured(made.fun, made.inputs(BATCH), draws), groups, lambda _: matters, "while" not in program.tags)
