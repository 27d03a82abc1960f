"""Random small programs for derivatives, whose text is a reproducer."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SMALL = 24


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


def _window(x, reduce, start):
    return lax.reduce_window(x, start, reduce, (2,), (1,), "SAME")


def _clip(i, n):
    return jnp.clip(i, 0, n - 1)


# Of a vector and a generator of known numbers.
UNARY = {
    "sin": lambda x, r: jnp.sin(x),
    "tanh": lambda x, r: jnp.tanh(x),
    "square": lambda x, r: x**2,
    "relu": lambda x, r: jax.nn.relu(x),
    "abs": lambda x, r: jnp.abs(x),
    "sign": lambda x, r: jnp.sign(x),
    "floor": lambda x, r: jnp.floor(x),
    "stop": lambda x, r: lax.stop_gradient(x),
    "softplus": lambda x, r: jax.nn.softplus(x),
    "exp": lambda x, r: jnp.exp(-(x**2)),
    "scale": lambda x, r: x * 2.5,
    "half": lambda x, r: x / 2,
    "mask": lambda x, r: x * r.integers(0, 2, x.shape),
    "where known": lambda x, r: jnp.where(r.integers(0, 2, x.shape) > 0, x, 0.5),
    "where": lambda x, r: jnp.where(x > 0, x[::-1], 2 * x),
    "clip": lambda x, r: jnp.clip(x, -0.5, 0.5),
    "roll": lambda x, r: jnp.roll(x, 1),
    "flip": lambda x, r: x[::-1],
    "head": lambda x, r: x[: max(1, len(x) - 1)],
    "stride": lambda x, r: x[::2],
    "pad": lambda x, r: jnp.pad(x, (1, 0)),
    "difference": lambda x, r: x[1:] - x[:-1] if len(x) > 1 else x,
    "outer": lambda x, r: jnp.outer(x, x)[:3].ravel()[:SMALL],
    "tril": lambda x, r: jnp.tril(jnp.outer(x, x)) @ x if len(x) < 6 else x,
    "pairs": lambda x, r: jnp.repeat(x, 2)[:SMALL],
    "table": lambda x, r: (x.reshape(-1, 2) if len(x) % 2 == 0 else x[None]).T.ravel(),
    "row sums": lambda x, r: (x.reshape(-1, 2) if len(x) % 2 == 0 else x[None]).sum(0),
    "row maxima": lambda x, r: (x.reshape(-1, 2) if len(x) % 2 == 0 else x[None]).max(0),
    "cumsum": lambda x, r: jnp.cumsum(x),
    "cumprod": lambda x, r: jnp.cumprod(x),
    "cummax": lambda x, r: lax.cummax(x),
    "product": lambda x, r: x * jnp.prod(x),
    "sort": lambda x, r: jnp.sort(x),
    "top": lambda x, r: lax.top_k(x, 1)[0],
    "mean": lambda x, r: x - jnp.mean(x),
    "softmax": lambda x, r: jax.nn.softmax(x),
    "logsumexp": lambda x, r: x + jax.nn.logsumexp(x),
    "sparse matrix": lambda x, r: (r.integers(-1, 2, (4, len(x))) * (r.random((4, len(x))) < 0.4)) @ x,
    "matrix": lambda x, r: r.standard_normal((3, len(x))) @ x,
    "gather": lambda x, r: x[r.integers(0, len(x), 5)],
    "gather fill": lambda x, r: x.at[r.integers(0, len(x) + 3, 4)].get(mode="fill", fill_value=1.0),
    "gather unknown": lambda x, r: x[jnp.argsort(x)[:2]],
    "slice unknown": lambda x, r: lax.dynamic_slice(x, (jnp.argmax(x),), (1,)) * x,
    "set": lambda x, r: x.at[r.integers(0, len(x), 2)].set(x[0] ** 2),
    "add at": lambda x, r: x.at[r.integers(0, len(x), 3)].add(x[0] * x[-1]),
    "add somewhere": lambda x, r: x.at[jnp.argmin(x)].add(x[0] ** 2),
    "set somewhere": lambda x, r: x.at[jnp.argmax(x)].set(x[-1] ** 2),
    "update": lambda x, r: lax.dynamic_update_slice(x, x[:1] ** 2, (jnp.argmax(x),)),
    "max at": lambda x, r: x.at[r.integers(0, len(x), 2)].max(x[0]),
    "convolve": lambda x, r: jnp.convolve(x, np.array([1.0, 0.0, -2.0]), mode="same"),
    "convolve itself": lambda x, r: jnp.convolve(x, x[:2], mode="full")[:SMALL],
    "window sum": lambda x, r: _window(x, lax.add, 0.0),
    "window max": lambda x, r: _window(x, lax.max, -jnp.inf),
    "fft": lambda x, r: jnp.fft.rfft(x).real,
    "solve": lambda x, r: lax.linalg.triangular_solve(
        jnp.eye(len(x)) + jnp.tril(r.standard_normal((len(x), len(x))), -1) / 8, x[:, None], left_side=True, lower=True
    )[:, 0],
    "scan": lambda x, r: lax.scan(lambda c, v: (c * v + 1, c + v**2), 1.0, x)[1],
    "scan back": lambda x, r: lax.scan(lambda c, v: (v, c * v), x[0], x, reverse=True)[1],
    "loop": lambda x, r: lax.fori_loop(0, 2, lambda i, c: c.at[i % len(c)].set(c[-1] * c[i % len(c)]), x),
    "long loop": lambda x, r: lax.fori_loop(0, 3, lambda i, c: jnp.roll(c, 1) * 0.5 + c, x),
    "branch": lambda x, r: lax.cond(x[0] > 0, lambda x: x * x[0], lambda x: x[::-1], x),
    "known branch": lambda x, r: lax.cond(np.bool_(True), lambda x: x**2, lambda x: jnp.full_like(x, x.sum()), x),
    "remat": lambda x, r: jax.checkpoint(lambda x: jnp.sin(x) * x)(x),
    "vmap": lambda x, r: jax.vmap(lambda a: jnp.sin(a) * a)(x),
    "jit": lambda x, r: jax.jit(lambda x: x * jnp.roll(x, 1))(x),
    "custom": lambda x, r: straight_through(x) * x,
    "cancel": lambda x, r: (x + x[0]) - x,
}


def _same_length(f):
    def fun(x, y):
        n = min(len(x), len(y))
        return f(x[:n], y[:n])

    return fun


BINARY = {
    "+": _same_length(jnp.add),
    "-": _same_length(jnp.subtract),
    "*": _same_length(jnp.multiply),
    "/": _same_length(lambda x, y: x / (2 + y**2)),
    "max": _same_length(jnp.maximum),
    "atan2": _same_length(lambda x, y: jnp.arctan2(x, 2 + y**2)),
    "join": lambda x, y: jnp.concatenate([x, y])[:SMALL],
    "dot": _same_length(lambda x, y: jnp.dot(x, y)[None]),
    "choose": _same_length(lambda x, y: jnp.where(x > y, x, y**2)),
}


@dataclass(frozen=True)
class RandomProgram:
    """A program from a vector to a vector, drawn from a seed."""

    seed: int
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    length: int

    @classmethod
    def draw(cls, seed, most=6):
        rng = np.random.default_rng(seed)
        steps = []
        for i in range(rng.integers(1, most + 1)):
            if rng.random() < 0.7:
                # Mostly the value made last, so that programs are deep.
                source = i if rng.random() < 0.7 else int(rng.integers(0, i + 1))
                steps.append((str(rng.choice(list(UNARY))), (source,)))
            else:
                steps.append((str(rng.choice(list(BINARY))), tuple(map(int, rng.integers(0, i + 1, 2)))))
        return cls(seed, tuple(steps), int(rng.integers(2, 8)))

    def __call__(self, x):
        values, known = [x], np.random.default_rng(self.seed)
        for name, sources in self.steps:
            operands = [values[s] for s in sources]
            values.append(UNARY[name](*operands, known) if name in UNARY else BINARY[name](*operands))
        return values[-1]

    def argument(self):
        return jnp.asarray(np.random.default_rng(self.seed + 1).standard_normal(self.length))

    def __str__(self):
        return f"RandomProgram.draw({self.seed}): {self.length} inputs, " + "; ".join(
            f"v{i + 1} = {name}({', '.join(f'v{s}' for s in sources)})" for i, (name, sources) in enumerate(self.steps)
        )
