"""A user's function as a graph over what is differentiated, and derivatives of it as programs that are simplified."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.graph import Graph, emit, run, trace, trace_function
from jaxinfer.rewrites import DERIVATIVE_RULES, FINAL_DERIVATIVE_RULES
from jaxinfer.rewriting import Rewriter, load_rules, within

# A derivative may be differentiated again, and what does not change a value may still stop a derivative.
_PRIMAL_ONLY = frozenset({"drop-stop-gradient"})

# Whether a function is being traced to be differentiated here: derivatives within it are then no final programs.
_differentiated = ContextVar("differentiated", default=False)


@dataclass
class Derivation:
    """How a derivative came about.

    Attributes:
        original: the function's program.
        graph: the derivative's program.
        borrowed: operations whose derivative was left to JAX's own rule, and how many of each.
        fired: rewriting rules that simplified the derivative, and how often each.
    """

    original: Graph
    graph: Graph
    borrowed: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)


class Traced:
    """A call of a function as a program over the leaves of some arguments.

    Other arguments are used as they are, as JAX's own derivatives do: they need not be arrays.

    Args:
        fun: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        argnums: positions of the arguments that become inputs.
        has_aux: whether the function returns a pair, of which the second part is passed on.

    Attributes:
        graph: (captured tracers, leaves) → (leaves of the result, arrays of the auxiliary part).
        operands: values of the graph's inputs.
        captured: how many of them are captured tracers.
        in_tree: structure of the tuple of chosen arguments.
        out_tree: structure of the result.
        outputs: how many leaves the result has.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        argnums: Sequence[int],
        has_aux: bool,
    ):
        self.in_tree: Any
        self.out_tree: Any
        leaves, self.in_tree = jax.tree.flatten(tuple(args[i] for i in argnums))

        def flat(*values: Any) -> list[Any]:
            full = list(args)
            for i, arg in zip(argnums, jax.tree.unflatten(self.in_tree, values)):
                full[i] = arg
            result = fun(*full, **kwargs)
            if has_aux:
                if not isinstance(result, (tuple, list)) or len(result) != 2:
                    raise TypeError(f"with has_aux=True a function returns a pair (result, auxiliary data): {fun}")
                result, aux = result
                aux_leaves, self._aux_tree = jax.tree.flatten(aux)
            else:
                aux_leaves = []
            outs, self.out_tree = jax.tree.flatten(result)
            self.outputs = len(outs)
            self._aux = [None if _is_array(x) else (x,) for x in aux_leaves]
            return [*outs, *(x for x in aux_leaves if _is_array(x))]

        outer = _differentiated.set(True)
        try:
            closed = _jax.make_jaxpr(flat, [_jax.aval_of(x) for x in leaves])
        finally:
            _differentiated.reset(outer)
        plain, consts = _jax.without_constvars(closed)
        known = {i: c for i, c in enumerate(consts) if _jax.is_concrete(c)}
        tracers = [c for i, c in enumerate(consts) if i not in known]
        self.graph = trace(_jax.close_jaxpr(plain), known, keep_custom=True)
        self.operands = [*tracers, *leaves]
        self.captured = len(tracers)

    @property
    def active(self) -> list[bool]:
        """Which inputs are differentiated: the leaves, where they have derivatives."""
        return [i >= self.captured and _jax.has_tangent(n.aval) for i, n in enumerate(self.graph.inputs)]

    @property
    def useful(self) -> list[bool]:
        """Which outputs may get a cotangent: the result, not the auxiliary part."""
        return [i < self.outputs for i in range(len(self.graph.outputs))]

    def unflatten(self, values: Sequence[Any]) -> Any:
        """The result from its leaves."""
        return jax.tree.unflatten(self.out_tree, values)

    def aux(self, arrays: Sequence[Any]) -> Any:
        """The auxiliary part from its arrays."""
        rest = iter(arrays)
        return jax.tree.unflatten(self._aux_tree, [next(rest) if x is None else x[0] for x in self._aux])

    def derive(self, build: Callable[..., Sequence[Any]], *extra: Any) -> Derivation:
        """A derivative as a simplified program.

        Args:
            build: ``build(borrowed, *operands, *extra) -> values``, plain JAX code over the graph's inputs.
            *extra: avals of further operands.
        """
        borrowed: Counter[str] = Counter()
        avals = [*(n.aval for n in self.graph.inputs), *extra]
        graph = trace_function(functools.partial(build, borrowed), *avals, keep_custom=True)
        rewriter = Rewriter(_simplifying_rules())
        graph = rewriter.fixpoint(graph)
        fired = Counter(rewriter.log.fired)
        if not _differentiated.get():
            final = Rewriter(within(FINAL_DERIVATIVE_RULES, "reassociate", jax.default_backend()))
            graph = final.fixpoint(graph)
            fired += final.log.fired
        return Derivation(self.graph, graph, borrowed, fired)


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


@functools.cache
def _simplifying_rules() -> tuple[Any, ...]:
    rules = within((*load_rules(), *DERIVATIVE_RULES), "reassociate")
    return tuple(
        r for r in rules if r.kind == "replace" and r.name not in _PRIMAL_ONLY and r not in FINAL_DERIVATIVE_RULES
    )


def execute(graph: Graph, *operands: Any) -> list[Any]:
    """Runs a program: as part of the trace that is going on, else compiled, once for equal programs."""
    if _jax.under_trace() or _jax.jit_disabled() or not all(map(_jax.is_concrete, operands)):
        return run(graph, {}, *operands)
    return _compiled(graph.key, _Held(graph))([w.value for w in graph.weights], *operands)


class _Held:
    """A graph that rides along with its key."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=256)
def _compiled(key: Any, held: _Held) -> Callable[..., list[Any]]:
    return jax.jit(emit(held.graph))
