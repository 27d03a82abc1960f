"""jaxinfer: a differentiable graph optimizer for JAX. The same results, less work.

``import jaxinfer as autoinfer`` and ``from jaxinfer import autoinfer`` give the same names.
"""

from jaxinfer import autoinfer
from jaxinfer.autoinfer import (
    Frozen,
    Optimized,
    Rule,
    RuleError,
    VerificationWarning,
    channel_groups,
    grad,
    hessian,
    hvp,
    jacobian,
    jvp,
    laplacian,
    optimize,
    value_and_grad,
    vjp,
)

__all__ = [
    "Frozen",
    "Optimized",
    "Rule",
    "RuleError",
    "VerificationWarning",
    "autoinfer",
    "channel_groups",
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "laplacian",
    "optimize",
    "value_and_grad",
    "vjp",
]
