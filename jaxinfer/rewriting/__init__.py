"""Patterns, rules, the engine that applies them, and the prover that tests every one."""

from jaxinfer.rewriting.engine import Log, Replacement, Rewriter
from jaxinfer.rewriting.fold import compile_known, evaluate_known, fold
from jaxinfer.rewriting.pattern import Match, Pattern, is_float, known, number, op, var
from jaxinfer.rewriting.rule import Find, Rule, RuleError, Tier, load_rules, within

__all__ = [
    "Find",
    "Log",
    "Match",
    "Pattern",
    "Replacement",
    "Rewriter",
    "Rule",
    "RuleError",
    "Tier",
    "compile_known",
    "evaluate_known",
    "fold",
    "is_float",
    "known",
    "load_rules",
    "number",
    "op",
    "var",
    "within",
]
