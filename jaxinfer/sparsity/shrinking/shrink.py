"""``autoinfer.shrink``: slices that masks made zero leave the arrays, and the program goes on without them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph.retrace import Parameters, Program, is_data, merge, split
from jaxinfer.search.measure import time_candidates
from jaxinfer.sparsity.coupling.channel_groups import channel_groups
from jaxinfer.sparsity.errors import ShrinkError
from jaxinfer.sparsity.masks import mask_leaves
from jaxinfer.sparsity.shrinking.planner import Plan, Planner
from jaxinfer.sparsity.shrinking.report import ShrinkReport, leaf_report
from jaxinfer.sparsity.shrinking.rounding import rounded_up, shapes_of
from jaxinfer.sparsity.shrinking.small_program import Shrunk
from jaxinfer.sparsity.shrinking.verify import Difference, difference, drawn

# What "measured" tries, and for how many seconds it times them altogether.
_MULTIPLES = (1, 4, 8, 16, 32)
_BUDGET_S = 10.0
# A larger program has to be faster by this factor.
_GAIN = 0.97


class ShrinkWarning(UserWarning):
    """Less was taken away than the masks allow."""


def shrink(
    fun: Callable[..., Any],
    params: Any,
    masks: Any,
    *args: Any,
    multiple_of: int | Literal["measured"] = 1,
    verify: bool = True,
    **kwargs: Any,
) -> tuple[Shrunk, Any]:
    """Takes what masks made zero out of the arrays of a program.

    A slice of a parameter (a row, a channel, a head) goes when all of it is masked, when what reads it is masked, or
    when masks cut what it is part of off from the inputs. What such a channel still contributes, a bias through an
    activation for one, becomes a constant of the small program. Masks may be any: what cannot go stays, with its zeros.

    Args:
        fun: a function of a tree of parameters and further arguments.
        params: the parameters: arrays, not tracers.
        masks: a tree like ``params`` of bool arrays of their shapes, True where an entry is kept. None in place of a
            leaf, or of everything below it, keeps it whole.
        *args: further arguments of a call, or their types (``jax.ShapeDtypeStruct``). A small batch will do.
        multiple_of: round the numbers of units that groups of channels keep up to multiples of this; ``"measured"``
            times some and takes the fastest.
        verify: compare with the masked program on the given arguments (random ones in place of types): in float64 to
            1e-9 of the largest result, in float32 to 1e-5.
        **kwargs: further arguments by name.

    Returns:
        The small program, and its parameters: a tree like ``params`` with smaller arrays.
        ``small(small_params, *args)`` computes what ``fun`` computes of the masked parameters, at any batch size. Where
        the masked program multiplies a NaN or an infinity by a masked zero, the small program need not be NaN.

    Raises:
        ValueError: if masks do not fit the parameters, or cut all results off from the inputs.
        TypeError: if masks are not bool.
        ShrinkError: if the program uses Refs, or the small program does not agree with the masked one.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from jaxinfer import autoinfer
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]
        >>> params = {"w": jnp.ones((3, 8)), "b": jnp.ones(8), "v": jnp.ones((8, 2))}
        >>> keep = np.arange(8) < 5
        >>> masks = {"w": np.tile(keep, (3, 1)), "b": keep, "v": None}
        >>> small, small_params = autoinfer.shrink(mlp, params, masks, jnp.ones((4, 3)))
        >>> small_params["v"].shape
        (5, 2)
    """
    if multiple_of != "measured" and (not isinstance(multiple_of, int) or multiple_of < 1):
        raise ValueError(f"multiple_of={multiple_of!r}: use a whole number from 1, or 'measured'")
    work = _Work(fun, params, masks, args, kwargs)
    if multiple_of == "measured":
        plan, chosen = work.fastest()
    else:
        plan, chosen = work.rounded(multiple_of), multiple_of
    if not verify:
        return work.result(plan, chosen, None)
    found = work.compare(plan)
    if not found.passed:
        plan = replace(
            work.planner.plan(only_masked=True),
            remarks=(f"only slices that are masked altogether went: without others {found}",),
        )
        warnings.warn(f"{plan.remarks[0]}; the masked program is kept so much", ShrinkWarning, stacklevel=2)
        found, chosen = work.compare(plan), 1
    if not found.passed:
        raise ShrinkError(f"the small program does not agree with the masked one: {found}")
    return work.result(plan, chosen, found.relative)


class _Work:
    """A call of :func:`shrink`."""

    def __init__(self, fun: Callable[..., Any], params: Any, masks: Any, args: Any, kwargs: Any):
        self.given = Parameters(params)
        flags = [m for m, leaf in zip(mask_leaves(params, masks), jax.tree.leaves(params)) if is_data(leaf)]
        self.fun, self.params, self.args, self.kwargs = fun, params, args, kwargs
        self.flags = flags
        self.arrays, self.structure = split((params, args, kwargs))
        self.program = Program(fun, self.given.shapes, ShrinkError)
        self.planner = Planner(self.program, self.arrays, self.structure, self.given.names, flags)
        self.planner.check()

    def rounded(self, multiple_of: int) -> Plan:
        """The slices that go when groups keep multiples of a number of units."""
        plan = self.planner.plan()
        if multiple_of == 1:
            return plan
        call = self.fun if not self.kwargs else lambda p, *xs: self.fun(p, *xs, **self.kwargs)
        groups = channel_groups(call, self.params, *self.args)
        return self.planner.plan(rounded_up(plan.parameters, groups, multiple_of))

    def fastest(self) -> tuple[Plan, int]:
        """The plan that measures fastest, and its multiple."""
        plans: dict[Any, tuple[Plan, int]] = {}
        for multiple in _MULTIPLES:
            plan = self.rounded(multiple)
            plans.setdefault(shapes_of(plan.parameters), (plan, multiple))
        candidates = list(plans.values())
        inputs = self._inputs()
        calls = [self._timed(plan, inputs) for plan, _ in candidates]
        seconds = time_candidates(calls, budget_s=_BUDGET_S)
        best = 0
        for i in range(1, len(candidates)):
            if seconds[i] < _GAIN * seconds[best]:
                best = i
        return candidates[best]

    def _timed(self, plan: Plan, inputs: Sequence[Any]) -> Callable[[], Any]:
        small, small_params = self.result(plan, 1, None)
        arrays, _ = split(small_params)
        _, args, kwargs = merge([*arrays, *inputs], self.structure)
        return lambda: small(small_params, *args, **kwargs)

    def _inputs(self) -> list[Any]:
        return [drawn(x, i) for i, x in enumerate(self.arrays[len(self.flags) :])]

    def compare(self, plan: Plan) -> Difference:
        """How far the small program's results are from the masked program's."""
        small, small_params = self.result(plan, 1, None)
        inputs = self._inputs()

        def masked(arrays: Sequence[Any]) -> Any:
            params, args, kwargs = merge(arrays, self.structure)
            return self.fun(params, *args, **kwargs)

        _, args, kwargs = merge([*self.planner.values, *inputs], self.structure)
        return difference(
            jax.jit(masked), [*map(_array, self.planner.values), *inputs], lambda: small(small_params, *args, **kwargs)
        )

    def result(self, plan: Plan, multiple_of: int, error: float | None) -> tuple[Shrunk, Any]:
        """The small program and its parameters."""
        pairs = list(zip(plan.parameters, self.flags))
        left = [None if m is None or p.taken(m).all() else p.taken(m) for p, m in pairs]
        report = ShrinkReport(
            tuple(leaf_report(p, m) for p, m in pairs),
            plan.rejoined,
            sum(p.constant_bytes for p in plan.parameters),
            multiple_of,
            error,
            plan.remarks,
        )
        taken = [jnp.asarray(p.taken(v)) if p.is_plain else v for p, v in zip(plan.parameters, self.planner.values)]
        kept = self.given.with_arrays(left)
        return Shrunk(self.program, plan.parameters, kept, report), self.given.with_arrays(taken)


def _array(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x
