"""One program before and after a rule: drawing it, rewriting it, and saying what is wrong with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, check, run, trace
from jaxinfer.rewriting.engine import Rewriter
from jaxinfer.rewriting.rule import Rule, RuleError
from jaxinfer.rewriting.sampler import Frozen, Sampler, UnsupportedDtype

_LONG = 4000


class ProofError(RuleError):
    """A rule does not keep what it promises; the message holds the program, the inputs and how to repeat the trial."""


@dataclass(frozen=True)
class Case:
    """A program before and after the rule, and the arguments it was drawn with.

    Attributes:
        rule: the rule.
        sampler: what the program was drawn from; its dtype is the one under trial.
        where: which draw this is, for messages.
        before: the program as it was traced.
        after: the same program after the rule.
        fired: how often the rule fired.
        inputs: arrays for the arguments that are not known.
    """

    rule: Rule
    sampler: Sampler
    where: str
    before: Graph
    after: Graph
    fired: int
    inputs: tuple[Any, ...]

    def fail(self, what: str, inputs: Sequence[Any] | None = None) -> ProofError:
        """The error that says what went wrong where, with everything needed to see it again."""
        shown = self.inputs if inputs is None else inputs
        values = "\n".join(f"  {i}: {np.asarray(x).dtype}{np.shape(x)} {np.asarray(x)}" for i, x in enumerate(shown))
        return ProofError(
            f"{_title(self.rule, self.where)}: {what}\n"
            f"before:\n{str(self.before)[:_LONG]}\nafter:\n{str(self.after)[:_LONG]}\ninputs:\n{values[:_LONG]}"
        )


def _title(rule: Rule, where: str) -> str:
    return f"rule {rule.name!r} ({rule.note}; {rule.tier}), {where}"


def draw(rule: Rule, sampler: Sampler, seeds: str) -> Iterator[Case]:
    """The rule's cases in the sampler's dtype, traced and rewritten; to be iterated with x64 on for float64.

    Args:
        rule: the rule.
        sampler: what its cases draw from.
        seeds: how to get the same sampler again, for messages.

    Raises:
        ProofError: if the rule has no cases, a case fails by itself, or the rule cannot be applied to it.
    """
    if rule.cases is None:
        raise ProofError(f"rule {rule.name!r} has no cases: a rule must bring programs to prove it on")
    drawn = iter(rule.cases(sampler))
    for number in itertools.count():
        where = f"case {number}, {sampler.dtype}, {seeds}"
        try:
            function, arguments = next(drawn)
            before, inputs = _trace(function, arguments)
        except (StopIteration, UnsupportedDtype):
            return
        except Exception as error:
            if sampler.edge:  # Not every program makes sense at every size.
                return
            hint = "" if _jax.is_inexact(sampler.dtype) else " (a case that needs floats calls s.floating_only())"
            message = f"{_title(rule, where)}: the case itself fails{hint}: {type(error).__name__}: {error}"
            raise ProofError(message) from error
        yield _rewritten(rule, sampler, where, before, inputs)


def _trace(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Graph, tuple[Any, ...]]:
    leaves, tree = jax.tree.flatten(tuple(arguments))
    known = {i: jnp.asarray(x.array) for i, x in enumerate(leaves) if isinstance(x, Frozen)}
    arrays = [known[i] if i in known else jnp.asarray(x) for i, x in enumerate(leaves)]
    jaxpr = _jax.make_jaxpr(
        lambda *xs: jax.tree.leaves(function(*jax.tree.unflatten(tree, xs))), [_jax.aval_of(x) for x in arrays]
    )
    return trace(jaxpr, known), tuple(x for i, x in enumerate(arrays) if i not in known)


def _rewritten(rule: Rule, sampler: Sampler, where: str, before: Graph, inputs: tuple[Any, ...]) -> Case:
    rewriter = Rewriter([rule])
    try:
        if rule.kind == "replace":
            after = rewriter.fixpoint(before)
        else:
            after = rewriter.apply(before, {node: forms[0] for node, forms in rewriter.offers(before).items()})
        check(after)
        jax.eval_shape(lambda *xs: run(after, {}, *xs), *inputs)
    except Exception as error:
        message = f"{_title(rule, where)}: applying the rule fails: {type(error).__name__}: {error}"
        raise ProofError(f"{message}\nbefore:\n{str(before)[:_LONG]}") from error
    return Case(rule, sampler, where, before, after, rewriter.log.fired[rule.name], inputs)
