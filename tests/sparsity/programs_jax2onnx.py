"""Programs after the sequence and control-flow examples and test cases of jax2onnx."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from programs_base import Draw, Made, from_equinox, from_nnx, listed, plain

SOURCE = "enpasos/jax2onnx jax2onnx/plugins/"
VOCABULARY = 20
WIDTH = 16


class _GPTBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.linear1 = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.linear2 = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        time = x.shape[1]
        mask = jnp.tril(jnp.ones((time, time), bool))[None, None]
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x))))


class _GPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(8, WIDTH, rngs=rngs)
        self.blocks = nnx.List([_GPTBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.logits = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jax.lax.broadcasted_iota(jnp.int32, (1, 8), 1))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def _text(draw: Draw, batch: int) -> tuple[jax.Array]:
    return (draw.integers(0, VOCABULARY, batch, 8),)


@listed(SOURCE + "examples/nnx/gpt.py", "attention", "embedding", "residual", "norm")
def jax2onnx_gpt(dtype: Any) -> Made:
    return from_nnx(_GPT, _text, dtype)


class _DecoderLayer(nnx.Module):
    """Self-attention, attention to the encoder, MLP; each is added and then normalized."""

    def __init__(self, rngs: nnx.Rngs):
        self.own, self.cross = (nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs) for _ in range(2))
        self.mlp = nnx.Sequential(nnx.Linear(WIDTH, 24, rngs=rngs), nnx.relu, nnx.Linear(24, WIDTH, rngs=rngs))
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)])

    def __call__(self, x: jax.Array, encoded: jax.Array) -> jax.Array:
        x = self.norms[0](x + self.own(x))
        x = self.norms[1](x + self.cross(x, encoded))
        return self.norms[2](x + self.mlp(x))


class _Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([_DecoderLayer(rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, encoded: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x, encoded)
        return x


@listed(SOURCE + "examples/nnx/transformer_decoder_with_sequential.py", "attention", "residual", "norm")
def jax2onnx_transformer_decoder(dtype: Any) -> Made:
    return from_nnx(_Decoder, lambda draw, batch: (draw.normal(batch, 5, WIDTH), draw.normal(batch, 7, WIDTH)), dtype)


class _Residual(nnx.Module):
    """A network in a network: the inner one's output is added to its input and normalized."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.inner = nnx.Sequential(nnx.Linear(WIDTH, 32, rngs=rngs), nnx.relu, nnx.Linear(32, WIDTH, rngs=rngs))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        return self.norm(x + self.inner(x))


@listed(SOURCE + "examples/nnx/sequential.py", "dense", "residual", "norm")
def jax2onnx_sequential_residual(dtype: Any) -> Made:
    return from_nnx(_Residual, lambda draw, batch: (draw.normal(batch, WIDTH),), dtype)


class _ExclusiveAttention(nnx.Module):
    """Attention less its part along the token's own value, between projections."""

    def __init__(self, rngs: nnx.Rngs):
        self.heads = nnx.List([nnx.LinearGeneral(WIDTH, (4, 8), rngs=rngs) for _ in range(3)])
        self.out = nnx.LinearGeneral((4, 8), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (project(x) for project in self.heads)
        y = nnx.dot_product_attention(query, key, value)
        unit = value * jax.lax.rsqrt(jnp.sum(jnp.square(value), axis=-1, keepdims=True) + 1e-12)
        return self.out(y - jnp.sum(y * unit, axis=-1, keepdims=True) * unit)


@listed(SOURCE + "examples/nnx/exclusive_self_attention.py", "attention")
def jax2onnx_exclusive_attention(dtype: Any) -> Made:
    return from_nnx(_ExclusiveAttention, lambda draw, batch: (draw.normal(batch, 6, WIDTH),), dtype)


class _GRUStep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.into = nnx.Linear(5, 12, rngs=rngs)
        self.cell = nnx.GRUCell(12, 16, rngs=rngs, recurrent_kernel_init=nnx.initializers.lecun_normal())
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.into(x))
        state = jnp.zeros((x.shape[0], 16), x.dtype)
        for step in range(x.shape[1]):
            state, _ = self.cell(state, x[:, step])
        return self.out(state)


@listed(SOURCE + "examples/nnx/gru_cell.py", "recurrent", "unrolled")
def jax2onnx_gru_cell(dtype: Any) -> Made:
    return from_nnx(_GRUStep, lambda draw, batch: (draw.normal(batch, 4, 5),), dtype)


class _NormalizedMLP(eqx.Module):
    linear1: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    linear2: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.linear1 = eqx.nn.Linear(30, 20, key=keys[0])
        self.norm = eqx.nn.LayerNorm(20)
        self.linear2 = eqx.nn.Linear(20, 10, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(jax.nn.gelu(self.norm(self.linear1(x))))


@listed(SOURCE + "examples/eqx/mlp.py", "dense", "norm", "vmap")
def jax2onnx_normalized_mlp(dtype: Any) -> Made:
    """The layer norm runs over exactly the channels to prune."""
    return from_equinox(_NormalizedMLP, lambda draw, batch: (draw.normal(batch, 30),), dtype)


def _dense(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def _dense_shapes(into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {"w": (into, out), "b": (out,)}


@listed(SOURCE + "examples/nnx/fori_loop.py", "dense", "fori loop")
def jax2onnx_fori_loop(dtype: Any) -> Made:
    """Five rounds of v + v²/10 and a counter in the carry, with a layer before, inside and after."""

    def fun(params: Any, x: jax.Array) -> jax.Array:
        def body(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            value, counter = state
            value = value + 0.1 * value**2
            return jnp.tanh(_dense(params["inside"], value)), counter + 1

        value, counter = jax.lax.fori_loop(0, 5, body, (_dense(params["before"], x), 0))
        return _dense(params["after"], value) / counter

    shapes = {"before": _dense_shapes(6, 16), "inside": _dense_shapes(16, 16), "after": _dense_shapes(16, 4)}
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 6),), dtype)


@listed(SOURCE + "jax/lax/while_loop.py (while_loop_cnn_scalar_state_bug)", "conv", "while")
def jax2onnx_while_cnn(dtype: Any) -> Made:
    """Feature maps and a counter that starts with an input are the carry; a depthwise filter is the body."""

    def conv(kernel: jax.Array, x: jax.Array, groups: int = 1) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    def fun(params: Any, image: jax.Array, counter: jax.Array) -> jax.Array:
        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            features, count = state
            return 0.9 * features + 0.1 * jax.nn.relu(conv(params["body"], features, 16)), count + 1

        start = (conv(params["stem"], image), jnp.min(counter))
        features, _ = jax.lax.while_loop(lambda state: state[1] < 5, body, start)
        return _dense(params["head"], features.mean(axis=(1, 2)))

    shapes = {"stem": (3, 3, 2, 16), "body": (3, 3, 1, 16), "head": _dense_shapes(16, 4)}
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 8, 8, 2), draw.integers(0, 4, batch)), dtype)


@listed("enpasos/jax2onnx tests/extra_tests/loop/test_vmapped_while_masking.py", "dense", "while", "vmap")
def jax2onnx_vmapped_while(dtype: Any) -> Made:
    """Every example leaves the loop when the mean of its own features is large enough."""

    def one(params: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.while_loop(
            lambda value: jnp.mean(value) < 1.0,
            lambda value: value + jnp.abs(jnp.tanh(_dense(params["step"], value))) + 0.1,
            jax.nn.sigmoid(_dense(params["into"], x)),
        )
        return _dense(params["out"], x)

    shapes = {"into": _dense_shapes(5, 16), "step": _dense_shapes(16, 16), "out": _dense_shapes(16, 3)}
    return plain(jax.vmap(one, (None, 0)), shapes, lambda draw, batch: (draw.normal(batch, 5),), dtype)


@listed(SOURCE + "jax/lax/cond.py (cond_my_new_complex_scenario, cond_nested_conditional)", "dense", "cond")
def jax2onnx_cond(dtype: Any) -> Made:
    """Two ways from hidden layer to hidden layer, one of them with a choice of its own; two results from each."""

    def fun(params: Any, x: jax.Array, flag: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = jax.nn.relu(_dense(params["into"], x))

        def wide(h: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jax.nn.relu(_dense(params["left"], h))
            return y, jnp.sum(y, axis=-1)

        def narrow(h: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jax.lax.cond(flag.sum() > 2, lambda z: z * 2, lambda z: z - 1, _dense(params["right"], h))
            return jnp.tanh(y), jnp.sum(h, axis=-1)

        y, total = jax.lax.cond(jnp.sum(x) > 0, wide, narrow, hidden)
        return _dense(params["out"], y), total

    shapes = {
        "into": _dense_shapes(6, 16),
        "left": _dense_shapes(16, 24),
        "right": _dense_shapes(16, 24),
        "out": _dense_shapes(24, 3),
    }
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 6), draw.integers(0, 3, batch)), dtype)


@listed(SOURCE + "jax/lax/scan.py (scan_matrix_carry_multidim_xs, scan_multiple_carry)", "dense", "scan", "reverse")
def jax2onnx_scan(dtype: Any) -> Made:
    """A running sum and a running product of features, read out at each step of a scan from the end."""

    def fun(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = jnp.tanh(_dense(params["into"], x)).swapaxes(0, 1)

        def step(carry: tuple[jax.Array, jax.Array], f: jax.Array) -> tuple[Any, jax.Array]:
            total, product = carry
            total, product = total + f, product * (1 + 0.1 * f)
            return (total, product), _dense(params["read"], total * product)

        start = (jnp.zeros_like(features[0]), jnp.ones_like(features[0]))
        (total, _), outputs = jax.lax.scan(step, start, features, reverse=True, unroll=2)
        return outputs.swapaxes(0, 1), _dense(params["out"], total)

    shapes = {"into": _dense_shapes(5, 16), "read": _dense_shapes(16, 4), "out": _dense_shapes(16, 3)}
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 6, 5),), dtype)


PROGRAMS = (
    jax2onnx_gpt,
    jax2onnx_transformer_decoder,
    jax2onnx_sequential_residual,
    jax2onnx_exclusive_attention,
    jax2onnx_gru_cell,
    jax2onnx_normalized_mlp,
    jax2onnx_fori_loop,
    jax2onnx_while_cnn,
    jax2onnx_vmapped_while,
    jax2onnx_cond,
    jax2onnx_scan,
)
