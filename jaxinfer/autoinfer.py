"""The public names: ``from jaxinfer import autoinfer``."""

from jaxinfer.optimize import Frozen, Optimized, optimize
from jaxinfer.program import VerificationWarning
from jaxinfer.rewriting import Rule, RuleError

__all__ = ["Frozen", "Optimized", "Rule", "RuleError", "VerificationWarning", "optimize"]
