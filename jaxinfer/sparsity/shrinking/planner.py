"""Finding which slices of parameters go, for one call of a program."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph.retrace import Program, Static, result_names
from jaxinfer.sparsity.shrinking.plan import Parameter, decide, uses, whole_parameter, with_slices
from jaxinfer.sparsity.shrinking.replay import Replay
from jaxinfer.sparsity.shrinking.slices import NONE, Indices, Undefined
from jaxinfer.sparsity.shrinking.small_program import replayed

# Each round keeps some slices that the one before took away; the last one keeps what is left in question.
_ROUNDS = 16
Stays = Sequence[Sequence[Indices]]
"""For each parameter and axis the slices that are not to go."""


@dataclass(frozen=True)
class Plan:
    """Which slices go.

    Attributes:
        parameters: the parameters, and what goes of them.
        rejoined: operations whose operands have to be put together again, and how often.
        remarks: what did not go as the masks allow.
    """

    parameters: tuple[Parameter, ...]
    rejoined: dict[str, int]
    remarks: tuple[str, ...]


class Planner:
    """Finds which slices go.

    Args:
        program: the whole program.
        arrays: a call's arguments, parameters first.
        structure: the rest of the call.
        names: of the parameters.
        masks: of the parameters.

    Attributes:
        values: the masked parameters.
    """

    def __init__(
        self,
        program: Program,
        arrays: Sequence[Any],
        structure: Static,
        names: Sequence[str],
        masks: Sequence[np.ndarray | None],
    ):
        self.masks = masks
        self.values = [masked_value(x, m) for x, m in zip(arrays, masks)]
        self.whole = [whole_parameter(n, x, m) for n, x, m in zip(names, self.values, masks)]
        self._avals = [_jax.abstract(x) for x in arrays]
        inlined, tree = program.trace(arrays, structure, keep_custom=False)
        self._results = result_names(tree)
        self._uses = uses(inlined, masks)
        self._graph, _ = program.trace(arrays, structure, keep_custom=True)

    def check(self) -> None:
        """Checks that something is left.

        Raises:
            ValueError: if the inputs do not reach any result any more.
        """
        reached = [i for i, r in enumerate(self._uses.reached) if r]
        if not reached or any(self._uses.reaches[i] for i in reached):
            return
        empty = [p.name for p, m in zip(self.whole, self.masks) if m is not None and not m.any()]
        where = f"; nothing is left of {', '.join(empty[:6])}{', ...' if len(empty) > 6 else ''}" if empty else ""
        lost = ", ".join(self._results[i] for i in reached[:6])
        raise ValueError(f"the masks cut every path from the inputs to {lost}, which would be constant{where}")

    def plan(self, stays: Stays | None = None, *, only_masked: bool = False) -> Plan:
        """The slices that go.

        Args:
            stays: slices that are not to go.
            only_masked: let only slices go that are masked altogether.
        """
        kept = [[NONE] * len(p.shape) for p in self.whole] if stays is None else [list(s) for s in stays]
        remarks: list[str] = []
        hidden: set[int] = set()
        tried: set[int] = set()
        for attempt in range(_ROUNDS + 1):
            only_masked = only_masked or attempt == _ROUNDS - 1
            parameters = self._decided(kept, hidden, only_masked)
            domain = Replay()
            try:
                self._walk(domain, parameters)
            except Undefined as error:
                if only_masked:
                    raise
                if hidden:
                    hidden.clear()
                    continue
                remarks.append(f"stay although nothing seemed to need them: {error}")
                if error.leaf is not None:
                    leaf, axis = error.leaf
                    kept[leaf] = list(with_slices(kept[leaf], {axis: set(error.indices.tolist())}))
                else:
                    only_masked = True
                continue
            if not domain.expanded or attempt >= _ROUNDS - 1:
                break
            # A slice that is put back wherever it is read had better stay, unless nothing needs what is put there.
            for (leaf, axis), indices in domain.expanded.items():
                if leaf in tried:
                    kept[leaf] = list(with_slices(kept[leaf], {axis: indices}))
            fresh = {leaf for leaf, _ in domain.expanded} - tried
            hidden |= fresh
            tried |= fresh
        rejoined = {f"{op} ({line})" if line else op: n for (op, line), n in domain.notes.items()}
        return Plan(tuple(parameters), rejoined, tuple(remarks))

    def _decided(self, kept: Stays, hidden: Collection[int], only_masked: bool) -> list[Parameter]:
        uses = zip(self._uses.now, self._uses.before)
        return [
            decide(p, v, m, now, before, stays=kept[i], only_masked=only_masked, hide=i in hidden and not only_masked)
            if p.is_plain
            else p
            for i, (p, v, m, (now, before)) in enumerate(zip(self.whole, self.values, self.masks, uses))
        ]

    def _walk(self, domain: Replay, parameters: Sequence[Parameter]) -> None:
        """Replays the program on types alone."""
        small = [jax.ShapeDtypeStruct(p.small, a.dtype) for p, a in zip(parameters, self._avals)]
        others = map(_jax.to_struct, self._avals[len(small) :])
        jax.eval_shape(lambda *arrays: replayed(self._graph, domain, parameters, arrays), *small, *others)


def masked_value(x: Any, mask: np.ndarray | None) -> Any:
    """A parameter with zeros where its mask is False; one that is no plain array (a random key) as it is."""
    if _jax.is_extended(_jax.aval_of(x).dtype):
        return x
    array = np.asarray(x)
    return array if mask is None else np.where(mask, array, np.zeros((), array.dtype))
