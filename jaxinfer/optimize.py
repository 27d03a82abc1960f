"""``autoinfer.optimize``: a function goes in, a faster one with the same results comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxinfer.arguments import Options, is_stateful
from jaxinfer.optimized import Frozen, Optimized
from jaxinfer.pipeline import TUNES, Settings, Tune, registered_rules
from jaxinfer.rewriting import Rule, Tier
from jaxinfer.rewriting.rule import TIERS, check_names

__all__ = ["Frozen", "Optimized", "optimize"]


def optimize(
    fun: Callable[..., Any] | None = None,
    *,
    numerics: Tier = "reassociate",
    tune: Tune | float = "auto",
    verify: bool = True,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Sequence[int] = (),
    rules: Sequence[Rule] | None = None,
) -> Any:
    """Makes a function faster without changing what it computes.

    The function is traced, rewritten by verified rules, and compiled. At the first call with a new signature the result
    is compared with the original's and both are timed; the rewritten program is used only if it agrees and is faster.
    The returned object is called like ``jax.jit(fun)`` and composes with ``jit``, ``grad``, ``vmap``, ``scan`` and the
    rest of JAX.

    Args:
        fun: a function of pytrees of arrays, or a Flax NNX or Equinox module. Left out, ``optimize(...)`` is a
            decorator with options.
        numerics: ``"bitwise"`` (every remaining operation computes what it computed before), ``"reassociate"`` (equal
            over the reals, with rounding errors of the same order), or ``"lossy"``.
        tune: ``"off"`` (analytic cost model, deterministic, nothing is timed), ``"auto"`` (measures what the cache does
            not have, for 30 seconds at most), ``"full"`` (for ten minutes at most, ignoring earlier verdicts), or a
            number of seconds.
        verify: compare with the original at the first call.
        static_argnums: as for ``jax.jit``.
        static_argnames: as for ``jax.jit``.
        donate_argnums: as for ``jax.jit``.
        rules: the rules to use, instead of all registered ones.

    Returns:
        An :class:`Optimized`.

    Raises:
        TypeError: if ``fun`` is not callable.
        ValueError: for an unknown ``numerics`` or ``tune``.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinfer import autoinfer
        >>> @autoinfer.optimize
        ... def energy(a, b, x):
        ...     return jnp.sum(a @ b @ x)
        >>> float(energy(jnp.eye(3), jnp.eye(3), jnp.ones(3)))
        3.0
    """
    if numerics not in TIERS:
        raise ValueError(f"numerics={numerics!r}: use one of {', '.join(map(repr, TIERS))}")
    if isinstance(tune, bool) or not (tune in TUNES or isinstance(tune, (int, float))):
        raise ValueError(f"tune={tune!r}: use one of {', '.join(map(repr, TUNES))}, or a number of seconds")
    # Registered rules are loaded here, where a broken plugin is noticed, and not in the middle of the first call.
    settings = Settings(numerics, tune, verify, registered_rules() if rules is None else check_names(rules))
    options = Options(
        (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums),
        (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames),
        (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums),
    )
    if fun is None:
        return lambda f: _optimized(f, settings, options)
    return _optimized(fun, settings, options)


def _optimized(fun: Any, settings: Settings, options: Options) -> Optimized:
    if not callable(fun):
        raise TypeError(f"optimize takes a function or a callable module, not {type(fun).__name__}")
    if is_stateful(fun) or (not callable(getattr(fun, "__get__", None)) and jax.tree.leaves(fun) != [fun]):
        # A module: its arrays are arguments like any other, its class says what to compute.
        return Optimized(type(fun).__call__, settings, options.shifted(-1), ((fun,), {}))
    return Optimized(fun, settings, options)
