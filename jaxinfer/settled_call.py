"""One kind of call of an optimized function, with everything that is needed to run it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.arguments import Options
from jaxinfer.graph import emit
from jaxinfer.pipeline import Settings, improve_or_keep, platform_now
from jaxinfer.program import Program


@dataclass(frozen=True, eq=False)
class PlatformProgram:
    """What runs on one platform: ``flat(weights, *operands) -> results``.

    Attributes:
        flat: the function.
        weights: its weights.
        options: compiler options it is compiled with.
        form: how reports call it.
        holds_weights: whether it is compiled with its weights written in.
    """

    flat: Callable[..., Sequence[Any]]
    weights: Sequence[Any]
    options: Mapping[str, str] = field(default_factory=dict)
    form: str = "as written"
    holds_weights: bool = False


@dataclass(frozen=True, eq=False)
class SettledCall:
    """A kind of call that an optimized function has a program for.

    Attributes:
        program: what was settled.
        settings: how it was optimized.
        weights: the arrays of the form that runs.
        bound: leading operands that come with the function (a module's arrays) and not with a call.
        arguments: structure of ``(args, kwargs)`` without static ones.
        avals: types of the operands that come with a call.
        options: which arguments are static.
        static: the values of those.
        results: structure of the results.
    """

    program: Program
    settings: Settings
    weights: Sequence[Any]
    bound: Sequence[Any]
    arguments: Any
    avals: Sequence[Any]
    options: Options
    static: Any
    results: Any

    @classmethod
    def of(
        cls,
        program: Program,
        settings: Settings,
        weights: Sequence[Any],
        options: Options,
        signature: tuple[Any, ...],
        results: Any,
    ) -> SettledCall:
        """From what an optimized function keeps for a signature."""
        tree, _, static, _ = signature
        open_, _consts = _jax.open_jaxpr(program.jaxpr)
        avals = [v.aval for i, v in enumerate(open_.invars) if i not in program.known]
        return cls(program, settings, weights, [], tree, avals, options, static, results)

    def unpacked(self, bound: Sequence[Any], options: Options) -> SettledCall:
        """The call of the user, where this is that of a function of packed arguments (see `jaxinfer.arguments`).

        Args:
            bound: the arrays of the bound modules, as far as they are leading operands.
            options: which of the user's arguments are static.

        Raises:
            TypeError: if such a call takes or returns more than arrays, or changes the state of a module.
        """
        ((_, packing),) = self.static[0]
        _, structure, changed, _ = jax.tree.unflatten(self.results, [None] * self.results.num_leaves)
        if changed:
            raise TypeError(f"{self.program.name} changes the state of a module at each call: use it in inference mode")
        outer_arguments, arguments = packing.value[1].value
        outer_results, plan = structure.value
        if any(kind != "array" for kind, *_ in (*arguments, *plan)):
            raise TypeError(
                f"{self.program.name} takes or returns something else than arrays: freeze modules and bind the rest "
                "with functools.partial"
            )
        return replace(
            self,
            bound=bound,
            avals=self.avals[len(bound) :],
            arguments=outer_arguments,
            results=outer_results,
            options=options,
            static=(),
        )

    def on(self, platform: str) -> PlatformProgram:
        """What runs on a platform: here, what was settled; elsewhere, what the analytic model prefers there.

        Raises:
            RuntimeError: if that needs original weights that were let go.
        """
        program = self.program
        if platform == platform_now():
            form = program.form
            if form is None:
                return PlatformProgram(program.flat(None), self.weights)
            return PlatformProgram(program.flat(form), self.weights, dict(form.options), form.name, form.holds_weights)
        if program.released:
            raise RuntimeError(
                f"the original weights of {program.name} were let go, and the form for {platform} is made of them: "
                "save before release_original()"
            )
        graph = program.original
        name = "as written"
        if not _jax.uses_refs(program.jaxpr):
            graph, rewritten = improve_or_keep(program.name, graph, self.settings.portable(), platform)
            name = "rewritten" if rewritten else name
        return PlatformProgram(emit(graph), [w.value for w in graph.weights], form=name)
