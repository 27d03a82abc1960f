"""Scalars to differentiate: from a model's outputs and inputs to its usual loss, with made-up targets.

The targets are fixed by their position, so that a loss is a function of variables and inputs alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def classification(logits: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [..., classes] against the labels 0, 1, 2, … in order."""
    flat = logits.reshape(-1, logits.shape[-1])
    labels = jnp.arange(flat.shape[0]) % flat.shape[1]
    return optax.softmax_cross_entropy_with_integer_labels(flat, labels).mean()


def next_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [batch, length, vocabulary] against the token that follows."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def regression(outputs: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Mean squared distance of outputs [..., features] to one fixed wave over the features."""
    wave = jnp.cos(jnp.arange(outputs.shape[-1], dtype=outputs.dtype))
    return jnp.mean((outputs - wave) ** 2)


def ctc(log_probabilities: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Mean CTC loss of log-probabilities [batch, time, symbols] against time / 4 symbols, in rotation."""
    batch, time, symbols = log_probabilities.shape
    labels = jnp.broadcast_to(1 + jnp.arange(time // 4) % (symbols - 1), (batch, time // 4))
    padding = jnp.zeros((batch, time), log_probabilities.dtype)
    return optax.ctc_loss(log_probabilities, padding, labels, padding[:, : time // 4]).mean()


def spelling(outputs: tuple[jax.Array, jax.Array], *inputs: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [batch, steps, phonemes] against the phonemes chosen by them."""
    phonemes, logits = outputs
    return optax.softmax_cross_entropy_with_integer_labels(logits, phonemes).mean()
