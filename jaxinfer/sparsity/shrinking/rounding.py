"""Numbers of kept units, rounded up to multiples that hardware likes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxinfer.sparsity.groups import NO_UNIT, Groups
from jaxinfer.sparsity.shrinking.plan import Parameter, with_slices
from jaxinfer.sparsity.shrinking.slices import NONE, Indices


def rounded_up(parameters: Sequence[Parameter], groups: Groups, multiple_of: int) -> list[list[Indices]]:
    """Slices that stay so that each group keeps a multiple of some number of units, or all of them.

    Args:
        parameters: the parameters and what would go of them.
        groups: which slices go together.
        multiple_of: the number.

    Returns:
        For each parameter and axis the slices that are not to go: those of the first removed units of each group.
    """
    numbers = {p.name: i for i, p in enumerate(parameters)}
    stays: list[list[Indices]] = [[NONE] * len(p.shape) for p in parameters]
    for group in groups:
        alive = np.zeros(group.size, bool)
        for member in group.members:
            gone = parameters[numbers[member.name]].removed[member.axis]
            units = np.delete(member.unit_of, gone)
            alive[units[units != NO_UNIT]] = True
        if not alive.any():
            continue
        wanted = min(-(-int(alive.sum()) // multiple_of) * multiple_of, group.size)
        back = np.flatnonzero(~alive)[: wanted - int(alive.sum())]
        for member in group.members:
            number = numbers[member.name]
            indices = np.flatnonzero(np.isin(member.unit_of, back))
            stays[number] = list(with_slices(stays[number], {member.axis: set(indices.tolist())}))
    return stays


def shapes_of(parameters: Sequence[Parameter]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the small parameters."""
    return tuple(p.small for p in parameters)
