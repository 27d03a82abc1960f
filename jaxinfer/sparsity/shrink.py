"""``autoinfer.shrink``: masked slices leave the arrays, and the program is replayed on what is left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph
from jaxinfer.sparsity.groups import leaf_name
from jaxinfer.sparsity.masks import mask_leaves
from jaxinfer.sparsity.plan import Parameter, decide, uses, whole_parameter, with_slices
from jaxinfer.sparsity.replay import Replay, replay
from jaxinfer.sparsity.retrace import Program, ShrinkError, Static, is_data, split
from jaxinfer.sparsity.shrink_report import ShrinkReport, leaf_report
from jaxinfer.sparsity.slices import NONE, Undefined, whole

_ROUNDS = 8


class ShrinkWarning(UserWarning):
    """Less could be taken away than the masks allow."""


class Shrunk:
    """A program without the slices that masks removed; called like the whole one, with the small parameters.

    It is traced anew for each kind of arguments, so it takes any batch size the whole program takes.

    Attributes:
        masks: the masks of the small parameters, None where all is kept: what is masked but could not go.
        report: what went and what stayed.
    """

    def __init__(self, program: Program, parameters: Sequence[Parameter], masks: Any, report: ShrinkReport):
        self._program = program
        self._parameters = tuple(parameters)
        self._jit = jax.jit(self._run, static_argnums=1)
        self.masks = masks
        self.report = report
        functools.update_wrapper(self, program.fun, updated=())

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        arrays, static = split((params, args, kwargs))
        self._check(params)
        try:
            return self._jit(arrays, static)
        except Undefined as error:
            raise ShrinkError(
                f"for arguments of these shapes the program needs {error}, which was left out as nothing depended on it "
                "in the call it was shrunk for: shrink it with such arguments"
            ) from error

    def explain(self) -> str:
        """What went, what stayed and why, as a table."""
        return str(self.report)

    def _check(self, params: Any) -> None:
        leaves = [x for x in jax.tree.leaves(params) if is_data(x)]
        if len(leaves) != len(self._parameters):
            raise ValueError(f"expected {len(self._parameters)} arrays of parameters, got {len(leaves)}")
        for p, x in zip(self._parameters, leaves):
            if tuple(np.shape(x)) != p.small:
                whole = ": these are the parameters of the whole program" if tuple(np.shape(x)) == p.shape else ""
                raise ValueError(f"{p.name} has shape {tuple(np.shape(x))}, expected {p.small}{whole}")

    def _run(self, arrays: Sequence[Any], static: Static) -> Any:
        graph, tree = self._program.trace(arrays, static, keep_custom=True)
        return jax.tree.unflatten(tree, _replayed(graph, Replay(), self._parameters, arrays))


def _replayed(graph: Graph, domain: Replay, parameters: Sequence[Parameter], arrays: Sequence[Any]) -> list[Any]:
    count = len(parameters)
    values = [p.value(jnp.asarray(x), i) for i, (p, x) in enumerate(zip(parameters, arrays))]
    others = [whole(jnp.asarray(x)) if _is_plain(n.aval) else x for x, n in zip(arrays[count:], graph.inputs[count:])]
    return replay(graph, domain, [*values, *others])


def _is_plain(aval: Any) -> bool:
    return isinstance(getattr(aval, "dtype", None), np.dtype)


@dataclass
class _Plan:
    """Slices that go, found so that no parameter is put together again where it is read."""

    parameters: list[Parameter]
    domain: Replay
    remarks: list[str]


class _Planner:
    """Finds which slices go.

    Args:
        program: the whole program.
        arrays: a call's arguments, parameters first.
        static: the rest of the call.
        names: of the parameters.
        masks: of the parameters.
    """

    def __init__(
        self,
        program: Program,
        arrays: Sequence[Any],
        static: Static,
        names: Sequence[str],
        masks: Sequence[np.ndarray | None],
    ):
        self.count = len(masks)
        self.masks = masks
        self.values = [_masked(x, m) for x, m in zip(arrays, masks)]
        self.whole = [whole_parameter(n, x, m) for n, x, m in zip(names, self.values, masks)]
        self.avals = [_jax.abstract(x) for x in arrays]
        graph, self.tree = program.trace(arrays, static, keep_custom=False)
        self.uses = uses(graph, masks)
        self.graph, _ = program.trace(arrays, static, keep_custom=True)

    def plan(self, stays: Sequence[Sequence[np.ndarray]] | None = None) -> _Plan:
        """The slices that go, of which some are to stay in any case."""
        kept = [[NONE] * len(p.shape) for p in self.whole] if stays is None else [list(s) for s in stays]
        remarks: list[str] = []
        only_masked = False
        for _ in range(_ROUNDS):
            parameters = [
                decide(p, v, m, now, before, stays=k, only_masked=only_masked)
                for p, v, m, now, before, k in zip(
                    self.whole, self.values, self.masks, self.uses.now, self.uses.before, kept
                )
            ]
            domain = Replay()
            try:
                self._walk(domain, parameters)
            except Undefined as error:
                if only_masked:
                    raise
                remarks.append(f"slices that seemed unused stay, as {error} are needed")
                only_masked = True
                continue
            if not domain.expanded:
                return _Plan(parameters, domain, remarks)
            for (leaf, axis), indices in domain.expanded.items():
                kept[leaf] = list(with_slices(kept[leaf], {axis: indices}))
        return _Plan(parameters, domain, remarks)

    def _walk(self, domain: Replay, parameters: Sequence[Parameter]) -> None:
        def run(*arrays: Any) -> list[Any]:
            return _replayed(self.graph, domain, parameters, arrays)

        small = [jax.ShapeDtypeStruct(p.small, a.dtype) for p, a in zip(parameters, self.avals)]
        jax.eval_shape(run, *small, *map(_jax.to_struct, self.avals[self.count :]))


def _masked(x: Any, mask: np.ndarray | None) -> np.ndarray:
    array = np.asarray(x)
    return array if mask is None else np.where(mask, array, np.zeros((), array.dtype))


def shrink(
    fun: Callable[..., Any],
    params: Any,
    masks: Any,
    *args: Any,
    multiple_of: int = 1,
    verify: bool = True,
    **kwargs: Any,
) -> tuple[Shrunk, Any]:
    """Takes what masks made zero out of the arrays of a program.

    Args:
        fun: a function of a tree of parameters and further arguments.
        params: the parameters; arrays, not tracers.
        masks: a tree like ``params`` of bool arrays of their shapes, True where an entry is kept. None in place of a
            leaf, or of all below it, keeps it whole.
        *args: further arguments of a call, or their types (``jax.ShapeDtypeStruct``).
        multiple_of: round numbers of kept units up to multiples of this.
        verify: compare with the masked program.
        **kwargs: further arguments by name.

    Returns:
        The small program and its parameters, a tree like ``params`` with smaller arrays. ``small(small_params, *args)``
        computes what ``fun`` does of the masked parameters, at any batch size.

    Raises:
        ValueError: if masks do not fit the parameters, or leave nothing that depends on the inputs.
        TypeError: if masks are not bool.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    flags = mask_leaves(params, masks)
    names = [leaf_name(path) for (path, leaf) in leaves if is_data(leaf)]
    flags = [m for (_, leaf), m in zip(leaves, flags) if is_data(leaf)]
    arrays, static = split((params, args, kwargs))
    program = Program(fun, [tuple(np.shape(x)) for x in arrays[: len(flags)]])
    planner = _Planner(program, arrays, static, names, flags)
    plan = planner.plan()
    tree = jax.tree.structure(params)
    del tree
    treedef = jax.tree.structure(params)

    def rebuilt(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(treedef, [next(rest) if is_data(leaf) else leaf for _, leaf in leaves])

    small = rebuilt([jnp.asarray(p.taken(v)) for p, v in zip(plan.parameters, planner.values)])
    left = rebuilt([None if m is None or p.taken(m).all() else p.taken(m) for p, m in zip(plan.parameters, flags)])
    report = ShrinkReport(
        tuple(leaf_report(p, m) for p, m in zip(plan.parameters, flags)),
        {f"{op} ({line})" if line else op: n for (op, line), n in plan.domain.notes.items()},
        sum(p.fill.nbytes for p in plan.parameters if np.any(p.fill)),
        multiple_of,
        None,
        tuple(plan.remarks),
    )
    return Shrunk(program, plan.parameters, left, report), small
