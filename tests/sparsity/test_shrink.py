"""What shrinking does to programs small enough to tell by hand."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import check, error, masked, random_tree

from jaxinfer import autoinfer

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def double() -> Any:
    with jax.enable_x64(True):
        yield


def without(size: int, *gone: int) -> np.ndarray:
    keep = np.ones(size, bool)
    keep[list(gone)] = False
    return keep


def columns(shape: tuple[int, ...], *gone: int, axis: int = -1) -> np.ndarray:
    """A mask without some slices along an axis."""
    mask = np.ones(shape, bool)
    np.moveaxis(mask, axis, 0)[list(gone)] = False
    return mask


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape))


# -- dense layers -----------------------------------------------------------------------------------------------------


def mlp(p: Any, x: Any) -> Any:
    h = jax.nn.relu(x @ p["a"] + p["b"])
    h = jnp.tanh(h @ p["c"] + p["d"])
    return h @ p["e"] + p["f"]


MLP = {"a": (4, 8), "b": (8,), "c": (8, 6), "d": (6,), "e": (6, 3), "f": (3,)}


def mlp_masks(**masks: Any) -> dict[str, Any]:
    return {**dict.fromkeys(MLP), **masks}


def test_nothing_masked_nothing_gone() -> None:
    small, _ = check(mlp, random_tree(**MLP), None, normal(5, 4), shapes=MLP)
    assert small.report.small == small.report.size


def test_producers_without_biases() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), b=without(8, 0, 3))
    small, _ = check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (4, 6), "b": (6,), "c": (6, 6)})
    assert small.report.constant_bytes == 0


def test_biases_that_are_left_become_constants() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3))
    small, _ = check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (4, 6), "b": (6,), "c": (6, 6)})
    assert small.report.constant_bytes > 0
    (b,) = (leaf for leaf in small.report.leaves if leaf.name == "b")
    assert b.axes[0].constant == 2


def test_consumers_alone() -> None:
    masks = mlp_masks(c=columns((8, 6), 1, 2, 7, axis=0))
    small, _ = check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (4, 5), "b": (5,), "c": (5, 6)})
    assert small.report.constant_bytes == 0


def test_input_features_are_gathered() -> None:
    masks = mlp_masks(a=columns((4, 8), 1, 2, axis=0))
    check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (2, 8)})


def test_single_entries_stay() -> None:
    mask = np.random.default_rng(1).random((8, 6)) < 0.5
    mask[:, 0] = mask[0] = True
    small, _ = check(mlp, random_tree(**MLP), mlp_masks(c=mask), normal(5, 4), shapes=MLP)
    np.testing.assert_array_equal(small.masks["c"], mask)
    assert small.masks["a"] is None


def test_a_whole_layer_beside_a_residual() -> None:
    def fun(p: Any, x: Any) -> Any:
        return (x + jax.nn.gelu(x @ p["a"] + p["b"]) @ p["c"]) @ p["out"]

    shapes = {"a": (4, 8), "b": (8,), "c": (8, 4), "out": (4, 2)}
    masks = {"a": np.zeros((4, 8), bool), "b": np.zeros(8, bool), "c": None, "out": None}
    small_shapes = {"a": (0, 0), "b": (0,), "c": (0, 0), "out": (4, 2)}
    check(fun, random_tree(**shapes), masks, normal(5, 4), shapes=small_shapes)


def test_a_parameter_used_twice_goes_only_where_both_uses_do() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    masks = {"w": columns((4, 6), 1, 5)}
    check(fun, random_tree(w=(4, 6)), masks, normal(5, 4), shapes={"w": (4, 4)})


# -- normalization ----------------------------------------------------------------------------------------------------


def layer_norm(x: Any, scale: Any, bias: Any, two_pass: bool) -> Any:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True) if two_pass else (x**2).mean(-1, keepdims=True) - mean**2
    return (x - mean) * lax.rsqrt(var + 1e-6) * scale + bias


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("scale_left", [False, True])
def test_normalization_over_a_pruned_axis_keeps_its_divisor(two_pass: bool, scale_left: bool) -> None:
    def fun(p: Any, x: Any) -> Any:
        return layer_norm(x @ p["w"], p["scale"], p["bias"], two_pass) @ p["out"]

    shapes = {"w": (4, 10), "scale": (10,), "bias": (10,), "out": (10, 3)}
    gone = (0, 4, 5, 9)
    masks = {
        "w": columns((4, 10), *gone),
        "scale": None if scale_left else without(10, *gone),
        "bias": without(10, *gone),
        "out": None,
    }
    small = {"w": (4, 6), "scale": (6,), "bias": (6,), "out": (6, 3)}
    if scale_left:
        # What is missing is -mean / deviation times a scale of its own: it changes with the inputs.
        small = {"w": (4, 6), "scale": (10,), "bias": (10,), "out": (10, 3)}
    check(fun, random_tree(**shapes), masks, normal(5, 4), shapes=small)


# -- convolutions -----------------------------------------------------------------------------------------------------


def conv(x: Any, w: Any, groups: int = 1, padding: str = "SAME", stride: int = 1) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def test_constants_at_the_border_of_a_padded_convolution() -> None:
    def fun(p: Any, x: Any) -> Any:
        return conv(jax.nn.sigmoid(conv(x, p["a"]) + p["b"]), p["c"])

    shapes = {"a": (3, 3, 2, 6), "b": (6,), "c": (3, 3, 6, 4)}
    masks = {"a": columns((3, 3, 2, 6), 1, 2), "b": None, "c": None}
    small = {"a": (3, 3, 2, 4), "b": (4,), "c": (3, 3, 4, 4)}
    check(fun, random_tree(**shapes), masks, normal(2, 7, 5, 2), shapes=small)


def test_depthwise() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = jax.nn.relu(conv(x, p["a"]) + p["b"])
        h = jnp.tanh(conv(h, p["depth"], groups=6, stride=2) + p["d"])
        return h.mean((1, 2)) @ p["out"]

    shapes = {"a": (1, 1, 2, 6), "b": (6,), "depth": (3, 3, 1, 12), "d": (12,), "out": (12, 3)}
    gone = (2, 5)
    twice = (4, 5, 10, 11)
    masks = {
        "a": columns((1, 1, 2, 6), *gone),
        "b": without(6, *gone),
        "depth": columns((3, 3, 1, 12), *twice),
        "d": None,
        "out": None,
    }
    small = {"a": (1, 1, 2, 4), "b": (4,), "depth": (3, 3, 1, 8), "d": (8,), "out": (8, 3)}
    check(fun, random_tree(**shapes), masks, normal(2, 6, 6, 2), shapes=small)
    # With the biases left, what goes through the kernels that are left is a constant image.
    masks = {**masks, "b": None, "depth": None}
    check(fun, random_tree(**shapes), masks, normal(2, 6, 6, 2), shapes=small)


def test_groups_lose_whole_groups_and_equal_numbers() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jax.nn.relu(conv(x, p["g"], groups=3)).sum((1, 2)) @ p["out"]

    shapes = {"g": (3, 3, 2, 12), "out": (12, 3)}
    # The first group goes; of the others one channel each, and of the last one more, which has to stay.
    masks = {"g": columns((3, 3, 2, 12), 0, 1, 2, 3, 5, 8, 9), "out": None}
    small = {"g": (3, 3, 2, 6), "out": (6, 3)}
    check(fun, random_tree(**shapes), masks, normal(2, 4, 4, 6), shapes=small)


def test_flatten_after_a_convolution() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = jax.nn.relu(conv(x, p["a"]) + p["b"])
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return h.reshape(h.shape[0], -1) @ p["out"]

    shapes = {"a": (3, 3, 1, 4), "b": (4,), "out": (16, 3)}
    masks = {"a": columns((3, 3, 1, 4), 0, 2), "b": without(4, 0, 2), "out": None}
    small = {"a": (3, 3, 1, 2), "b": (2,), "out": (8, 3)}
    check(fun, random_tree(**shapes), masks, normal(2, 4, 4, 1), shapes=small)


# -- attention and movement -------------------------------------------------------------------------------------------


def attention(p: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) + p[n + "_bias"] for n in ("q", "k", "v"))
    scores = jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(q.shape[-1])
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshe,hed->btd", weights, v, p["out"])


ATTENTION = {
    **dict.fromkeys(("q", "k", "v"), (6, 3, 4)),
    **{n + "_bias": (3, 4) for n in ("q", "k", "v")},
    "out": (3, 4, 6),
}


def test_heads() -> None:
    masks = {
        **{n: columns((6, 3, 4), 1, axis=1) for n in ("q", "k", "v")},
        **{n + "_bias": columns((3, 4), 1, axis=0) for n in ("q", "k", "v")},
        "out": None,
    }
    small = {
        **dict.fromkeys(("q", "k", "v"), (6, 2, 4)),
        **{n + "_bias": (2, 4) for n in ("q", "k", "v")},
        "out": (2, 4, 6),
    }
    check(attention, random_tree(**ATTENTION), masks, normal(2, 5, 6), shapes=small)


def test_places_within_heads() -> None:
    masks = {
        "q": columns((6, 3, 4), 0, 3),
        "q_bias": columns((3, 4), 0, 3),
        "k": columns((6, 3, 4), 0, 3),
        "k_bias": columns((3, 4), 0, 3),
        "v": columns((6, 3, 4), 1),
        "v_bias": columns((3, 4), 1),
        "out": None,
    }
    small = {
        "q": (6, 3, 2),
        "q_bias": (3, 2),
        "k": (6, 3, 2),
        "k_bias": (3, 2),
        "v": (6, 3, 3),
        "v_bias": (3, 3),
        "out": (3, 3, 6),
    }
    check(attention, random_tree(**ATTENTION), masks, normal(2, 5, 6), shapes=small)


def test_movement_keeps_track() -> None:
    def fun(p: Any, x: Any) -> Any:
        h, g = x @ p["a"], x @ p["b"]
        h = jnp.concatenate([h, g[:, ::-1], jnp.pad(h, ((0, 0), (1, 2)))], axis=1)
        h = h.reshape(x.shape[0], 15, 1).transpose(2, 1, 0)[0].T
        left, right = jnp.split(h, [6], axis=1)
        return jnp.cumsum(left[:, ::2], axis=0) @ p["out"], jnp.max(right, axis=0), left.argmax(1)

    masks = {"a": columns((3, 4), 1, 2), "b": columns((3, 4), 0), "out": None}
    small, _ = check(fun, random_tree(a=(3, 4), b=(3, 4), out=(3, 2)), masks, normal(5, 3))
    assert small.report.leaves[0].small == (3, 2)


def test_embeddings_lose_features() -> None:
    def fun(p: Any, tokens: Any) -> Any:
        return jnp.tanh(p["table"][tokens] + p["place"][: tokens.shape[1]]) @ p["out"]

    masks = {"table": columns((9, 6), 1, 4), "place": columns((7, 6), 1, 4), "out": None}
    small = {"table": (9, 4), "place": (7, 4), "out": (4, 2)}
    tokens = jnp.asarray(rng.integers(0, 9, (3, 5)))
    fitted, small_params = check(fun, random_tree(table=(9, 6), place=(7, 6), out=(6, 2)), masks, tokens, shapes=small)
    # Rows of the table of places that the example did not reach are still there.
    longer = jnp.asarray(rng.integers(0, 9, (2, 7)))
    params = random_tree(table=(9, 6), place=(7, 6), out=(6, 2))
    assert error(fun, params, masks, fitted, small_params, longer) < 1e-12


# -- control flow -----------------------------------------------------------------------------------------------------


def recurrent(p: Any, x: Any) -> Any:
    def step(state: Any, now: Any) -> Any:
        h, count = state
        h = jnp.tanh(now @ p["w"] + h @ p["u"] + p["b"])
        return (h, count + 1), h

    start = (jnp.zeros((x.shape[1], 6)), 0)
    (h, count), hs = lax.scan(step, start, x)
    return (h + hs.mean(0)) @ p["out"] + count


def test_carries_that_start_known() -> None:
    masks = {
        "w": columns((3, 6), 0, 4),
        "u": columns((6, 6), 0, 4),
        "b": without(6, 0, 4),
        "out": None,
    }
    small = {"w": (3, 4), "u": (4, 4), "b": (4,), "out": (4, 2)}
    check(recurrent, random_tree(w=(3, 6), u=(6, 6), b=(6,), out=(6, 2)), masks, normal(5, 2, 3), shapes=small)


def test_carries_that_do_not_stay_what_they_were() -> None:
    # With the bias left, the first state differs from the later ones.
    masks = {"w": columns((3, 6), 0, 4), "u": columns((6, 6), 0, 4), "b": None, "out": None}
    check(recurrent, random_tree(w=(3, 6), u=(6, 6), b=(6,), out=(6, 2)), masks, normal(5, 2, 3))


def test_while_and_cond() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x @ p["a"]
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["u"]), h)
        h = lax.cond(x.sum() > 0, lambda h: h * 2, lambda h: jnp.sin(h), h)
        h = lax.while_loop(lambda s: (s**2).sum() > 1, lambda s: s / 2, h)
        return h @ p["out"]

    masks = {"a": columns((3, 5), 2, 3), "u": columns((5, 5), 2, 3), "out": None}
    small = {"a": (3, 3), "u": (3, 3), "out": (3, 2)}
    check(fun, random_tree(a=(3, 5), u=(5, 5), out=(5, 2)), masks, normal(4, 3), shapes=small)


# -- derivatives of their own -----------------------------------------------------------------------------------------


@jax.custom_jvp
def steep(x: Any) -> Any:
    return jnp.tanh(x)


steep.defjvp(lambda primals, tangents: (steep(*primals), 3 * tangents[0] * jnp.cos(primals[0])))


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return jnp.sin(x)


clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (jnp.clip(ct, -0.1, 0.1) * x,))


@jax.custom_vjp
def mixing(x: Any) -> Any:
    return x - x.mean(-1, keepdims=True)


mixing.defvjp(lambda x: (mixing(x), None), lambda _, ct: (ct * 2 - ct.mean(-1, keepdims=True),))


@pytest.mark.parametrize("activation", [steep, clipped, mixing, jax.nn.relu, jax.nn.softplus])
def test_custom_derivatives_are_kept(activation: Any) -> None:
    def fun(p: Any, x: Any) -> Any:
        return (activation(x @ p["a"]) * p["scale"]) @ p["out"]

    shapes = {"a": (3, 5), "scale": (5,), "out": (5, 2)}
    masks = {"a": columns((3, 5), 2, 3), "scale": without(5, 2, 3), "out": None}
    params, x = random_tree(**shapes), normal(4, 3)
    small, small_params = check(fun, params, masks, x, shapes={"a": (3, 3), "scale": (3,), "out": (3, 2)})
    gradients_agree(fun, params, masks, small, small_params, x)


def gradients_agree(fun: Any, params: Any, masks: Any, small: Any, small_params: Any, *args: Any) -> None:
    """The gradient of the small program is the kept part of the masked program's."""

    def loss(f: Any) -> Any:
        return lambda p: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(p, *args)))

    whole = jax.grad(loss(lambda p, *xs: fun(masked(p, masks), *xs)))(params)
    have = jax.grad(loss(small))(small_params)
    for name, leaf in have.items():
        mask = np.ones(params[name].shape, bool) if masks[name] is None else masks[name]
        taken = {leaf.name: leaf for leaf in small.report.leaves}[name]
        assert leaf.shape == taken.small
        kept = np.asarray(whole[name])[np.ix_(*(kept_of(small, name)))]
        there = mask[np.ix_(*(kept_of(small, name)))]
        np.testing.assert_allclose(np.where(there, leaf, 0), kept, rtol=1e-9, atol=1e-12)


def kept_of(small: Any, name: str) -> list[np.ndarray]:
    return [np.asarray(k) for k in small.kept[name]]


def test_training_goes_on() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), c=columns((8, 6), 5), d=None)
    params, x = random_tree(**MLP), normal(5, 4)
    small, small_params = check(mlp, params, masks, x)
    gradients_agree(mlp, params, masks, small, small_params, x)


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
