"""Dynamic loss scaling: gradients too small for float16 are kept from becoming zero.

The loss is multiplied by a scale before it is differentiated, and the gradients are divided by it before the optimizer
sees them. A step whose gradients are not finite is skipped and halves the scale; after so many good ones in a row it is
doubled.

Reference: Micikevicius et al., "Mixed precision training", ICLR 2018 (section 3.2); Nvidia's training guide for the
schedule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# float32 ends at 2^127; gradients need room above the scale.
_MOST = 2.0**64


class LossScaleState(NamedTuple):
    """What :func:`loss_scaling` carries from step to step.

    Attributes:
        scale: what to multiply the loss with, a float32 scalar.
        good: finite steps since the scale last changed, int32.
        skipped: steps that were left out altogether, int32.
        inner: the optimizer's state.
    """

    scale: Any
    good: Any
    skipped: Any
    inner: Any


def loss_scaling(
    optimizer: optax.GradientTransformation,
    initial: float = 2.0**15,
    *,
    factor: float = 2.0,
    period: int = 2000,
    least: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that takes the gradients of ``loss * state.scale``.

    Args:
        optimizer: what sees the gradients of the loss itself.
        initial: the first scale.
        factor: what the scale is divided or multiplied by.
        period: good steps in a row before it is multiplied.
        least: the least scale.

    Returns:
        A transformation whose state is a :class:`LossScaleState`. Where a gradient is not finite its updates are zero
        and the optimizer's state stays as it was.

    Raises:
        ValueError: for a factor of 1 or less, a period below 1, or scales that are not positive.

    Example:
        >>> optimizer = loss_scaling(optax.adam(1e-3))
        >>> state = optimizer.init(params)
        >>> gradients = jax.grad(lambda p: loss(p, batch) * state.scale)(params)
        >>> updates, state = optimizer.update(gradients, state, params)
    """
    if factor <= 1 or period < 1 or not 0 < least <= initial <= _MOST:
        raise ValueError(
            f"factor={factor}, period={period}, least={least}, initial={initial}: the factor is more than 1, the "
            f"period 1 at least, and 0 < least ≤ initial ≤ {_MOST:g}"
        )
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> LossScaleState:
        zero = jnp.zeros((), jnp.int32)
        return LossScaleState(jnp.asarray(initial, jnp.float32), zero, zero, wrapped.init(params))

    def update(updates: Any, state: LossScaleState, params: Any = None, **extra: Any) -> tuple[Any, LossScaleState]:
        gradients = jax.tree.map(lambda g: _divided(g, state.scale), updates)
        fine = all_finite(gradients)
        new, inner = wrapped.update(gradients, state.inner, params, **extra)
        new = jax.tree.map(lambda u: jnp.where(fine, u, jnp.zeros_like(u)), new)
        inner = jax.tree.map(lambda a, b: jnp.where(fine, b, a), state.inner, inner)
        good = jnp.where(fine, state.good + 1, 0)
        grown = jnp.where(good >= period, jnp.minimum(state.scale * factor, _MOST), state.scale)
        scale = jnp.where(fine, grown, jnp.maximum(state.scale / factor, least))
        good = jnp.where(good >= period, 0, good)
        return new, LossScaleState(scale, good, state.skipped + jnp.where(fine, 0, 1), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds NaN or infinity, a bool scalar."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def _divided(gradient: Any, scale: Any) -> Any:
    # In the gradient's own type the scale itself may be infinite.
    return (gradient.astype(jnp.float32) / scale).astype(gradient.dtype)
