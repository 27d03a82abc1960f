"""The public names: ``from jaxinfer import autoinfer``."""

from jaxinfer.differentiation.jacobian import hessian, jacobian
from jaxinfer.differentiation.laplacian.transform import laplacian
from jaxinfer.differentiation.transform import grad, hvp, jvp, value_and_grad, vjp
from jaxinfer.optimize import Frozen, Optimized, optimize
from jaxinfer.program import VerificationWarning
from jaxinfer.rewriting import Rule, RuleError

__all__ = [
    "Frozen",
    "Optimized",
    "Rule",
    "RuleError",
    "VerificationWarning",
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
