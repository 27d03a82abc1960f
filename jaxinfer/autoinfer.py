"""The public names: ``from jaxinfer import autoinfer``."""

from jaxinfer.differentiation.jacobian import hessian, jacobian
from jaxinfer.differentiation.laplacian.transform import laplacian
from jaxinfer.differentiation.transform import grad, hvp, jvp, value_and_grad, vjp
from jaxinfer.optimize import Frozen, Optimized, optimize
from jaxinfer.program import VerificationWarning
from jaxinfer.rewriting import Rule, RuleError
from jaxinfer.sparsity.coupling_groups import channel_groups

__all__ = [
    "Frozen",
    "Optimized",
    "Rule",
    "RuleError",
    "VerificationWarning",
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
