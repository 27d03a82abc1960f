"""What happens to a program, step by step.

Replace rules run to a fixpoint; offered forms are chosen and put in place, which may open the way for more; in the end
what depends on known values only is folded. Every step is one line of :func:`improve`.
"""

from __future__ import annotations

import functools
import hashlib
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax

from jaxinfer.analysis.cost import nbytes
from jaxinfer.graph import Graph, check
from jaxinfer.native import library
from jaxinfer.rewriting import Rewriter, Rule, RuleError, Tier, evaluate_known, fold, load_rules, within
from jaxinfer.rewriting.fold import Evaluate
from jaxinfer.search.cache import Store, default_cache
from jaxinfer.search.choose import CACHE_BYTES, Choice, Policy, choose
from jaxinfer.search.device import default_peaks, environment_key, peaks

Tune = Literal["off", "auto", "full"]
TUNES = ("off", "auto", "full")
# Seconds that the first call may spend on measuring forms and timing the whole program.
TUNING_SECONDS = {"off": 0.0, "auto": 30.0, "full": 600.0}
_ROUNDS = 4


@dataclass(frozen=True)
class Settings:
    """How to optimize; what ``autoinfer.optimize`` was told.

    Attributes:
        numerics: the weakest tier of rules allowed.
        tune: ``"off"``, ``"auto"``, ``"full"``, or a number of seconds to spend at most.
        verify: compare with the original at the first call.
        rules: the rules to use; None for all registered ones.
    """

    numerics: Tier = "reassociate"
    tune: Tune | float = "auto"
    verify: bool = True
    rules: tuple[Rule, ...] | None = None

    def active_rules(self, platform: str) -> tuple[Rule, ...]:
        """The rules these settings allow on a platform; where nothing is measured kernels are not chosen."""
        rules = registered_rules() if self.rules is None else self.rules
        return within((r for r in rules if self.tune != "off" or not r.native), self.numerics, platform)

    @property
    def seconds(self) -> float:
        """Time that may be spent measuring, in seconds."""
        return TUNING_SECONDS[self.tune] if isinstance(self.tune, str) else float(self.tune)

    def portable(self) -> Settings:
        """The same settings for programs that are to run elsewhere: without this machine's kernels."""
        rules = registered_rules() if self.rules is None else self.rules
        return replace(self, rules=tuple(r for r in rules if not r.native))

    def without(self, names: Iterable[str]) -> Settings:
        """The same settings with some rules left out."""
        left_out = frozenset(names)
        rules = registered_rules() if self.rules is None else self.rules
        return replace(self, rules=tuple(r for r in rules if r.name not in left_out))


@functools.cache
def registered_rules() -> tuple[Rule, ...]:
    """Every rule of this project and of installed packages, loaded once."""
    return load_rules()


class VerificationWarning(UserWarning):
    """A rewritten program failed or gave other results than the original, which is used instead."""


@dataclass
class Improved:
    """A rewritten program and how it came about.

    Attributes:
        graph: the new program.
        fired: times each rule changed the program.
        offered: sites at which each rule offered a form.
        choices: how offered forms were chosen.
        seconds: time spent rewriting, measuring included.
    """

    graph: Graph
    fired: dict[str, int] = field(default_factory=dict)
    offered: dict[str, int] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    lines: dict[str, set[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def applied(self) -> list[str]:
        """Names of the rules that changed the program."""
        return [name for name, count in self.fired.items() if count]


def improve(
    graph: Graph,
    settings: Settings,
    platform: str,
    *,
    measure: bool,
    deadline: float | None = None,
    evaluate: Evaluate = evaluate_known,
    cache: Store | None = None,
) -> Improved:
    """Rewrites a program.

    Args:
        graph: the program.
        settings: how.
        platform: platform it is compiled for: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``.
        measure: whether anything may be run. If not, earlier measurements are used, else the analytic model.
        deadline: ``time.perf_counter()`` value after which nothing is measured any more.
        evaluate: computes folded values; by default on the device.
        cache: where measurements are kept; by default the user's.

    Raises:
        RuleError: if a rule fails, gives a value of the wrong type or the rules never come to an end.
    """
    start = time.perf_counter()
    rewriter = Rewriter(settings.active_rules(platform))
    policy = _policy(settings, rewriter.rules, platform, measure, deadline, cache)
    policy.cold = sum(nbytes(w.aval) for w in graph.weights) > CACHE_BYTES
    done = Improved(graph)

    graph = rewriter.fixpoint(graph)
    for _ in range(_ROUNDS):
        offers = rewriter.offers(graph)
        for replacements in offers.values():
            for r in replacements:
                done.offered[r.rule.name] = done.offered.get(r.rule.name, 0) + 1
        chosen, choices = choose(graph, offers, policy)
        done.choices = _latest(done.choices, choices)
        if not chosen:
            break
        graph = rewriter.fixpoint(rewriter.apply(graph, chosen))
    graph = rewriter.fixpoint(fold(graph, evaluate))
    check(graph)

    done.graph = graph
    done.fired = dict(rewriter.log.fired)
    done.lines = rewriter.log.lines
    done.seconds = time.perf_counter() - start
    return done


def improve_or_keep(name: str, graph: Graph, settings: Settings, platform: str) -> tuple[Graph, bool]:
    """Rewrites a program without measuring anything; where that fails, warns and keeps it as written.

    Args:
        name: name of the user's function, for the message.
        graph: the program.
        settings: how.
        platform: platform it is compiled for.

    Returns:
        The program to compile, and whether it was rewritten.
    """
    try:
        return improve(graph, settings, platform, measure=False).graph, True
    except Exception as error:  # Whatever goes wrong here, the original is at hand
        warnings.warn(f"{name} runs as written on {platform}: {described(error)}", VerificationWarning, stacklevel=2)
        return graph, False


def described(error: Exception) -> str:
    """An error in one line for a warning; a rule's own error says all itself."""
    return str(error) if isinstance(error, RuleError) else f"{type(error).__name__}: {error}"


def _latest(old: list[Choice], new: list[Choice]) -> list[Choice]:
    """Choices of all rounds; sites that were looked at again count once."""
    kept = {(c.site, tuple(c.candidates)): c for c in old}
    for c in new:
        kept.setdefault((c.site, tuple(c.candidates)), c)
    return list(kept.values())


def _policy(
    settings: Settings,
    rules: tuple[Rule, ...],
    platform: str,
    measure: bool,
    deadline: float | None,
    cache: Store | None,
) -> Policy:
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if settings.tune == "off" or kind != jax.default_backend() or jax.process_count() > 1:
        # Deterministic, or for a device that is not here: nothing measured may enter. Several processes must compile
        # the same program, and each would measure something else.
        return Policy(kind, default_peaks(kind))
    cache = default_cache() if cache is None else cache
    return Policy(
        kind,
        peaks(measure=measure, cache=cache),
        environment_key(rules_digest(tuple(r for r in rules if not r.native))),
        cache,
        deadline if measure else None,
    )


@functools.lru_cache(maxsize=64)
def rules_digest(rules: tuple[Rule, ...]) -> str:
    """A digest of a set of rules that changes when the code of one of them does."""
    files = sorted({getattr(getattr(r.after, "__code__", None), "co_filename", "") for r in rules})
    digest = hashlib.blake2b(digest_size=8)
    for rule in rules:
        digest.update(f"{rule.name}|{rule.tier}|{rule.kind}\n".encode())
    if any(r.native for r in rules) and (kernels := library()):
        digest.update(kernels.digest.encode())
    for file in files:
        digest.update(Path(file).read_bytes() if file and Path(file).is_file() else file.encode())
    return digest.hexdigest()


__all__ = [
    "TUNES",
    "TUNING_SECONDS",
    "Choice",
    "Improved",
    "RuleError",
    "Settings",
    "Tune",
    "VerificationWarning",
    "described",
    "improve",
    "improve_or_keep",
    "registered_rules",
    "rules_digest",
]


def platform_now() -> Any:
    """The platform JAX compiles for by default, in the words of its lowering rules."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
