"""Compiler options worth trying on a whole program.

They belong to one compilation, so they hold for programs called at top level and not for those nested in another jit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Trial:
    """Compiler options to try.

    Attributes:
        words: how reports call them.
        options: as ``jax.jit`` takes them.
        longest_s: programs that are estimated to take longer are not compiled with them.
    """

    words: str
    options: Mapping[str, str]
    longest_s: float = math.inf


# XLA:CPU hands matrix products to one of two libraries. Which of them is faster, and scales better over cores, depends
# on the shapes of the whole program; without YNN fusions products go to the other one. In a program of some tens of
# microseconds, handing parts of a product to other cores and waiting for them takes longer than it saves.
_ALONE: Mapping[str, str] = {"xla_cpu_experimental_ynn_fusion_type": ""}
_WORTH_TRYING: Mapping[str, tuple[Trial, ...]] = {
    "cpu": (
        Trial("without YNN fusions", _ALONE),
        Trial("without YNN fusions, each product on one core", {**_ALONE, "xla_cpu_multi_thread_eigen": "False"}, 5e-4),
    ),
}


def compiler_options(platform: str, seconds: float) -> tuple[Trial, ...]:
    """What to try with a program on a platform, as far as this version of XLA knows it.

    Args:
        platform: as JAX calls it.
        seconds: what the program is estimated to take.
    """
    return tuple(trial for trial in _known_trials(platform) if seconds <= trial.longest_s)


@functools.cache
def _known_trials(platform: str) -> tuple[Trial, ...]:
    return tuple(trial for trial in _WORTH_TRYING.get(platform, ()) if known(trial.options))


def known(options: Mapping[str, str]) -> bool:
    """Whether this version of XLA has such compiler options."""
    try:
        jax.jit(jnp.negative, compiler_options=dict(options)).lower(jnp.float32(1)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
