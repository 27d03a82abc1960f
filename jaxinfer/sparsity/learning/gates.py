"""Hard-concrete gates: random variables on [0, 1] that are exactly 0 or 1 with a probability that can be learned.

With u uniform on (0, 1) and a location log α,

    s = σ((log u − log(1 − u) + log α) / β),    z = min(1, max(0, s·(ζ − γ) + γ)),

so that P(z > 0) = σ(log α − β·log(−γ/ζ)), which is differentiable in log α.

Reference: Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization", ICLR 2018.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

BETA = 2 / 3
"""Temperature β of the relaxation."""
GAMMA, ZETA = -0.1, 1.1
"""The interval that the concrete distribution is stretched to before it is clipped."""

# Sixteen random bits for each gate: two for each number that is drawn, which is what takes the time. u is a multiple of
# 2⁻¹⁶ and a half, and so never 0 or 1.
_BITS = 16


def sample(log_alpha: jax.Array, key: jax.Array) -> jax.Array:
    """One draw of every gate, differentiable in ``log_alpha`` (float32, any shape)."""
    words = jax.random.bits(key, (-(-log_alpha.size // 2),), jnp.uint32)
    bits = jnp.concatenate([words & (2**_BITS - 1), words >> _BITS])[: log_alpha.size]
    u = (bits.reshape(log_alpha.shape).astype(jnp.float32) + 0.5) / 2**_BITS
    noise = jnp.log(u / (1 - u))
    return _stretch(jax.nn.sigmoid((noise + log_alpha) / BETA))


def probability(log_alpha: jax.Array) -> jax.Array:
    """The probability that each gate is not zero."""
    return jax.nn.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def expected(log_alpha: jax.Array) -> jax.Array:
    """What a gate is set to once nothing is drawn any more: the stretched and clipped σ(log α)."""
    return _stretch(jax.nn.sigmoid(log_alpha))


def location(open_probability: float) -> float:
    """The log α at which a gate is not zero with the given probability."""
    return math.log(open_probability / (1 - open_probability)) + BETA * math.log(-GAMMA / ZETA)


def _stretch(s: jax.Array) -> jax.Array:
    return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)
