"""From what a user asks for to the units that masks are learned for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxinfer.sparsity.coupling.channel_groups import channel_groups
from jaxinfer.sparsity.groups import Groups
from jaxinfer.sparsity.learning.granularity import NM, Grain, Granularity, as_grain
from jaxinfer.sparsity.learning.leaf_macs import parameter_macs
from jaxinfer.sparsity.learning.leaves import Leaves
from jaxinfer.sparsity.learning.target import Target, TargetError
from jaxinfer.sparsity.learning.unit_vector import GroupUnits, LeafUnits, Units

_KINDS = {"channel": ("channel", "input"), "head": ("head",)}


def divide(
    params: Any,
    granularity: Granularity,
    target: Target | None,
    *,
    prune: Callable[[str, Any], bool] | None = None,
    groups: Groups | None = None,
    fun: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    readable: frozenset[int] | None = None,
) -> Units:
    """The units of a granularity; the function is traced only where what it computes must be known.

    Args:
        params: a pytree; only types count.
        granularity: what is removed at once.
        target: how much is to be left, None with N:M.
        prune: called with the name and type of each parameter, or with the name and the :class:`Group`: whether to
            prune it. By default parameters with two axes or more, and all groups.
        groups: what goes together, for channels and heads; by default as ``fun`` says.
        fun: ``fun(params, *args)``.
        args: an example of its other arguments.
        readable: positions of the only leaves that can be divided; None: of all.

    Raises:
        TargetError: there is no target, or one that cannot be met.
        ValueError: nothing can be pruned, or what goes together is not known.
    """
    grain = as_grain(granularity)
    leaves = Leaves.of(params)
    if grain is None:
        units = _grouped(leaves, str(granularity), prune, groups, fun, params, args)
    else:
        units = _within(leaves, grain, target, prune, fun, params, args, readable)
    if target is not None:
        units.check(target)
    elif not isinstance(grain, NM):
        raise TargetError("say how much is to be left: a target, or the granularity NM(n, m)")
    return units


def _grouped(
    leaves: Leaves,
    granularity: str,
    prune: Callable[[str, Any], bool] | None,
    groups: Groups | None,
    fun: Callable[..., Any] | None,
    params: Any,
    args: Sequence[Any],
) -> Units:
    if groups is None:
        if fun is None:
            raise ValueError(
                f"pruning by {granularity} needs to know what goes together: give groups=, or fun= and args="
            )
        groups = channel_groups(fun, params, *args)
    kinds = _KINDS[granularity]
    return GroupUnits(leaves, groups, [g for g in groups if g.kind in kinds and (prune is None or prune(g.name, g))])


def _within(
    leaves: Leaves,
    grain: Grain,
    target: Target | None,
    prune: Callable[[str, Any], bool] | None,
    fun: Callable[..., Any] | None,
    params: Any,
    args: Sequence[Any],
    readable: frozenset[int] | None,
) -> Units:
    macs: tuple[Mapping[int, float], float] | None = None
    if target is not None and target.measure == "flops" and fun is not None:
        macs = parameter_macs(fun, params, *args)
    return LeafUnits(leaves, grain, leaves.choose(prune, readable), macs)
