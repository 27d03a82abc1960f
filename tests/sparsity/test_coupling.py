"""Which axes move together, told by hand for small programs that hold one structure each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer import autoinfer


def array(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def shaped(**shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: array(*shape) for name, shape in shapes.items()}


def tied(fun: Callable[..., Any], params: Any, *args: Any) -> set[str]:
    """The groups as text: size, kind, the axes that are tied, and how many indices a unit owns where not one."""
    found = set()
    for group in autoinfer.channel_groups(fun, params, *args):
        members = []
        for member in group.members:
            owned = np.bincount(member.unit_of[member.unit_of >= 0], minlength=group.size)
            assert len(set(owned)) == 1
            members.append(f"{member.name}.{member.axis}" + (f"*{owned[0]}" if owned[0] > 1 else ""))
        found.add(f"{group.size} {group.kind}: {' '.join(sorted(members))}")
    return found


def conv(x: Any, w: Any, groups: int = 1) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


# -- dense ------------------------------------------------------------------------------------------------------------


def test_layers_in_a_row() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]

    found = tied(fun, shaped(a=(3, 5), b=(5,), c=(5, 2)), array(7, 3))
    assert found == {"5 channel: a.1 b.0 c.0", "3 input: a.0"}


def test_a_residual_ties_all_that_is_added() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x @ p["stem"]
        h = h + jax.nn.relu(h @ p["a"]) @ p["b"]
        return h @ p["out"]

    found = tied(fun, shaped(stem=(3, 4), a=(4, 6), b=(6, 4), out=(4, 2)), array(7, 3))
    assert found == {"4 channel: a.0 b.1 out.0 stem.1", "6 channel: a.1 b.0", "3 input: stem.0"}


def test_results_are_whole() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x @ p["a"]
        return h @ p["b"], h

    groups = autoinfer.channel_groups(fun, shaped(a=(3, 4), b=(4, 2)), array(7, 3))
    assert [g.kind for g in groups] == ["input"]
    assert groups.locked[("a", 1)] == groups.locked[("b", 1)] == "an axis of the results"


def test_concatenated_features_keep_apart() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jnp.concatenate([x @ p["a"], x, x @ p["b"]], -1) @ p["c"]

    found = tied(fun, shaped(a=(3, 4), b=(3, 5), c=(12, 2)), array(7, 3))
    # The input is read by a and b as one value, and by c as another.
    assert found == {"4 channel: a.1 c.0", "5 channel: b.1 c.0", "3 input: a.0 b.0", "3 input: c.0"}


def test_split_halves_that_gate_each_other() -> None:
    def fun(p: Any, x: Any) -> Any:
        value, gate = jnp.split(x @ p["a"] + p["b"], 2, -1)
        return (value * jax.nn.sigmoid(gate)) @ p["c"]

    found = tied(fun, shaped(a=(3, 8), b=(8,), c=(4, 2)), array(7, 3))
    assert found == {"4 channel: a.1*2 b.0*2 c.0", "3 input: a.0"}


def test_a_parameter_used_twice_ties_both_uses() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ p["stem"]) @ p["w"]) @ p["w"] @ p["out"]

    found = tied(fun, shaped(stem=(3, 4), w=(4, 4), out=(4, 2)), array(7, 3))
    assert found == {"4 channel: out.0 stem.1 w.0 w.1", "3 input: stem.0"}


def test_einsum_over_two_axes_at_once() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jnp.einsum("bij,ijo->bo", jnp.einsum("bk,kij->bij", x, p["a"]), p["b"])

    found = tied(fun, shaped(a=(3, 4, 5), b=(4, 5, 2)), array(7, 3))
    assert found == {"4 channel: a.1 b.0", "5 channel: a.2 b.1", "3 input: a.0"}


def test_experts_lose_features_and_none_is_lost() -> None:
    def fun(p: Any, x: Any, counts: Any) -> Any:
        return lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, p["a"], counts)), p["b"], counts)

    groups = autoinfer.channel_groups(fun, shaped(a=(5, 3, 4), b=(5, 4, 2)), array(7, 3), array(5, dtype=np.int32))
    ties = {g.size: {(m.name, m.axis) for m in g.members} for g in groups}
    assert ties == {3: {("a", 1)}, 4: {("a", 2), ("b", 1)}}
    assert groups.macs() == 7 * (3 * 4 + 4 * 2)


def test_reductions_and_windows_of_any_function() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = conv(x, p["a"])
        h = lax.reduce_window(h, 1.0, lambda a, b: a * b, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return lax.reduce(h, 1.0, lambda a, b: a * b, (1, 2)) @ p["b"]

    found = tied(fun, shaped(a=(3, 3, 2, 5), b=(5, 4)), array(7, 4, 4, 2))
    assert found == {"5 channel: a.3 b.0", "2 input: a.2"}


# -- what locks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix, why",
    [
        (lambda h, i: jax.nn.softmax(h, -1), "reduce_max over its axis"),
        (lambda h, i: jnp.sort(h, -1), "sort along its axis"),
        (lambda h, i: jnp.cumsum(h, -1), "cumsum along its axis"),
        (lambda h, i: jnp.fft.fft(h).real, "fft over its axis"),
        (lambda h, i: lax.dynamic_slice_in_dim(h, i[0], 4, 1), "looked up at a position that depends on data"),
        (lambda h, i: h[:, i], "looked up at positions that depend on data"),
    ],
)
def test_where_indices_mix_all_are_kept(mix: Callable[..., Any], why: str) -> None:
    def fun(p: Any, x: Any, i: Any) -> Any:
        h = mix(x @ p["a"], i)
        return h @ p["b"][: h.shape[1]]

    groups = autoinfer.channel_groups(fun, shaped(a=(3, 6), b=(6, 2)), array(7, 3), array(4, dtype=np.int32))
    assert groups.locked[("a", 1)] == why


def test_an_index_that_is_taken_out_is_kept() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x @ p["a"]
        return h[:, :1] * jnp.tanh(h @ p["b"]) @ p["c"]

    groups = autoinfer.channel_groups(fun, shaped(a=(3, 6), b=(6, 4), c=(4, 2)), array(7, 3))
    (group,) = [g for g in groups if g.size == 5]
    for member in group.members:
        assert member.unit_of.tolist() == [-1, 0, 1, 2, 3, 4]


def test_data_that_is_normalized_over_is_whole() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x + p["position"]
        return (h - h.mean(-1, keepdims=True)) @ p["w"]

    groups = autoinfer.channel_groups(fun, shaped(position=(6,), w=(6, 2)), array(7, 6))
    assert list(groups) == []
    assert groups.locked[("position", 0)] == "data is added to it, and it is summed over"


def test_data_that_is_only_read_is_not() -> None:
    def fun(p: Any, x: Any) -> Any:
        return (x + p["position"]) @ p["w"]

    assert tied(fun, shaped(position=(6,), w=(6, 2)), array(7, 6)) == {"6 channel: position.0 w.0"}


def test_an_operation_without_a_rule_locks_what_it_touches_and_nothing_else() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x @ p["a"]
        y = jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(h.shape, h.dtype), h)
        return jnp.tanh(y @ p["b"]) @ p["c"]

    groups = autoinfer.channel_groups(fun, shaped(a=(3, 4), b=(4, 5), c=(5, 2)), array(7, 3))
    assert "no rule" in groups.locked[("a", 1)]
    assert {m.name for m in groups["b:1"].members} == {"b", "c"}


# -- normalization ----------------------------------------------------------------------------------------------------


def test_layer_norm_over_a_residual() -> None:
    def norm(h: Any, p: Any) -> Any:
        h = h - h.mean(-1, keepdims=True)
        return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["shift"]

    def fun(p: Any, x: Any) -> Any:
        h = x @ p["stem"]
        return norm(h + norm(h, p) @ p["w"], p) @ p["out"]

    found = tied(fun, shaped(stem=(3, 8), scale=(8,), shift=(8,), w=(8, 8), out=(8, 2)), array(7, 3))
    assert found == {"8 channel: out.0 scale.0 shift.0 stem.1 w.0 w.1", "3 input: stem.0"}


def test_group_norm_removes_groups_or_places_within_all_groups() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = conv(x, p["a"])
        g = h.reshape(*h.shape[:-1], 4, 3)
        g = g - g.mean((1, 2, 4), keepdims=True)
        return conv(g.reshape(h.shape) * p["scale"], p["b"])

    found = tied(fun, shaped(a=(3, 3, 2, 12), scale=(12,), b=(1, 1, 12, 2)), array(2, 5, 5, 2))
    assert found == {"4 channel: a.3*3 b.2*3 scale.0*3", "3 channel: a.3*4 b.2*4 scale.0*4", "2 input: a.2"}


# -- convolution ------------------------------------------------------------------------------------------------------


def test_flattened_images_keep_their_channels() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = jax.nn.relu(conv(x, p["a"]))
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return h.reshape(len(h), -1) @ p["b"]

    found = tied(fun, shaped(a=(3, 3, 2, 5), b=(20, 4)), array(7, 4, 4, 2))
    assert found == {"5 channel: a.3 b.0*4", "2 input: a.2"}


def test_a_flattened_input_is_pruned_by_the_pixel() -> None:
    found = tied(
        lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p["a"]) @ p["b"], shaped(a=(12, 5), b=(5, 2)), array(7, 3, 4)
    )
    assert found == {"12 input: a.0", "5 channel: a.1 b.0"}


def test_depthwise_filters_go_with_their_channels() -> None:
    def fun(p: Any, x: Any) -> Any:
        return conv(conv(conv(x, p["a"]), p["d"], 6), p["b"])

    found = tied(fun, shaped(a=(1, 1, 2, 6), d=(3, 3, 1, 6), b=(1, 1, 6, 4)), array(2, 5, 5, 2))
    assert found == {"6 channel: a.3 b.2 d.3", "2 input: a.2"}


def test_a_depthwise_multiplier_is_a_factor_of_its_own() -> None:
    def fun(p: Any, x: Any) -> Any:
        return conv(conv(conv(x, p["a"]), p["d"], 6), p["b"])

    found = tied(fun, shaped(a=(1, 1, 2, 6), d=(3, 3, 1, 12), b=(1, 1, 12, 4)), array(2, 5, 5, 2))
    assert found == {"6 channel: a.3 b.2*2 d.3*2", "2 channel: b.2*6 d.3*6", "2 input: a.2"}


def test_grouped_convolution() -> None:
    def fun(p: Any, x: Any) -> Any:
        return conv(conv(conv(x, p["a"]), p["g"], 4), p["b"])

    found = tied(fun, shaped(a=(1, 1, 2, 8), g=(3, 3, 2, 12), b=(1, 1, 12, 5)), array(2, 5, 5, 2))
    assert found == {
        "4 channel: a.3*2 b.2*3 g.3*3",
        "2 channel: a.3*4 g.2",
        "3 channel: b.2*4 g.3*4",
        "2 input: a.2",
    }


def test_shuffled_channels_are_found_again() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = conv(conv(x, p["a"]), p["g"], 3)
        h = h.reshape(*h.shape[:-1], 3, 3).swapaxes(-1, -2).reshape(h.shape)
        return conv(conv(h, p["h"], 3), p["b"])

    params = shaped(a=(1, 1, 2, 6), g=(3, 3, 2, 9), h=(1, 1, 3, 6), b=(1, 1, 6, 4))
    # The groups of one convolution are the places within the groups of the next.
    assert tied(fun, params, array(2, 5, 5, 2)) == {
        "3 channel: a.3*2 g.3*3 h.2",
        "2 channel: a.3*3 g.2",
        "3 channel: b.2*2 g.3*3 h.3*2",
        "2 channel: b.2*3 h.3*3",
        "2 input: a.2",
    }


def test_space_to_depth_and_back() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = conv(x, p["a"])
        n, height, width, _ = h.shape
        h = h.reshape(n, height, width, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, 3)
        return conv(h, p["b"])

    found = tied(fun, shaped(a=(1, 1, 2, 12), b=(3, 3, 3, 4)), array(2, 5, 5, 2))
    assert found == {"3 channel: a.3*4 b.2", "2 input: a.2"}


def test_a_shortcut_padded_with_zero_channels() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = conv(x, p["a"])
        return conv(jnp.pad(h, [(0, 0), (0, 0), (0, 0), (1, 2)]) + conv(h, p["b"]), p["c"])

    found = tied(fun, shaped(a=(1, 1, 2, 4), b=(3, 3, 4, 7), c=(1, 1, 7, 5)), array(2, 5, 5, 2))
    assert found == {"4 channel: a.3 b.2 b.3 c.2", "3 channel: b.3 c.2", "2 input: a.2"}


# -- attention --------------------------------------------------------------------------------------------------------


def _attend(q: Any, k: Any, v: Any) -> Any:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def test_heads_of_kernels_with_an_axis_for_them() -> None:
    def fun(p: Any, x: Any) -> Any:
        q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[name]) for name in "qkv")
        return jnp.einsum("bthd,hde->bte", _attend(q, k, v), p["o"])

    found = tied(fun, shaped(q=(6, 2, 3), k=(6, 2, 3), v=(6, 2, 3), o=(2, 3, 5)), array(4, 7, 6))
    assert found == {
        "2 head: k.1 o.0 q.1 v.1",
        "3 channel: k.2 q.2",
        "3 channel: o.1 v.2",
        "6 input: k.0 q.0 v.0",
    }


def test_heads_made_by_reshaping_one_projection() -> None:
    def fun(p: Any, x: Any) -> Any:
        q, k, v = (y.reshape(*x.shape[:2], 2, 3) for y in jnp.split(x @ p["qkv"] + p["bias"], 3, -1))
        return _attend(q, k, v).reshape(*x.shape[:2], 6) @ p["o"]

    found = tied(fun, shaped(qkv=(4, 18), bias=(18,), o=(6, 5)), array(4, 7, 4))
    assert found == {
        "2 head: bias.0*9 o.0*3 qkv.1*9",
        "3 channel: bias.0*4 qkv.1*4",
        "3 channel: bias.0*2 o.0*2 qkv.1*2",
        "4 input: qkv.0",
    }


def test_grouped_queries_share_a_head_of_keys() -> None:
    def fun(p: Any, x: Any) -> Any:
        q = (x @ p["q"]).reshape(*x.shape[:2], 4, 3)
        k, v = (jnp.repeat((x @ p[name]).reshape(*x.shape[:2], 2, 3), 2, 2) for name in "kv")
        return _attend(q, k, v).reshape(*x.shape[:2], 12) @ p["o"]

    found = tied(fun, shaped(q=(6, 12), k=(6, 6), v=(6, 6), o=(12, 5)), array(4, 7, 6))
    assert found == {
        "2 head: k.1*3 o.0*6 q.1*6 v.1*3",
        "3 channel: k.1*2 q.1*4",
        "3 channel: o.0*4 v.1*2",
        "6 input: k.0 q.0 v.0",
    }


def test_rotary_positions_tie_what_they_turn() -> None:
    def turn(x: Any) -> Any:
        a, b = jnp.split(x, 2, -1)
        angle = np.arange(x.shape[1])[None, :, None, None] * np.array([1.0, 0.1])
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)

    def fun(p: Any, x: Any) -> Any:
        q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[name]) for name in "qkv")
        return jnp.einsum("bthd,hde->bte", _attend(turn(q), turn(k), v), p["o"])

    found = tied(fun, shaped(q=(6, 2, 4), k=(6, 2, 4), v=(6, 2, 3), o=(2, 3, 5)), array(4, 7, 6))
    assert "2 channel: k.2*2 q.2*2" in found


def test_embeddings_and_their_transpose_as_logits() -> None:
    def fun(p: Any, tokens: Any) -> Any:
        h = p["table"][tokens]
        return jnp.tanh(h @ p["w"]) @ p["table"].T

    groups = autoinfer.channel_groups(fun, shaped(table=(11, 4), w=(4, 4)), array(3, 5, dtype=np.int32))
    assert {(m.name, m.axis) for g in groups for m in g.members} == {("table", 1), ("w", 0), ("w", 1)}
    assert ("table", 0) in groups.locked
