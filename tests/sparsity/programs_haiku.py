"""Programs after the examples and networks of Haiku, as pure functions of a dictionary of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from programs_base import Draw, Made, listed, plain

Params = dict[str, Any]


def _conv(params: Params, x: jax.Array, stride: int = 1, padding: Any = "SAME", groups: int = 1) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x,
        params["w"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + params["b"] if "b" in params else y


def _linear(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def _normalized(params: Params, x: jax.Array) -> jax.Array:
    """Batch normalization with the statistics learned in training."""
    inverse = params["scale"] * jax.lax.rsqrt(params["var"] + 1e-5)
    return (x - params["mean"]) * inverse + params["bias"]


def _norm_shapes(width: int) -> Params:
    return dict.fromkeys(("scale", "bias", "mean", "var"), (width,))


@listed("google-deepmind/dm-haiku haiku/_src/nets/mobilenetv1.py", "conv", "depthwise", "norm")
def haiku_mobilenet_v1(dtype: Any) -> Made:
    channels, strides = (12, 16, 16, 24), (1, 2, 1, 2)
    blocks = [
        {
            "depthwise": {"w": (3, 3, 1, into)},
            "norm1": _norm_shapes(into),
            "pointwise": {"w": (1, 1, into, out)},
            "norm2": _norm_shapes(out),
        }
        for into, out in zip((8, *channels), channels)
    ]
    shapes = {
        "stem": {"w": (3, 3, 3, 8)},
        "norm": _norm_shapes(8),
        "blocks": blocks,
        "logits": {"w": (24, 10), "b": (10,)},
    }

    def fun(params: Params, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(_normalized(params["norm"], _conv(params["stem"], x, 2, "VALID")))
        for block, stride in zip(params["blocks"], strides):
            x = _conv(block["depthwise"], x, stride, ((1, 1), (1, 1)), groups=x.shape[-1])
            x = jax.nn.relu(_normalized(block["norm1"], x))
            x = jax.nn.relu(_normalized(block["norm2"], _conv(block["pointwise"], x, 1, "VALID")))
        return _linear(params["logits"], jnp.mean(x, axis=(1, 2)))

    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 17, 17, 3),), dtype)


def _lstm_shapes(into: int, width: int) -> Params:
    return {"w": (into + width, 4 * width), "b": (4 * width,)}


def _lstm(params: Params, state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
    """One step; input, cell, forget and output gates out of one product."""
    hidden, cell = state
    gates = _linear(params, jnp.concatenate([x, hidden], axis=-1))
    i, g, f, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return (hidden, cell), hidden


def _zero_state(batch: int, width: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((batch, width), dtype), jnp.zeros((batch, width), dtype)


@listed(
    "google-deepmind/dm-haiku examples/impala/haiku_nets.py (AtariNet)",
    *("conv", "residual", "recurrent", "scan", "flatten"),
)
def haiku_impala(dtype: Any) -> Made:
    """Residual torso for every frame, an LSTM that starts afresh with each episode, policy and value."""
    widths = (8, 12)
    sections = [
        {"conv": {"w": (3, 3, into, out), "b": (out,)}, "blocks": [[{"w": (3, 3, out, out), "b": (out,)}] * 2] * 2}
        for into, out in zip((2, *widths), widths)
    ]
    shapes = {
        "torso": sections,
        "linear": {"w": (3 * 3 * 12, 16), "b": (16,)},
        "lstm": _lstm_shapes(16, 12),
        "policy": {"w": (12, 4), "b": (4,)},
        "value": {"w": (12, 1), "b": (1,)},
    }

    def torso(params: Params, x: jax.Array) -> jax.Array:
        x = x / 255.0
        for section in params["torso"]:
            x = _conv(section["conv"], x)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
            for block in section["blocks"]:
                y = x
                for conv in block:
                    y = _conv(conv, jax.nn.relu(y))
                x = x + y
        x = jax.nn.relu(x).reshape(x.shape[0], -1)
        return jax.nn.relu(_linear(params["linear"], x))

    def fun(params: Params, frames: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, time = frames.shape[:2]
        features = torso(params, frames.reshape(batch * time, *frames.shape[2:])).reshape(batch, time, -1)
        start = _zero_state(batch, 12, frames.dtype)

        def step(state: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            x, reset = inputs
            state = jax.tree.map(lambda zero, s: jnp.where(reset[:, None], zero, s), start, state)
            return _lstm(params["lstm"], state, x)

        _, core = jax.lax.scan(step, start, (features.swapaxes(0, 1), first.swapaxes(0, 1)))
        core = core.swapaxes(0, 1)
        return _linear(params["policy"], core), _linear(params["value"], core).squeeze(-1)

    def inputs(draw: Draw, batch: int) -> tuple[jax.Array, jax.Array]:
        return draw.uniform(0, 255, batch, 3, 12, 12, 2), draw.integers(0, 3, batch, 3) == 0

    return plain(fun, shapes, inputs, dtype)


@listed("google-deepmind/dm-haiku examples/rnn/train.py", "recurrent", "scan", "dense")
def haiku_char_rnn(dtype: Any) -> Made:
    """Two LSTMs, one on top of the other in one scan, and an MLP at every step."""
    characters, width = 14, 12
    shapes = {
        "lstm1": _lstm_shapes(characters, width),
        "lstm2": _lstm_shapes(width, width),
        "hidden": {"w": (width, width), "b": (width,)},
        "logits": {"w": (width, characters), "b": (characters,)},
    }

    def fun(params: Params, text: jax.Array) -> jax.Array:
        floating = params["logits"]["b"].dtype

        def step(states: tuple[Any, Any], character: jax.Array) -> tuple[Any, jax.Array]:
            x = jax.nn.one_hot(character, characters, dtype=floating)
            first, x = _lstm(params["lstm1"], states[0], x)
            second, x = _lstm(params["lstm2"], states[1], jax.nn.relu(x))
            x = jax.nn.relu(_linear(params["hidden"], x))
            return (first, second), _linear(params["logits"], x)

        state = _zero_state(text.shape[0], width, floating)
        _, logits = jax.lax.scan(step, (state, state), text.T)
        return logits.swapaxes(0, 1)

    return plain(fun, shapes, lambda draw, batch: (draw.integers(0, characters, batch, 8),), dtype)


@listed(
    "google-deepmind/dm-haiku examples/vqvae_example.ipynb", "conv", "transposed conv", "argmin", "gather", "residual"
)
def haiku_vqvae(dtype: Any) -> Made:
    """Encoder, nearest vector of a codebook, decoder."""
    width, code = 12, 8
    shapes = {
        "encoder": [{"w": (4, 4, 3, width), "b": (width,)}, {"w": (3, 3, width, width), "b": (width,)}],
        "residual": [{"w": (3, 3, width, 8), "b": (8,)}, {"w": (1, 1, 8, width), "b": (width,)}],
        "pre": {"w": (1, 1, width, code), "b": (code,)},
        "codebook_embedding": (code, 16),
        "post": {"w": (3, 3, code, width), "b": (width,)},
        "decoder": {"w": (4, 4, width, 3), "b": (3,)},
    }

    def quantized(codebook: jax.Array, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, code)
        distances = jnp.sum(flat**2, 1, keepdims=True) - 2 * flat @ codebook + jnp.sum(codebook**2, 0, keepdims=True)
        nearest = jnp.argmin(distances, axis=1).reshape(x.shape[:-1])
        vectors = jnp.take(codebook.T, nearest, axis=0)
        return x + jax.lax.stop_gradient(vectors - x)

    def fun(params: Params, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(_conv(params["encoder"][0], x, 2))
        x = _conv(params["encoder"][1], x)
        y = _conv(params["residual"][1], jax.nn.relu(_conv(params["residual"][0], jax.nn.relu(x))))
        x = _conv(params["pre"], jax.nn.relu(x + y))
        x = jax.nn.relu(_conv(params["post"], quantized(params["codebook_embedding"], x)))
        up = jax.lax.conv_transpose(x, params["decoder"]["w"], (2, 2), "SAME")
        return up + params["decoder"]["b"]

    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 8, 8, 3),), dtype)


PROGRAMS = (haiku_mobilenet_v1, haiku_impala, haiku_char_rnn, haiku_vqvae)
