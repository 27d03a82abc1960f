"""A small classification problem, and networks to learn masks for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

FEATURES, CLASSES = 12, 3


def data(count=256, seed=0):
    """Three classes that only the first four features tell apart."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    centres = np.random.default_rng(99).normal(size=(CLASSES, FEATURES)) * 3
    centres[:, 4:] = 0
    return (centres[y] + rng.normal(size=(count, FEATURES))).astype(np.float32), y


X, Y = data()


def mlp_params(widths=(16, 8), dtype=jnp.float32, seed=0):
    sizes = (FEATURES, *widths, CLASSES)
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        f"layer{i}": {"kernel": (jax.random.normal(k, (a, b)) / a**0.5).astype(dtype), "bias": jnp.zeros(b, dtype)}
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def mlp(params, x):
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = x.astype(layer["kernel"].dtype) @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def loss(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, x).astype(jnp.float32), y).mean()


def batch(step):
    rows = np.random.default_rng(step).integers(0, len(X), 32)
    return X[rows], Y[rows]


def accuracy(params):
    x, y = data(512, seed=1)
    return float((np.argmax(mlp(params, x), -1) == y).mean())
