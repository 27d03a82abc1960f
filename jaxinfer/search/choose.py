"""Choosing between equivalent forms, site by site.

A site is a match of an ``offer`` rule: the operations it would replace and what it would put there, cut out of the
program together with the elementwise operations that follow (XLA fuses them, and not with every form). Both are timed
as small programs of their own, or estimated; equal sites are timed once and remembered in the cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.cost import nbytes, seconds
from jaxinfer.analysis.kernels import uses_kernels
from jaxinfer.graph import Graph, GraphBuilder, Node, Value, emit, splice
from jaxinfer.native import library
from jaxinfer.rewriting import Replacement, fold
from jaxinfer.search.cache import Store, key
from jaxinfer.search.device import Peaks
from jaxinfer.search.measure import time_candidates

Source = Literal["measured", "cached", "analytic"]

# How much better than the old form a measured or estimated one must be: what is within the noise stays as it was.
_MARGIN = {"measured": 0.95, "cached": 0.95, "analytic": 0.8}
# A form whose estimate is this many times the best one's is not worth compiling.
_HOPELESS = 20.0
_EPILOGUE = 8
# A sample lasts so long that what the form timed before left behind, caches and waking threads, matters little.
_SAMPLE_S = 1e-3
# Where steps of a loop are shared by threads that meet at each of them, whether those are awake decides.
_LOOP_SAMPLE_S = 2e-2
# Weights beyond this many bytes do not stay in a processor's caches from one call to the next.
CACHE_BYTES = 32 << 20
# Weights too small to matter are timed warm, and no more than so many copies of others are kept.
_WARM_BYTES = 1 << 19
_MOST_COPIES = 32
# What XLA fuses with the operation before it, though not with every form of that.
_FUSED = frozenset(
    "add sub mul div max min neg abs exp tanh logistic clamp select_n erf sqrt rsqrt integer_pow pad".split()
)


@dataclass(frozen=True)
class Choice:
    """What was chosen at sites of one kind.

    Attributes:
        site: the operation and its shapes, for people.
        candidates: form name → (measured seconds or None, estimated seconds). ``"original"`` is the old form.
        chosen: name of the form taken.
        source: ``"measured"``, ``"cached"`` or ``"analytic"``.
        sites: how many equal sites were settled by it.
    """

    site: str
    candidates: Mapping[str, tuple[float | None, float]]
    chosen: str
    source: Source
    sites: int = 1


@dataclass
class Policy:
    """How choices are made.

    Attributes:
        platform: platform the program is compiled for.
        peaks: the device's rates, for estimates.
        environment: digest of everything but the program that timings depend on.
        cache: timings made earlier; None to neither read nor write any.
        deadline: ``time.perf_counter()`` value after which nothing more is measured; None never measures.
        cold: whether weights come from memory at each call, as in a program whose weights exceed the caches. Timed by
            itself again and again, a form with larger weights looks better than it is.
    """

    platform: str
    peaks: Peaks
    environment: str = ""
    cache: Store | None = None
    deadline: float | None = None
    cold: bool = False

    @property
    def may_measure(self) -> bool:
        """Whether there is time left to measure."""
        return self.deadline is not None and time.perf_counter() < self.deadline


@dataclass
class _Site:
    nodes: list[Node]
    forms: dict[str, Graph]
    replacements: list[dict[str, Replacement]]
    estimates: dict[str, float] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        return self.estimates["original"] * len(self.nodes)


def choose(
    graph: Graph, offers: Mapping[Node, Sequence[Replacement]], policy: Policy
) -> tuple[dict[Node, Replacement], list[Choice]]:
    """Settles every site.

    Args:
        graph: the program the offers were found in.
        offers: other forms for each node, as ``Rewriter.offers`` lists them.
        policy: how to choose.

    Returns:
        The replacement to apply at each node where another form won, and a record of all choices.
    """
    sites: dict[Any, _Site] = {}
    for owner, node in _owners(graph, offers):
        for replacements in _by_result(owner, offers[node]):
            forms, named = _forms(owner, replacements)
            identity = tuple((name, g.fingerprint or id(g)) for name, g in forms.items())
            site = sites.setdefault(identity, _Site([], forms, []))
            site.nodes.append(node)
            site.replacements.append(named)
    for site in sites.values():
        site.estimates = {n: seconds(g, policy.peaks, policy.platform) for n, g in site.forms.items()}

    best: dict[Node, tuple[float, Replacement]] = {}
    choices = []
    for site in sorted(sites.values(), key=lambda s: -s.weight):
        choice, saved = _settle(site, policy)
        choices.append(choice)
        if choice.chosen == "original":
            continue
        for node, named in zip(site.nodes, site.replacements):
            if node not in best or best[node][0] < saved:
                best[node] = (saved, named[choice.chosen])
    return {node: replacement for node, (_, replacement) in best.items()}, choices


def _by_result(graph: Graph, replacements: Sequence[Replacement]) -> list[list[Replacement]]:
    """Forms that end in the same values answer the same question; others are compared apart.

    A form may take the place of elementwise operations that follow as well: what counts is where those end.
    """
    groups: dict[tuple[Value, ...], list[Replacement]] = {}
    for replacement in replacements:
        tail = _epilogue(graph, replacement.roots)
        end = (Value(tail[-1], 0),) if tail else replacement.roots
        groups.setdefault(end, []).append(replacement)
    return list(groups.values())


def _owners(graph: Graph, offers: Mapping[Node, Any]) -> list[tuple[Graph, Node]]:
    found = []
    for node in graph.nodes:
        if node in offers:
            found.append((graph, node))
        for sub in node.subgraphs:
            found.extend(_owners(sub, offers))
    return found


# -- settling one site ------------------------------------------------------------------------------------------------


def _settle(site: _Site, policy: Policy) -> tuple[Choice, float]:
    """What to take at a site, and the seconds that saves."""
    measured, source = _times(site, policy)
    if measured:
        best = min(measured, key=measured.__getitem__)
        old, new = measured["original"], measured[best]
    else:
        # What a kernel brings depends on the machine: it is taken where it was timed, and nowhere else.
        estimates = {n: s for n, s in site.estimates.items() if not uses_kernels(site.forms[n])}
        estimates.setdefault("original", site.estimates["original"])
        best = min(estimates, key=estimates.__getitem__)
        old, new = estimates["original"], estimates[best]
    chosen = best if new < _MARGIN[source] * old else "original"
    candidates = {n: (measured.get(n), estimate) for n, estimate in site.estimates.items()}
    return Choice(describe(site.nodes[0]), candidates, chosen, source, len(site.nodes)), old - new


def _times(site: _Site, policy: Policy) -> tuple[dict[str, float], Source]:
    """Seconds of each form worth timing, and where they come from."""
    if policy.cache is None or None in (g.fingerprint for g in site.forms.values()):
        return {}, "analytic"
    name = _key(site.forms, policy)
    stored = policy.cache.get(name)
    if _are_timings(stored, site):
        return stored, "cached"
    if not policy.may_measure:
        return {}, "analytic"
    best = min(site.estimates.values())
    hopeful = [n for n, s in site.estimates.items() if n == "original" or s < _HOPELESS * best]
    calls = [_compiled(site.forms[n], policy.cold) for n in hopeful]
    assert policy.deadline is not None
    budget = max(0.05, min(0.6, policy.deadline - time.perf_counter()))
    sample = _LOOP_SAMPLE_S if any(n.op in ("scan", "while") for n in site.nodes) else _SAMPLE_S
    times = dict(zip(hopeful, time_candidates(calls, budget_s=budget, sample_s=sample)))
    policy.cache.put(name, times)
    portable = {n: g for n, g in site.forms.items() if not uses_kernels(g)}
    if len(portable) < len(site.forms):
        policy.cache.put(_key(portable, policy), {n: t for n, t in times.items() if n in portable})
    return times, "measured"


def _key(forms: Mapping[str, Graph], policy: Policy) -> str:
    """The name of timings in the cache. Where kernels are left out it is that of a program to run elsewhere."""
    kernels = library() if any(map(uses_kernels, forms.values())) else None
    fingerprints = sorted((name, g.fingerprint) for name, g in forms.items())
    return key("site", policy.environment, policy.platform, policy.cold, fingerprints, kernels and kernels.digest)


def _are_timings(stored: Any, site: _Site) -> bool:
    return (
        isinstance(stored, dict)
        and "original" in stored
        and set(stored) <= set(site.forms)
        and all(isinstance(t, float) and t > 0 for t in stored.values())
    )


def _compiled(form: Graph, cold: bool) -> Callable[[], Any]:
    """A form as a compiled call on random operands, with weights in turn from several copies where they are cold."""
    rng = np.random.default_rng(0)
    inputs = [_random(rng, n.aval) for n in form.inputs]
    weights = [_random(rng, w.aval) for w in form.weights]
    size = sum(nbytes(w.aval) for w in form.weights)
    copies = min(_MOST_COPIES, -(-2 * CACHE_BYTES // size)) if cold and size > _WARM_BYTES else 1
    turns = itertools.cycle([weights, *([jnp.array(w, copy=True) for w in weights] for _ in range(copies - 1))])
    program = jax.jit(emit(form)).lower(weights, *inputs).compile()
    return lambda: program(next(turns), *inputs)


def _random(rng: np.random.Generator, aval: Any) -> Any:
    """An array of a type: small positive values, valid as indices and harmless in any function."""
    if _jax.is_extended(aval.dtype):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        return jnp.asarray(rng.uniform(0.1, 1.0, aval.shape), aval.dtype)
    return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)


# -- cutting sites out ------------------------------------------------------------------------------------------------


def _forms(graph: Graph, replacements: Sequence[Replacement]) -> tuple[dict[str, Graph], dict[str, Replacement]]:
    """Old and new forms as small programs over the same inputs, by name."""
    named = {r.rule.name: r for r in replacements}
    arguments = list(dict.fromkeys(a for r in named.values() for a in r.arguments))
    tails = {name: _epilogue(graph, r.roots) for name, r in named.items()}
    # The form that takes the place of the fewest operations has the most left after it.
    first = max(named, key=lambda name: len(tails[name]))
    forms = {"original": _program(graph, arguments, named[first].roots, tails[first], None)}
    for name, replacement in named.items():
        forms[name] = _program(graph, arguments, replacement.roots, tails[name], replacement)
    return forms, named


def _epilogue(graph: Graph, roots: Sequence[Value]) -> list[Node]:
    """The elementwise operations that follow a single root and nothing else uses."""
    tail: list[Node] = []
    if len(roots) != 1:
        return tail
    value = roots[0]
    while len(tail) < _EPILOGUE:
        uses = graph.uses.get(value, ())
        if len(uses) != 1 or uses[0][0] is None or uses[0][0].op not in _FUSED:
            return tail
        tail.append(uses[0][0])
        value = Value(uses[0][0], 0)
    return tail


def _program(
    graph: Graph,
    arguments: Sequence[Value],
    roots: Sequence[Value],
    tail: Sequence[Node],
    replacement: Replacement | None,
) -> Graph:
    builder = GraphBuilder()
    env: dict[Value, Value] = {}

    def enter(value: Value) -> Value:
        if value not in env:
            env[value] = builder.const(*_stand_in(value)) if graph.is_known(value) else builder.input(value.aval)
        return env[value]

    for argument in arguments:
        enter(argument)
    if replacement is None:
        for node in _cone(roots, set(arguments)):
            new = builder.copy(node, [enter(v) for v in node.inputs])
            env.update((Value(node, i), Value(new, i)) for i in range(len(node.avals)))
    else:
        jaxpr, consts = _jax.open_jaxpr(replacement.jaxpr)
        values = splice(builder, jaxpr, consts, [env[a] for a in replacement.arguments], known_inside=True)
        env.update(zip(replacement.roots, values))
    outputs = list(roots)
    for node in tail:
        new = builder.copy(node, [enter(v) for v in node.inputs])
        outputs = [Value(node, 0)]
        env[outputs[0]] = Value(new, 0)
    return fold(builder.build([env[v] for v in outputs]), _stand_ins)


def _cone(roots: Sequence[Value], stop: set[Value]) -> list[Node]:
    """The nodes between the arguments and the roots, in an order that can be computed."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(v, False) for v in reversed(roots)]
    while stack:
        value, done = stack.pop()
        node = value.node
        if done:
            order.append(node)
        elif value not in stop and node not in seen and node.op not in ("input", "const"):
            seen.add(node)
            stack.append((value, True))
            stack.extend((v, False) for v in reversed(node.inputs))
    return order


def _stand_in(value: Value) -> tuple[Any, Any]:
    """Something in the place of a known array: a literal stays itself, other contents do not matter for time."""
    if value.node.is_const and not value.shape:
        return value.node.value, value.aval
    return _stand_in_array(value.aval), value.aval


def _stand_in_array(aval: Any) -> Any:
    small = int(np.prod(aval.shape)) <= 64 and not _jax.is_extended(aval.dtype)
    return np.ones(aval.shape, aval.dtype) if small else jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _stand_ins(known: Graph) -> list[Any]:
    return [_stand_in_array(v.aval) for v in known.outputs]


def describe(node: Node) -> str:
    """An operation with the shapes of its operands and results, in one line."""
    operands = " * ".join("×".join(map(str, v.shape)) or "scalar" for v in node.inputs)
    return f"{node.op} {operands} → {'×'.join(map(str, node.avals[0].shape)) or 'scalar'}"
