"""Programs after the recurrent, graph and small attention examples of Flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from programs_base import Draw, Made, from_nnx, linen, listed

VOCABULARY = 16


class _DecoderCell(nn.RNNCellBase):
    """An LSTM whose input is the true previous token, or its own last guess."""

    features: int
    teacher_force: bool
    dtype: Any

    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        state, last = carry
        cell = nn.LSTMCell(self.features, param_dtype=self.dtype)
        state, y = cell(state, x if self.teacher_force else last)
        logits = nn.Dense(VOCABULARY, param_dtype=self.dtype)(y)
        guess = jax.nn.one_hot(jnp.argmax(logits, axis=-1), VOCABULARY, dtype=self.dtype)
        return (state, guess), logits

    @property
    def num_feature_axes(self) -> int:
        return 1


class _Seq2seq(nn.Module):
    hidden: int
    teacher_force: bool
    dtype: Any

    @nn.compact
    def __call__(self, question: jax.Array, answer: jax.Array, lengths: jax.Array) -> jax.Array:
        encoder = nn.RNN(nn.LSTMCell(self.hidden, param_dtype=self.dtype), return_carry=True)
        state, _ = encoder(question, seq_lengths=lengths)
        decoder = nn.RNN(_DecoderCell(self.hidden, self.teacher_force, self.dtype))
        return decoder(answer[:, :-1], initial_carry=(state, answer[:, 0]))


def _questions(draw: Draw, batch: int) -> tuple[jax.Array, ...]:
    one_hot = jax.nn.one_hot(draw.integers(0, VOCABULARY, batch, 11), VOCABULARY, dtype=draw.dtype)
    return one_hot[:, :7], one_hot[:, 7:], draw.integers(1, 7, batch)


@listed("google/flax examples/seq2seq/models.py", "recurrent", "scan", "gather")
def flax_seq2seq(dtype: Any) -> Made:
    return linen(_Seq2seq(16, True, dtype), _questions, dtype)


@listed("google/flax examples/seq2seq/models.py (teacher_force=False)", "recurrent", "scan", "gather", "argmax")
def flax_seq2seq_feedback(dtype: Any) -> Made:
    return linen(_Seq2seq(16, False, dtype), _questions, dtype)


@jax.vmap
def _flip(sequence: jax.Array, length: jax.Array) -> jax.Array:
    """Reverse the first `length` entries and leave the padding at the end."""
    return jnp.flip(jnp.roll(sequence, sequence.shape[0] - length, axis=0), axis=0)


class _TextClassifier(nn.Module):
    """Embedding, LSTMs both ways, additive attention over the tokens, MLP."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, 12, param_dtype=self.dtype)(tokens)
        ahead, back = (nn.RNN(nn.OptimizedLSTMCell(self.hidden, param_dtype=self.dtype)) for _ in range(2))
        x = jnp.concatenate([ahead(x), _flip(back(_flip(x, lengths)), lengths)], axis=-1)
        energy = nn.Dense(1, use_bias=False)(jnp.tanh(nn.Dense(self.hidden, use_bias=False)(x))).squeeze(-1)
        valid = jnp.arange(x.shape[1]) < lengths[:, None]
        attention = nn.softmax(jnp.where(valid, energy, -jnp.inf), axis=-1)
        context = (attention[:, None] @ x).squeeze(1)
        return nn.Dense(2, use_bias=False)(jnp.tanh(nn.Dense(self.hidden)(context)))


@listed("google/flax examples/sst2/models.py", "recurrent", "scan", "concat", "attention", "embedding", "vmap")
def flax_sst2(dtype: Any) -> Made:
    def inputs(draw: Draw, batch: int) -> tuple[jax.Array, ...]:
        return draw.integers(0, VOCABULARY, batch, 8), draw.integers(1, 9, batch)

    return linen(_TextClassifier(12, dtype), inputs, dtype)


class _Graph(NamedTuple):
    nodes: jax.Array
    edges: jax.Array
    globals: jax.Array


class _GraphMLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        x = jnp.concatenate(parts, axis=-1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


class _GraphNet(nn.Module):
    """Rounds of message passing: edges, then nodes, then globals, each from all it touches."""

    width: int

    @nn.compact
    def __call__(self, nodes: jax.Array, edges: jax.Array, senders: jax.Array, receivers: jax.Array) -> jax.Array:
        count = nodes.shape[0]
        graph = _Graph(*(nn.Dense(self.width)(x) for x in (nodes, edges, jnp.zeros_like(nodes[0]))))
        for _ in range(2):
            shared = jnp.broadcast_to(graph.globals, (edges.shape[0], self.width))
            ends = graph.nodes[senders], graph.nodes[receivers]
            new_edges = _GraphMLP(self.width)(graph.edges, *ends, shared)
            sent, received = (jax.ops.segment_sum(new_edges, i, count) for i in (senders, receivers))
            shared = jnp.broadcast_to(graph.globals, (count, self.width))
            new_nodes = _GraphMLP(self.width)(graph.nodes, sent, received, shared)
            new_globals = _GraphMLP(self.width)(new_nodes.sum(0), new_edges.sum(0), graph.globals)
            summed = jax.tree.map(jnp.add, graph, _Graph(new_nodes, new_edges, new_globals))
            graph = _Graph(*(nn.LayerNorm()(x) for x in summed))
        return nn.Dense(5)(graph.globals)


@listed("google/flax examples/ogbg_molpcba/models.py", "graph", "concat", "residual", "norm", "scatter", "vmap")
def flax_graph_net(dtype: Any) -> Made:
    def inputs(draw: Draw, batch: int) -> tuple[jax.Array, ...]:
        ends = draw.integers(0, 6, batch, 10), draw.integers(0, 6, batch, 10)
        return draw.normal(batch, 6, 9), draw.normal(batch, 10, 3), *ends

    one = linen(_GraphNet(12), lambda draw, _: tuple(x[0] for x in inputs(draw, 1)), dtype)
    fun = jax.vmap(one.fun, in_axes=(None, 0, 0, 0, 0))
    return Made(fun, one.params, lambda batch: inputs(Draw(dtype, 1000 + batch), batch))


class _HeadAttention(nn.Module):
    """One head, for the whole sequence."""

    width: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (nn.Dense(self.width, use_bias=False, name=n)(x) for n in ("query", "key", "value"))
        weights = jax.nn.softmax(jax.lax.dot_general(query, key, (((1,), (1,)), ((), ()))), axis=1)
        return nn.Dense(self.out, name="out")(weights @ value)


@listed("google/flax examples/linen_design_test/attention_simple.py", "attention", "vmap")
def flax_vmapped_heads(dtype: Any) -> Made:
    """Heads by one vmap, the batch by another; the heads' outputs are averaged."""
    heads = nn.vmap(
        _HeadAttention, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=-2, axis_size=4
    )
    batched = nn.vmap(heads, variable_axes={"params": None}, split_rngs={"params": False})
    made = linen(batched(8, 16), lambda draw, batch: (draw.normal(batch, 6, 16),), dtype)
    return Made(lambda params, x: made.fun(params, x).mean(axis=-2), made.params, made.inputs)


class _ScanBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.norm(self.linear(x)))


class _ScanMLP(nnx.Module):
    """Layers stacked by vmap and applied by scan, between two ordinary ones."""

    def __init__(self, width: int, layers: int, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(axis_size=layers)
        def blocks(rngs: nnx.Rngs) -> _ScanBlock:
            return _ScanBlock(width, rngs)

        self.into = nnx.Linear(6, width, rngs=rngs)
        self.blocks = blocks(rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan
        def layer(x: jax.Array, block: _ScanBlock) -> tuple[jax.Array, None]:
            return block(x), None

        x, _ = layer(self.into(x), self.blocks)
        return self.out(x)


@listed("google/flax examples/nnx_toy_examples/06_scan_over_layers.py", "dense", "norm", "scan", "stacked layers")
def flax_scan_over_layers(dtype: Any) -> Made:
    return from_nnx(lambda rngs: _ScanMLP(12, 5, rngs), lambda draw, batch: (draw.normal(batch, 6),), dtype)


class _AutoEncoder(nn.Module):
    """Two MLPs with a flattened image at either end."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.reshape(x.shape[0], -1)
        for width in (16, 12, 8, 12, 16):
            activation: Callable[[jax.Array], jax.Array] = nn.relu if width != 8 else lambda z: z
            y = activation(nn.Dense(width)(y))
        return nn.sigmoid(nn.Dense(x[0].size)(y)).reshape(x.shape)


@listed("google/flax examples/linen_design_test/autoencoder.py", "dense", "flatten")
def flax_autoencoder(dtype: Any) -> Made:
    return linen(_AutoEncoder(), lambda draw, batch: (draw.uniform(0, 1, batch, 6, 6, 1),), dtype)


PROGRAMS = (
    flax_seq2seq,
    flax_seq2seq_feedback,
    flax_sst2,
    flax_graph_net,
    flax_vmapped_heads,
    flax_scan_over_layers,
    flax_autoencoder,
)
