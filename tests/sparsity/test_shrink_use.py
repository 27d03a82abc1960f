"""Shrunk programs in use: transformed, rounded, reported; and what is said of calls that do not fit."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import MLP, check, columns, conv, error, masked, mlp, mlp_masks, normal, random_tree, without

from jaxinfer import autoinfer

pytestmark = pytest.mark.usefixtures("double")


# -- composition ------------------------------------------------------------------------------------------------------


def test_composes_with_transformations() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), b=without(8, 0, 3))
    params, x = random_tree(**MLP), normal(6, 4)
    small, small_params = check(mlp, params, masks, x)
    want = mlp(masked(params, masks), x)
    np.testing.assert_allclose(jax.jit(small)(small_params, x), want, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(small, (None, 0))(small_params, x), want, rtol=1e-12)
    np.testing.assert_allclose(small(small_params, x=x), want, rtol=1e-12)
    _, ys = lax.scan(lambda c, row: (c, small(small_params, row)), None, x[:, None])
    np.testing.assert_allclose(ys[:, 0], want, rtol=1e-12)
    _, tangent = jax.jvp(lambda x: small(small_params, x), (x,), (jnp.ones_like(x),))
    _, expected = jax.jvp(lambda x: mlp(masked(params, masks), x), (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(tangent, expected, rtol=1e-12)
    with jax.disable_jit():
        np.testing.assert_allclose(small(small_params, x), want, rtol=1e-12)
    fast = autoinfer.optimize(small, tune="off")
    np.testing.assert_allclose(fast(small_params, x), want, rtol=1e-12)


def test_shrinks_again() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), b=without(8, 0, 3))
    params, x = random_tree(**MLP), normal(6, 4)
    small, small_params = check(mlp, params, masks, x)
    again = {**dict.fromkeys(MLP), "c": columns((6, 6), 1), "d": without(6, 1)}
    check(small, small_params, again, x, shapes={**MLP, "a": (4, 6), "b": (6,), "c": (6, 5), "d": (5,), "e": (5, 3)})


def test_types_in_place_of_arguments() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), b=without(8, 0, 3))
    params = random_tree(**MLP)
    small, small_params = autoinfer.shrink(mlp, params, masks, jax.ShapeDtypeStruct((2, 4), jnp.float64))
    assert small.report.error is not None and small.report.error < 1e-9
    assert error(mlp, params, masks, small, small_params, normal(7, 4)) < 1e-12


def test_empty_batches() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3))
    small, small_params = check(mlp, random_tree(**MLP), masks, normal(6, 4))
    assert small(small_params, jnp.zeros((0, 4))).shape == (0, 3)


def test_bfloat16() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), d=None)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(**MLP))
    x = normal(6, 4).astype(jnp.bfloat16)
    small, small_params = autoinfer.shrink(mlp, params, masks, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(small_params)} == {jnp.dtype(jnp.bfloat16)}
    assert error(mlp, params, masks, small, small_params, x) < 0.03


def test_what_is_not_finite_stays_so_where_it_reaches_results() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), b=without(8, 0, 3))
    params = random_tree(**MLP)
    small, small_params = check(mlp, params, masks, normal(6, 4))
    x = normal(3, 4).at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf)
    want, have = mlp(masked(params, masks), x), small(small_params, x)
    assert not np.isfinite(want[0]).any() and not np.isfinite(have[0]).any()
    finite = np.isfinite(want)
    np.testing.assert_allclose(np.asarray(have)[finite], np.asarray(want)[finite], rtol=1e-12)


def test_flags_are_structure() -> None:
    def fun(p: Any, x: Any, double: bool = False) -> Any:
        y = x @ p["w"] @ p["v"]
        return 2 * y if double else y

    masks = {"w": columns((3, 5), 1), "v": None}
    params, x = random_tree(w=(3, 5), v=(5, 2)), normal(4, 3)
    small, small_params = autoinfer.shrink(fun, params, masks, x)
    np.testing.assert_allclose(small(small_params, x, double=True), 2 * small(small_params, x))


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("multiple", "left"), [(1, 5), (2, 6), (4, 8), (16, 8)])
def test_kept_numbers_are_rounded_up(multiple: int, left: int) -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3, 6), b=without(8, 0, 3, 6))
    params, x = random_tree(**MLP), normal(6, 4)
    small, small_params = autoinfer.shrink(mlp, params, masks, x, multiple_of=multiple)
    shapes = {**MLP, "a": (4, left), "b": (left,), "c": (left, 6)}
    assert jax.tree.map(lambda leaf: leaf.shape, small_params) == shapes
    assert error(mlp, params, masks, small, small_params, x) < 1e-12


def test_rounding_adds_the_same_units_to_all_that_is_tied() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = jax.nn.relu(conv(x, p["a"]) + p["b"])
        return h.reshape(h.shape[0], -1) @ p["out"]

    shapes = {"a": (3, 3, 1, 6), "b": (6,), "out": (24, 3)}
    masks = {"a": columns((3, 3, 1, 6), 0, 2, 5), "b": without(6, 0, 2, 5), "out": None}
    params, x = random_tree(**shapes), normal(2, 2, 2, 1)
    small, small_params = autoinfer.shrink(fun, params, masks, x, multiple_of=4)
    assert jax.tree.map(lambda leaf: leaf.shape, small_params) == {"a": (3, 3, 1, 4), "b": (4,), "out": (16, 3)}
    assert error(fun, params, masks, small, small_params, x) < 1e-12
    assert not small.report.rejoined


def test_the_fastest_of_several_roundings() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3, 6), b=without(8, 0, 3, 6))
    params, x = random_tree(**MLP), normal(6, 4)
    small, small_params = autoinfer.shrink(mlp, params, masks, x, multiple_of="measured")
    assert small_params["a"].shape[1] in (5, 8)
    assert error(mlp, params, masks, small, small_params, x) < 1e-12


# -- what is said -----------------------------------------------------------------------------------------------------


def test_the_report_counts_what_went() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), c=columns((8, 6), 5))
    small, _ = check(mlp, random_tree(**MLP), masks, normal(5, 4))
    text = small.explain()
    assert "4×8" in text and "4×6" in text
    leaves = {leaf.name: leaf for leaf in small.report.leaves}
    assert (leaves["a"].axes[1].masked, leaves["b"].axes[0].constant, leaves["c"].axes[1].masked) == (2, 2, 1)
    assert small.report.error is not None and small.report.error < 1e-9


@pytest.mark.parametrize(
    ("masks", "kind", "words"),
    [
        (mlp_masks(a=np.ones((4, 7), bool)), ValueError, r"mask of a has shape \(4, 7\), the parameter \(4, 8\)"),
        (mlp_masks(a=np.ones((4, 8))), TypeError, "mask of a is float64"),
        (mlp_masks(a=True), TypeError, "mask of a is True"),
        ({"a": None}, ValueError, "nothing for b"),
        (mlp_masks(z=np.ones(3, bool)), ValueError, "z, which is no parameter"),
        (mlp_masks(a={"x": np.ones(3, bool)}), ValueError, "nothing for a"),
        (mlp_masks(a=np.zeros((4, 8), bool)), ValueError, r"to result, which would be constant; nothing is left of a"),
    ],
)
def test_masks_that_do_not_fit(masks: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        autoinfer.shrink(mlp, random_tree(**MLP), masks, normal(5, 4))


def test_parameters_that_do_not_fit() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3))
    params = random_tree(**MLP)
    small, small_params = check(mlp, params, masks, normal(5, 4))
    with pytest.raises(
        ValueError, match=r"a has the shape \(4, 8\), as in the whole program; the small one is \(4, 6\)"
    ):
        small(params, normal(5, 4))
    with pytest.raises(ValueError, match="expected 6 arrays"):
        small({"a": small_params["a"]}, normal(5, 4))
    with pytest.raises(ValueError, match="multiple_of=0"):
        autoinfer.shrink(mlp, params, masks, normal(5, 4), multiple_of=0)


def test_other_calls_that_need_what_was_left_out() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x @ p["a"]
        return h @ p["b"] if x.shape[0] < 10 else h @ p["c"]

    masks = {"a": None, "b": columns((5, 2), 1, 2, axis=0), "c": None}
    small, small_params = autoinfer.shrink(fun, random_tree(a=(3, 5), b=(5, 2), c=(5, 2)), masks, normal(4, 3))
    assert small_params["a"].shape == (3, 3)
    with pytest.raises(autoinfer.ShrinkError, match="shrink it with such arguments"):
        small(small_params, normal(12, 3))


def test_a_small_program_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinfer.sparsity.shrinking import replay

    masks = mlp_masks(a=columns((4, 8), 0, 3), b=without(8, 0, 3))
    rules = {**replay.Replay.table, "tanh": lambda domain, node, x: replay.Replay.table["sin"](domain, node, x)}
    right = replay.Replay.table["tanh"]

    def wrong(domain: Any, node: Any, x: Any) -> Any:
        (y,) = right(domain, node, x)
        return [replay.replace(y, array=y.array + 1)]

    monkeypatch.setattr(replay.Replay, "table", {**rules, "tanh": wrong})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autoinfer.ShrinkWarning)
        with pytest.raises(autoinfer.ShrinkError, match="result 0 is off by"):
            autoinfer.shrink(mlp, random_tree(**MLP), masks, normal(5, 4))
