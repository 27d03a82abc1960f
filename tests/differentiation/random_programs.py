"""Random smooth programs of one vector, printed as code that can be run again."""

from __future__ import annotations

import random

_UNARY = ("jnp.sin({0})", "jnp.tanh({0})", "jnp.exp(-{0}**2)", "jnp.log1p({0}**2)", "{0}**3", "-{0}")
_UNARY += ("jnp.sqrt(1 + {0}**2)",)
_UNARY += ("{0}[::-1]", "jnp.cumsum({0})", "jnp.roll({0}, 1)", "jnp.sort({0})", "jax.nn.softmax({0})", "jnp.abs({0})")
_UNARY += ("jnp.concatenate([{0}[2:], {0}[:2]])", "jnp.where({0} > 0.1, {0}, 0.5 * {0})", "A @ {0}", "{0} @ A + 1")
_UNARY += ("jnp.outer({0}, {0}).sum(0)", "jnp.linalg.solve(A + 9 * jnp.eye(N), {0})", "{0}.at[1].set({0}[0] * 2)")
_UNARY += (
    "jax.lax.scan(lambda c, r: (jnp.tanh(c * r), c + r), {0}[0], {0})[1]",
    "jax.lax.cond({0}[0] > 0, lambda v: jnp.sin(v), lambda v: v * v, {0})",
    "jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + {0}, {0})",
)
_BINARY = ("{0} + {1}", "{0} * {1}", "{0} - {1}", "{0} / (2 + {1}**2)", "jnp.maximum({0}, {1})")
_BINARY += ("jnp.dot({0}, {1}) * {0}",)


def random_program(seed: int) -> str:
    """Source of ``f(x)``, a smooth scalar function (but for isolated points) of a vector of length N."""
    rng = random.Random(seed)
    names, lines = ["x"], []
    for i in range(rng.randint(3, 7)):
        pattern = rng.choice(_UNARY if rng.random() < 0.65 else _BINARY)
        lines.append(f"    v{i} = {pattern.format(rng.choice(names), rng.choice(names))}")
        names.append(f"v{i}")
    return "\n".join(["def f(x):", *lines, f"    return jnp.sum(jnp.sin({names[-1]}) + 0.1 * {rng.choice(names)})"])
