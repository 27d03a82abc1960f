"""The rules: one file per subject, each a table that anybody can read and extend."""

from jaxinfer.rewrites import convolution
from jaxinfer.rewriting import Rule

RULES: tuple[Rule, ...] = (*convolution.RULES,)
