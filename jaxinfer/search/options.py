"""Compiler options worth trying on a whole program.

They belong to one compilation, so they hold for programs called at top level and not for those nested in another jit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# XLA:CPU hands matrix products to one of two libraries. Which of them is faster, and scales better over cores, depends
# on the shapes of the whole program; without YNN fusions products go to the other one.
_WORTH_TRYING: Mapping[str, tuple[tuple[str, Mapping[str, str]], ...]] = {
    "cpu": (("without YNN fusions", {"xla_cpu_experimental_ynn_fusion_type": ""}),),
}


@functools.cache
def compiler_options(platform: str) -> tuple[tuple[str, Mapping[str, str]], ...]:
    """Options for a platform that this version of XLA knows: (in words, as ``jax.jit`` takes them)."""
    return tuple((words, options) for words, options in _WORTH_TRYING.get(platform, ()) if known(options))


def known(options: Mapping[str, str]) -> bool:
    """Whether this version of XLA has such compiler options."""
    try:
        jax.jit(jnp.negative, compiler_options=dict(options)).lower(jnp.float32(1)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
