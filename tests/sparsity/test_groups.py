"""What is left of parameters and work when units go, against programs that are built smaller by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_coupling import array, conv, shaped

from jaxinfer import autoinfer
from jaxinfer.models.zoo import ZOO
from jaxinfer.sparsity.groups import Groups


def _convolutional(p: Any, x: Any) -> Any:
    h = jax.nn.relu(conv(x, p["a"]))
    h = h + conv(jax.nn.relu(conv(h, p["b"])), p["c"])
    h = conv(h, p["d"], p["d"].shape[-1])
    return h.reshape(len(h), -1) @ p["out"]


def _attending(p: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
    return jnp.einsum("bqhd,hde->bqe", jnp.einsum("bhqk,bkhd->bqhd", weights, v), p["o"])


def _recurrent(p: Any, x: Any) -> Any:
    def step(h: Any, row: Any) -> Any:
        a, b = jnp.split(row @ p["x"] + h @ p["h"], 2, -1)
        return jnp.tanh(a) * b, None

    return lax.scan(step, jnp.zeros((x.shape[1], p["h"].shape[0])), x)[0] @ p["out"]


PROGRAMS: dict[str, tuple[Callable[..., Any], dict[str, Any], Any]] = {
    "convolutional": (
        _convolutional,
        shaped(a=(3, 3, 2, 6), b=(3, 3, 6, 8), c=(3, 3, 8, 6), d=(3, 3, 1, 6), out=(150, 4)),
        array(3, 5, 5, 2),
    ),
    "attending": (_attending, shaped(q=(6, 4, 3), k=(6, 4, 3), v=(6, 4, 5), o=(4, 5, 7)), array(2, 9, 6)),
    "recurrent": (_recurrent, shaped(x=(3, 10), h=(5, 10), out=(5, 2)), array(11, 2, 3)),
}


def _some(groups: Groups, seed: int = 0) -> dict[str, np.ndarray]:
    """Of each group a random part, at least one unit and never all; inputs stay, so that the program can run."""
    rng = np.random.default_rng(seed)
    parts = {g.name: rng.permutation(g.size) < rng.integers(1, g.size) for g in groups if g.kind != "input"}
    assert parts
    return parts


def _sliced(params: Any, masks: Any) -> Any:
    def cut(leaf: Any, mask: Any) -> Any:
        kept = [np.asarray(mask).any(tuple(i for i in range(mask.ndim) if i != axis)) for axis in range(mask.ndim)]
        # Whole slices go: what is left is a block.
        assert np.array_equal(mask, functools.reduce(np.multiply.outer, kept))
        return array(*(int(k.sum()) for k in kept), dtype=leaf.dtype)

    return jax.tree.map(cut, params, masks)


@pytest.mark.parametrize("name", PROGRAMS)
def test_work_and_bytes_are_those_of_the_smaller_program(name: str) -> None:
    fun, params, x = PROGRAMS[name]
    groups = autoinfer.channel_groups(fun, params, x)
    kept = _some(groups)
    small = _sliced(params, groups.masks(kept))
    assert groups.macs(kept) == autoinfer.channel_groups(fun, small, x).macs() < groups.macs()
    assert groups.bytes(kept) == sum(4 * np.prod(leaf.shape) for leaf in jax.tree.leaves(small))


@pytest.mark.parametrize("name", PROGRAMS)
def test_shrinking_takes_away_just_that(name: str) -> None:
    fun, shapes, x = PROGRAMS[name]
    rng = np.random.default_rng(5)
    params, data = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), (shapes, x))
    groups = autoinfer.channel_groups(fun, params, data)
    kept = _some(groups)
    _, small = autoinfer.shrink(fun, params, groups.masks(kept), data)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(small)) == groups.bytes(kept) < groups.bytes()


def test_work_by_hand() -> None:
    counts = {
        # Per pixel: 3·3·2·6, two between 6 and 8 channels, one filter for each of 6; then a product of 150 × 4.
        "convolutional": 3 * (25 * 9 * (2 * 6 + 6 * 8 + 8 * 6 + 6) + 150 * 4),
        # Per token: q, k, v, o; then 9 × 9 scores and as many weights in each of 4 heads.
        "attending": 2 * (9 * 6 * 4 * (3 + 3 + 5) + 9 * 4 * 5 * 7 + 9 * 9 * 4 * (3 + 5)),
        "recurrent": 2 * (11 * (3 * 10 + 5 * 10) + 5 * 2),
    }
    for name, (fun, params, x) in PROGRAMS.items():
        assert autoinfer.channel_groups(fun, params, x).macs() == counts[name]


@pytest.mark.slow
@pytest.mark.parametrize("name, macs", [("mobilenetv2", 300e6), ("resnet50", 4.09e9)])
def test_work_of_published_networks(name: str, macs: float) -> None:
    """At 224 × 224, as counted by Sandler et al., 2018, and by torchvision."""
    size = ZOO[name].full
    inputs = [array(*np.shape(x)) for x in size.inputs(np.random.default_rng(0), 1)]
    variables = jax.eval_shape(size.module.init, jax.random.key(0), *inputs)
    groups = autoinfer.channel_groups(size.module.apply, variables, *inputs)
    assert groups.macs() == pytest.approx(macs, rel=0.005)


@pytest.mark.parametrize("name", PROGRAMS)
def test_expected_work_is_the_work_of_what_is_kept(name: str) -> None:
    fun, params, x = PROGRAMS[name]
    groups = autoinfer.channel_groups(fun, params, x)
    kept = _some(groups)
    gates = {name: jnp.asarray(flags, jnp.float32) for name, flags in kept.items()}
    np.testing.assert_allclose(groups.expected_macs(gates), groups.macs(kept), rtol=1e-6)
    np.testing.assert_allclose(groups.expected_bytes(gates), groups.bytes(kept), rtol=1e-6)


def test_expected_work_is_differentiable() -> None:
    """One layer between two: the work is proportional to the number of units, each is worth its column and its row."""
    groups = autoinfer.channel_groups(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], shaped(a=(3, 4), b=(4, 2)), array(7, 3)
    )
    gates = {"a:1": jnp.asarray([0.1, 0.9, 0.5, 1.0])}
    np.testing.assert_allclose(groups.expected_macs(gates), 7 * (3 + 2) * 2.5, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(groups.expected_macs)(gates)["a:1"], [35.0] * 4, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(groups.expected_bytes)(gates)["a:1"], [20.0] * 4, rtol=1e-6)


def test_masks_zero_what_a_unit_owns_and_nothing_else() -> None:
    def fun(p: Any, x: Any) -> Any:
        value, gate = jnp.split(x @ p["a"], 2, -1)
        return (value * jax.nn.sigmoid(gate)) @ p["b"]

    groups = autoinfer.channel_groups(fun, shaped(a=(3, 4), b=(2, 5)), array(7, 3))
    masks = groups.masks({"a:1": [False, True]})
    assert masks["a"].tolist() == [[False, True, False, True]] * 3
    assert masks["b"].tolist() == [[False] * 5, [True] * 5]
    assert all(m.dtype == bool and m.all() for m in jax.tree.leaves(groups.masks({})))


def test_leaves_that_are_no_arrays_are_let_through() -> None:
    def fun(p: Any, x: Any) -> Any:
        return p["activation"](x @ p["a"]) @ p["b"]

    params = {**shaped(a=(3, 4), b=(4, 2)), "activation": jnp.tanh}
    groups = autoinfer.channel_groups(fun, params, array(7, 3))
    assert groups["a:1"].size == 4
    assert groups.masks({})["activation"] is None


def test_clear_errors() -> None:
    groups = autoinfer.channel_groups(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], shaped(a=(3, 4), b=(4, 2)), array(7, 3)
    )
    with pytest.raises(KeyError, match=r"no group 'b:0'; there are a:0, a:1"):
        groups.masks({"b:0": np.ones(4, bool)})
    with pytest.raises(ValueError, match=r"'a:1' is bool\[3\], but the group has 4 units"):
        groups.macs({"a:1": np.ones(3, bool)})


def test_groups_can_be_listed_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fun, params, x = PROGRAMS["attending"]
    groups = autoinfer.channel_groups(fun, params, x)
    text = str(groups)
    assert all(group.name in text for group in groups)
    groups.draw(str(tmp_path / "groups.svg"))
    drawing = (tmp_path / "groups.svg").read_text()
    assert drawing.count("<use") > sum(len(group.members) for group in groups)
