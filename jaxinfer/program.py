"""What runs for one signature of an optimized function, and how it came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import jax

from jaxinfer import _jax
from jaxinfer.graph import Graph, GraphBuilder, Value, emit, is_inline
from jaxinfer.pipeline import Improved
from jaxinfer.search.measure import PairedRatio
from jaxinfer.search.verify import Agreement


@dataclass(frozen=True, eq=False)
class Form:
    """A whole program that could run in the place of the original.

    Attributes:
        name: how reports call it.
        graph: the program.
        options: compiler options it is compiled with.
        holds_weights: whether the weights are written into the compiled program instead of being passed to it. Where
            it is nested in another program they are passed all the same.
    """

    name: str
    graph: Graph
    options: Mapping[str, str] = field(default_factory=dict)
    holds_weights: bool = False

    def holding_weights(self) -> Form:
        """This form with its weights written into the compiled program."""
        return replace(self, name=f"{self.name}, weights written in", holds_weights=True)


@dataclass
class Program:
    """What runs for one signature.

    Attributes:
        name: the user's function.
        jaxpr: the program as written, a closed jaxpr over known and unknown arguments.
        known: the frozen arguments, by position.
        original: the graph of that program.
        improved: what rewriting made of it.
        form: what runs; None for the original.
        reason: why, in one sentence.
        agreement: how the results compared, None where they were not.
        ratio: time of ``form`` (or the best form tried) relative to the original, None where it was not measured.
        verified: ``"now"``, ``"earlier"`` (by another process, on the same weights) or ``"never"``.
        compile_seconds: of the original and the form, where compiled.
        temporary_bytes: memory both need besides arguments and results, where known.
        tried: seconds of every form that was timed, by name.
        released: whether the original weights were let go.
    """

    name: str
    jaxpr: Any
    known: Mapping[int, Any]
    original: Graph
    improved: Improved
    form: Form | None = None
    reason: str = ""
    agreement: Agreement | None = None
    ratio: PairedRatio | None = None
    verified: Literal["now", "earlier", "never"] = "never"
    compile_seconds: dict[str, float] = field(default_factory=dict)
    temporary_bytes: dict[str, int] = field(default_factory=dict)
    tried: dict[str, float] = field(default_factory=dict)
    released: bool = False

    @property
    def optimized(self) -> bool:
        """Whether something else than the original runs."""
        return self.form is not None

    @property
    def graph(self) -> Graph:
        """The graph of the program that runs."""
        return self.original if self.form is None else self.form.graph

    def weights(self, form: Form | None) -> list[Any]:
        """The arrays that :meth:`flat` of the same form takes first."""
        if form is None and not self.known:
            return []
        return [w.value for w in (self.original if form is None else form.graph).weights]

    def flat(self, form: Form | None) -> Callable[..., list[Any]]:
        """``f(weights, *unknown arguments) -> results`` of a form, or of the original."""
        if form is None and not self.known:
            return lambda weights, *operands: _jax.jaxpr_as_fun(self.jaxpr)(*operands)
        return emit(self.original if form is None else form.graph)

    def release_original(self) -> None:
        """Lets go of the original weights; only their types are kept."""
        self.released = True
        self.known = _jax.shapes_of(dict(self.known))
        self.original = _without_values(self.original)


class Runnable(Protocol):
    """A form compiled for the arguments of the first call."""

    compiled: jax.stages.Compiled
    code: _jax.Code | None
    compile_seconds: float
    temporary_bytes: int | None
    peak_bytes: int | None
    weights: list[Any]

    def __call__(self, operands: Sequence[Any], weights: Sequence[Any] | None = None) -> list[Any]:
        """Runs it: flat operands in, flat results out."""


Compile = Callable[[Program, Form | None], Runnable]


def _without_values(graph: Graph) -> Graph:
    """A graph to be looked at only: large constants are types without contents."""
    builder = GraphBuilder()
    builder.inputs = list(graph.inputs)
    moved: dict[Value, Value] = {}

    def now(value: Value) -> Value:
        if value.node.is_const and not is_inline(value.node):
            return builder.const(jax.ShapeDtypeStruct(value.shape, value.dtype), value.aval)
        return moved.get(value, value)

    for node in graph.nodes:
        new = builder.copy(node, [now(v) for v in node.inputs])
        moved.update((Value(node, i), Value(new, i)) for i in range(len(node.avals)))
    return builder.build([now(v) for v in graph.outputs], out_avals=graph.out_avals)
