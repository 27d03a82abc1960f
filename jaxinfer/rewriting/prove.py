"""The prover: what a rule promises, tried before anybody relies on it.

Each program that ``rule.cases(sampler)`` yields is traced, rewritten by that rule alone, checked, and compared with
what it was:

* **exactly**, where both sides are polynomials: over whole numbers modulo 2**64, at random points;
* **over the reals**: both sides agree to rounding with float64 in place of every float;
* **in float64, float32, bfloat16 and float16**: a ``bitwise`` rule gives the same bits, operation by operation; the
  error of a ``reassociate`` rule against the reals is at most 8 times the original's (or 4 ulps of the largest result);
  that of a ``lossy`` one at most 1/20 of the largest result;
* **on zeros of both signs and denormals** likewise; **on NaN and ±Inf** results are NaN, Inf and -Inf in the same
  places, unless the rule is declared ``finite``;
* **in int32**, where the rule fires there at all: exactly;
* **derivatives** in float64 along random directions agree, unless the tier is ``lossy``;
* **edge trials**: sizes 0 and 1, zeros among known values; here a rule may decline and a program may be invalid.

:mod:`jaxinfer.rewriting.sampler` says how cases are written and how one leaves out a dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.rewriting import checks
from jaxinfer.rewriting.case import Case, ProofError, draw
from jaxinfer.rewriting.rule import Rule
from jaxinfer.rewriting.sampler import Sampler

DTYPES = ("float64", "float32", "bfloat16", "float16", "int32")
_EDGE_TRIALS = 4


@dataclass
class Proof:
    """What was tried of one rule, and how close it came.

    Attributes:
        rule: its name.
        runs: programs on which it fired, by dtype.
        exact: programs proved over the integers.
        derivatives: programs whose derivatives were compared and do not vanish.
        special: evaluations on zeros, denormals, NaN and ±Inf.
        edges: edge trials in which it fired.
        error_ratio: by dtype, the largest error against the reals, in units of the original's (counted as one ulp of
            the largest result where it is smaller).
    """

    rule: str
    runs: Counter[str] = field(default_factory=Counter)
    exact: int = 0
    derivatives: int = 0
    special: int = 0
    edges: int = 0
    error_ratio: dict[str, float] = field(default_factory=dict)


def prove(rule: Rule, *, seed: int = 0, trials: int = 1) -> Proof:
    """Tries a rule on its cases, as the module describes.

    Args:
        rule: the rule.
        seed: seed of every random choice.
        trials: how often each case is drawn in each dtype.

    Returns:
        What was tried.

    Raises:
        ProofError: at the first promise the rule breaks, or if none of its cases fires in any dtype.
    """
    proof = Proof(rule.name)
    for trial in range(trials):
        where = f"prove(rule, seed={seed}, trials={trial + 1})"
        for dtype in DTYPES:
            with jax.enable_x64(dtype == "float64"):
                for case in draw(rule, Sampler([seed, trial], dtype), where):
                    _try(case, proof)
        with jax.enable_x64(True):
            for case in draw(rule, Sampler([seed, trial], "float64", whole=True), f"{where}, whole numbers"):
                if case.fired and rule.tier != "lossy":
                    proof.exact += checks.same_over_integers(case)
            for edge in range(_EDGE_TRIALS):
                for case in draw(rule, Sampler([seed, trial, edge], "float64", edge=True), f"{where}, edge {edge}"):
                    _try_edge(case, proof)
    if not proof.runs:
        raise ProofError(f"rule {rule.name!r}: none of its cases supports any of {', '.join(DTYPES)}")
    return proof


def prove_all(rules: Iterable[Rule], *, seed: int = 0, trials: int = 1) -> list[Proof]:
    """:func:`prove` for each rule.

    Raises:
        ProofError: after all were tried, with the messages of all that failed.
    """
    proofs, failures = [], []
    for rule in rules:
        try:
            proofs.append(prove(rule, seed=seed, trials=trials))
        except ProofError as error:
            failures.append(str(error))
    if failures:
        raise ProofError("\n\n".join(failures))
    return proofs


def _try(case: Case, proof: Proof) -> None:
    dtype = case.sampler.dtype
    floating = _jax.is_inexact(dtype)
    if not case.fired:
        if floating:
            raise case.fail("the rule does not fire (a case for some dtypes only says s.only(...))")
        return
    proof.runs[dtype.name] += 1
    if not floating:
        checks.same_over_reals(case)
        return
    if dtype == np.float64:
        checks.same_over_reals(case)
        if case.rule.tier != "lossy":
            proof.derivatives += checks.same_derivative(case)
    special, ratio = checks.keeps_its_tier(case)
    proof.special += special
    if ratio is not None:
        proof.error_ratio[dtype.name] = max(proof.error_ratio.get(dtype.name, 0.0), ratio)


def _try_edge(case: Case, proof: Proof) -> None:
    if not case.fired:
        return
    proof.edges += 1
    if case.rule.tier == "bitwise":
        checks.same_bits(case)
    checks.same_over_reals(case)
