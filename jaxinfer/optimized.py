"""Optimized functions: what :func:`jaxinfer.optimize.optimize` returns, and what freezing arguments makes of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.arguments import Options, Static, needs_packing, pack, packed, unpacked
from jaxinfer.call import optimized_call
from jaxinfer.compiled import CompiledForm, LoadedRun, OtherSignature, compiled_flat, flat_and_weights
from jaxinfer.graph import Graph
from jaxinfer.pipeline import Settings
from jaxinfer.program import Form, Program
from jaxinfer.report.explain import Explanation
from jaxinfer.report.hlo import HloComparison
from jaxinfer.settle import Recalled, settle
from jaxinfer.settled_call import SettledCall
from jaxinfer.summary import explain


class Optimized:
    """A function that is optimized for each signature it is called with. Made by :func:`jaxinfer.optimize.optimize`."""

    def __init__(
        self,
        fun: Callable[..., Any],
        settings: Settings,
        options: Options,
        bound: tuple[tuple[Any, ...], dict[str, Any]] = ((), {}),
    ):
        functools.update_wrapper(self, fun, updated=())
        self.__name__ = getattr(fun, "__name__", type(fun).__name__)
        self._fun, self._settings, self._options, self._bound = fun, settings, options, bound
        self._runs: dict[Any, Callable[..., Any]] = {}
        self._programs: dict[Any, Program] = {}
        self._recalled: dict[Any, Recalled] = {}
        self._out_trees: dict[Any, Any] = {}
        self._traces: dict[Any, tuple[Any, Any]] = {}
        self._hot: Callable[..., Any] | None = None
        self._inner: Optimized | None = None
        self._methods: dict[int, tuple[Any, Optimized]] = {}

    # -- calling --

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hot = self._hot
        if hot is not None and _jax.runs_at_once():
            try:
                return hot(*args, **kwargs)
            except OtherSignature:
                pass
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _jax.jit_disabled():
            bound_args, bound_kwargs = self._bound
            return self._fun(*bound_args, *args, **{**bound_kwargs, **kwargs})
        if self._packs(args, kwargs):
            inner, call = self._inner_call(args, kwargs)
            return unpacked(inner(*call), (self._bound, (args, kwargs)))
        if _jax.under_trace():
            return self._call_in_trace(args, kwargs)
        signature, leaves, tree, static = self._options.signature(args, kwargs)
        if signature not in self._runs:
            self._settle(signature, leaves, tree, static, signature)
        self._hot = run = self._runs[signature]
        return run(*args, **kwargs)

    def _call_in_trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inside someone else's trace nothing is run: the call is bound, and optimized where it is lowered."""
        signature, leaves, tree, static = self._options.signature(args, kwargs)
        jaxpr, out_tree = self._trace(signature, leaves, tree, static)
        known = self._known_leaves()
        if _jax.uses_refs(jaxpr):
            results = _jax.jaxpr_as_fun(jaxpr)(*known, *leaves)
        else:
            results = optimized_call(jaxpr, [*known, *leaves], self._settings)
        return jax.tree.unflatten(out_tree, results)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        held = self._methods.get(id(instance))
        if held is None or held[0] is not instance:
            method = Optimized(self._fun, self._settings, self._options.shifted(-1), ((instance,), {}))
            held = self._methods[id(instance)] = (instance, method)
        return held[1]

    def freeze(self, *args: Any, **kwargs: Any) -> Frozen:
        """Binds leading positional and keyword arguments to known values, like ``functools.partial``.

        What depends on them only is computed once; weights are folded, merged and packed. For a module given to
        ``optimize``, ``freeze()`` without arguments freezes the module itself.

        Args:
            *args: values of the first positional arguments; pytrees of arrays.
            **kwargs: values of keyword arguments.

        Returns:
            The function of the remaining arguments.
        """
        bound_args, bound_kwargs = self._bound
        bound = ((*bound_args, *args), {**bound_kwargs, **kwargs})
        return Frozen(self._fun, self._settings, self._options.shifted(-len(args)), bound)

    # -- looking --

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As ``jax.jit(fun).trace``, of the program that runs."""
        return self._stage("trace", args, kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As ``jax.jit(fun).lower``, of the program that runs."""
        return self._stage("lower", args, kwargs)

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph of the program that runs."""
        return self.program(*args, **kwargs).graph

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What was done to the program for these arguments, why, and what it brought: a table, and data."""
        return explain(self.program(*args, **kwargs), self._settings)

    def compare_hlo(self, *args: Any, **kwargs: Any) -> HloComparison:
        """XLA's optimized HLO of the original and of the rewritten program, compared."""
        if self._packs(args, kwargs):
            inner, call = self._inner_call(args, kwargs)
            return inner.compare_hlo(*call)
        program = self.program(*args, **kwargs)
        _, leaves, _, _ = self._options.signature(args, kwargs)
        rewritten = program.form or Form("rewritten", program.improved.graph)
        before, after = (compiled_flat(program, form, leaves) for form in (None, rewritten))
        return HloComparison.of(before, after, title=program.name)

    def program(self, *args: Any, **kwargs: Any) -> Program:
        """What was settled for these arguments; settles it now if they are new.

        Abstract arguments (``jax.ShapeDtypeStruct``) are rewritten by the analytic model, neither verified nor timed.
        """
        if self._packs(args, kwargs):
            inner, call = self._inner_call(args, kwargs)
            return inner.program(*call)
        return self._program(self._settled(args, kwargs))

    @property
    def bound_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that come with the function: frozen ones, or a module."""
        return self._bound

    def settled_calls(self) -> list[SettledCall]:
        """Every kind of call it has a program for under JAX's present settings, in the order they came.

        Raises:
            TypeError: if such a call takes or returns more than arrays, or changes the state of a module.
        """
        if self._inner is not None:
            bound = [] if self._inner._known_leaves() else pack(self._bound)[0]
            return [call.unpacked(bound, self._options) for call in self._inner.settled_calls()]
        calls: dict[Any, SettledCall] = {}
        for key in [*self._programs, *self._recalled]:
            signature = key.signature if isinstance(key, _Abstract) else key
            if signature[3] != _jax.settings_key() or (signature in calls and key != signature):
                continue
            program = self._program(key)
            weights = self._held_weights(key, program)
            results = self._out_trees[signature]
            calls[signature] = SettledCall.of(program, self._settings, weights, self._options, signature, results)
        return list(calls.values())

    def _held_weights(self, key: Any, program: Program) -> list[Any]:
        """The arrays that a settled program runs with."""
        return program.weights(program.form)

    def _settled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Settles the signature of a call if it is new; where its program is found."""
        signature, leaves, tree, static = self._options.signature(args, kwargs)
        if signature in self._programs or signature in self._recalled:
            return signature
        key = _Abstract(signature) if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves) else signature
        if key not in self._programs:
            self._settle(signature, leaves, tree, static, key)
        return key

    def _stage(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._packs(args, kwargs):
            inner, call = self._inner_call(args, kwargs)
            return inner._stage(method, call, {})
        run = self._runs[self._settled(args, kwargs)]
        run = run.jitted if isinstance(run, LoadedRun) else run
        if isinstance(run, functools.partial):
            return getattr(run.func, method)(*run.args, *args, **kwargs)
        return getattr(run, method)(*args, **kwargs)

    # -- modules and other arguments that are not arrays --

    def _packs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this function's calls go through an inner one that sees arrays only."""
        if self._inner is None:
            data, _ = self._options.split(args, kwargs)
            if not self._binds_arguments() and not needs_packing((self._bound, data)):
                return False
            inner = Optimized(packed(self._fun), self._settings, Options((2,)))
            inner.__name__ = self.__name__
            self._inner = inner
        return True

    def _binds_arguments(self) -> bool:
        """Whether bound values are arguments like any other (a module's arrays) and not known."""
        return self._bound != ((), {})

    def _inner_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Optimized, tuple[Any, ...]]:
        assert self._inner is not None
        bound, bound_static = pack(self._bound)
        arrays, static = pack((args, kwargs))
        return self._inner, (bound, arrays, Static((bound_static, static)))

    # -- one signature --

    def _known_leaves(self) -> list[Any]:
        return []

    def _join(self, known: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Calls the user's function with bound values rebuilt around ``known``."""
        return self._fun(*args, **kwargs)

    def _trace(self, signature: Any, leaves: Sequence[Any], tree: Any, static: Any) -> tuple[Any, Any]:
        """The closed jaxpr over (known leaves, other leaves), and the structure of the results."""
        if signature in self._traces:
            return self._traces[signature]
        known = self._known_leaves()
        structure: list[Any] = []

        def flat(*values: Any) -> list[Any]:
            args, kwargs = Options.join(jax.tree.unflatten(tree, values[len(known) :]), static)
            results, out_tree = jax.tree.flatten(self._join(values[: len(known)], args, kwargs))
            structure[:] = [out_tree]
            return results

        jaxpr = _jax.make_jaxpr(flat, [_jax.abstract(x) for x in (*known, *leaves)])
        if all(_jax.is_concrete(c) for c in _jax.open_jaxpr(jaxpr)[1]):
            self._traces[signature] = (jaxpr, structure[0])
        return jaxpr, structure[0]

    def _settle(self, signature: Any, leaves: Sequence[Any], tree: Any, static: Any, key: Any) -> None:
        jaxpr, out_tree = self._trace(signature, leaves, tree, static)
        self._out_trees[signature] = out_tree
        runs: dict[Form | None, Callable[..., Any]] = {}

        def compile_form(program: Program, form: Form | None) -> CompiledForm:
            runs[form] = self._runner(signature, program, form, program.weights(form), donates=False)
            return CompiledForm(runs[form], leaves, tree, static)

        known = dict(enumerate(self._known_leaves()))
        operands = leaves if key == signature else None
        donates = bool(self._options.donate_argnums)
        settled = settle(self.__name__, jaxpr, known, operands, self._settings, compile_form, keep=not donates)
        if isinstance(settled, Recalled):
            self._recalled[key] = settled
            call, jit = (jax.tree.unflatten(tree, leaves), static), functools.partial(self._jitted, key)
            self._runs[key] = LoadedRun(settled.run, signature, self._options, call, out_tree, jit)
            return
        self._programs[key] = settled
        run = None if donates else runs.get(settled.form)
        self._runs[key] = run or self._runner(signature, settled, settled.form, settled.weights(settled.form))

    def _program(self, key: Any) -> Program:
        """A settled program; the graphs of one that was loaded are made now."""
        recalled = self._recalled.get(key)
        if recalled is not None:
            self._programs[key], same = program, _ = recalled.complete()
            self._recalled.pop(key, None)
            if not same:
                self._hot, self._runs[key] = (
                    None,
                    self._runner(key, program, program.form, program.weights(program.form)),
                )
        return self._programs[key]

    def _jitted(self, key: Any) -> Callable[..., Any]:
        """The run of a program that was loaded, compiled by this process."""
        program = self._program(key)
        return self._runner(key, program, program.form, program.weights(program.form))

    def _runner(
        self, signature: Any, program: Program, form: Form | None, weights: list[Any], donates: bool = True
    ) -> Callable[..., Any]:
        """A form of a program as a jitted function that refuses arguments of any other kind."""
        out_tree, options = self._out_trees[signature], self._options
        flat, weights = flat_and_weights(program, form, weights)

        def entry(weights: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            other, operands, _, _ = options.signature(args, kwargs)
            if other != signature:
                raise OtherSignature
            return jax.tree.unflatten(out_tree, flat(weights, *operands))

        compiler = form.options if form else {}
        if not weights:
            named = functools.wraps(self._fun, updated=())(lambda *args, **kwargs: entry([], args, kwargs))
            return options.jit(named, compiler, donates)
        named = functools.wraps(self._fun, updated=())(lambda weights, *args, **kwargs: entry(weights, args, kwargs))
        return functools.partial(options.shifted(1).jit(named, compiler, donates), weights)


@dataclasses.dataclass(frozen=True)
class _Abstract:
    """The key of a program settled for types without values; calls with values settle anew."""

    signature: Any


class Frozen(Optimized):
    """An optimized function with known arguments. A pytree, whose leaves are its (folded) weights.

    Nested in another jit as an argument, exported or stored, the weights travel as arrays and not as literals.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        # Weights of the settled programs; those of a pytree that was rebuilt differ from the programs' own.
        self._weights: dict[Any, list[Any]] = {}
        self._nested: dict[Any, tuple[Any, Any]] = {}

    def release_original(self) -> None:
        """Lets the original weights go, where folded ones took their place.

        Signatures that were settled keep running; a call with a new one raises :class:`RuntimeError`.
        """
        if self._inner is not None:
            self._inner.release_original()  # type: ignore[attr-defined]
            self._bound = _jax.shapes_of(self._bound)
            return
        self._complete()
        if self._programs and all(p.optimized for p in self._programs.values()):
            for program in self._programs.values():
                program.release_original()
            self._traces.clear()
            self._nested.clear()
            self._bound = _jax.shapes_of(self._bound)

    def _settle(self, signature: Any, leaves: Sequence[Any], tree: Any, static: Any, key: Any) -> None:
        if signature in self._weights:
            program = self._programs[signature]
            self._runs[signature] = self._runner(signature, program, program.form, self._weights[signature])
            return
        super()._settle(signature, leaves, tree, static, key)
        if key == signature and key in self._programs:
            self._hold_weights(key)

    def _hold_weights(self, key: Any) -> None:
        program = self._programs[key]
        if program.optimized:
            self._weights[key] = program.weights(program.form)

    def _held_weights(self, key: Any, program: Program) -> list[Any]:
        return self._weights.get(key) or super()._held_weights(key, program)

    def _program(self, key: Any) -> Program:
        loaded = key in self._recalled
        program = super()._program(key)
        if loaded:
            self._hold_weights(key)
        return program

    def _complete(self) -> None:
        """Makes the graphs of all programs that were loaded."""
        for key in list(self._recalled):
            self._program(key)

    def _binds_arguments(self) -> bool:
        return False

    def _packs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        fresh = self._inner is None
        if not super()._packs(args, kwargs):
            return False
        if fresh:
            assert self._inner is not None
            name, self._inner = self._inner.__name__, self._inner.freeze(pack(self._bound)[0])
            self._inner.__name__ = name
        return True

    def _inner_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Optimized, tuple[Any, ...]]:
        inner, (_, arrays, static) = super()._inner_call(args, kwargs)
        return inner, (arrays, static)

    def _known_leaves(self) -> list[Any]:
        return jax.tree.leaves(self._bound)

    def _join(self, known: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        bound_args, bound_kwargs = jax.tree.unflatten(jax.tree.structure(self._bound), known)
        return self._fun(*bound_args, *args, **{**bound_kwargs, **kwargs})

    def _trace(self, signature: Any, leaves: Sequence[Any], tree: Any, static: Any) -> tuple[Any, Any]:
        if signature not in self._traces and any(isinstance(x, jax.ShapeDtypeStruct) for x in self._known_leaves()):
            raise RuntimeError(
                f"{self.__name__} was called with arguments of a new kind after release_original(): freeze it again, "
                "or call it once with every kind of arguments before releasing"
            )
        return super()._trace(signature, leaves, tree, static)

    def _call_in_trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        signature, leaves, _, _ = self._options.signature(args, kwargs)
        self._complete()
        if signature not in self._weights:
            return super()._call_in_trace(args, kwargs)
        program, weights = self._programs[signature], self._weights[signature]
        folded, original = self._nested_programs(signature, program, leaves)
        mine = program.weights(program.form)
        own = len(weights) == len(mine) and all(a is b for a, b in zip(weights, mine))
        if not own or program.released:
            original = None
            if _jax.has_custom_derivatives(program.jaxpr):
                folded = _jax.without_derivative(folded, self._lost_derivative)
        results = optimized_call(
            folded, [*weights, *leaves], self._settings, derivative=original, folded=len(weights), ready=True
        )
        return jax.tree.unflatten(self._out_trees[signature], results)

    def _nested_programs(self, signature: Any, program: Program, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """The folded program over (weights, operands), and over operands the one as written, for derivatives."""
        if signature not in self._nested:
            weights = program.weights(program.form)
            count, run, known = len(weights), program.flat(program.form), list(program.known.values())
            operands = [_jax.abstract(x) for x in leaves]
            folded = _jax.make_jaxpr(lambda *a: run(a[:count], *a[count:]), [*map(_jax.abstract, weights), *operands])
            original = None
            if not program.released:
                original = _jax.make_jaxpr(lambda *a: _jax.jaxpr_as_fun(program.jaxpr)(*known, *a), operands)
            self._nested[signature] = folded, original
        return self._nested[signature]

    @property
    def _lost_derivative(self) -> str:
        return (
            f"{self.__name__} defines derivatives of its own (custom_jvp or custom_vjp), which its folded weights do "
            "not know: differentiate a frozen function that is closed over instead of passed as an argument, before "
            "release_original(), or differentiate first and freeze then"
        )

    # -- as a pytree --

    def _flatten(self) -> tuple[list[Any], Any]:
        if self._inner is not None:
            leaves, aux = self._inner._flatten()  # type: ignore[attr-defined]
            return leaves, _Structure(self, aux)
        self._complete()
        if self._weights:
            return list(self._weights.values()), _Structure(self, tuple(self._weights))
        return [self._bound], _Structure(self, None)

    @classmethod
    def _unflatten(cls, structure: _Structure, children: Sequence[Any]) -> Frozen:
        template, detail = structure.template, structure.detail
        new = cls(template._fun, template._settings, template._options, template._bound)
        if template._inner is not None:
            new._inner = cls._unflatten(detail, children)
        elif detail is None:
            (new._bound,) = children
        else:
            new._programs, new._traces, new._nested = template._programs, template._traces, template._nested
            new._out_trees = template._out_trees
            new._weights = dict(zip(detail, children))
        return new


class _Structure:
    """What of a frozen function is not weights; equal for the same function with the same settled signatures."""

    def __init__(self, template: Frozen, detail: Any):
        self.template, self.detail = template, detail

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Structure)
            and self.template._programs is other.template._programs
            and self.detail == other.detail
        )

    def __hash__(self) -> int:
        return hash((id(self.template._programs), self.detail))


jax.tree_util.register_pytree_node(Frozen, Frozen._flatten, Frozen._unflatten)
