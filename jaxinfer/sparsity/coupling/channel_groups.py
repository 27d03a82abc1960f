"""Groups of units, from what the coupling domain found; and the public function that finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import interpret, trace
from jaxinfer.graph.retrace import leaf_name
from jaxinfer.rewriting.fold import fold
from jaxinfer.sparsity.coupling.domain import Coupling, Work
from jaxinfer.sparsity.coupling.elementwise import Axes
from jaxinfer.sparsity.coupling.index_sets import free, given
from jaxinfer.sparsity.groups import NO_UNIT, Group, Groups, Kind, Member, Product, ProductAxis

Place = tuple[int, int]
"""A leaf of the parameters, by position, and an axis of it."""


def channel_groups(fun: Callable[..., Any], params: Any, *args: Any) -> Groups:
    """Finds which slices of a function's parameters can only be removed together.

    Nothing is run. Units are found in any traced function: residual additions, concatenation, convolutions with groups,
    normalization, attention heads, loops and branches, parameters used twice. What has no rule is left whole.

    Args:
        fun: ``fun(params, *args) -> results``.
        params: a pytree; arrays, or ``jax.ShapeDtypeStruct`` in place of them, are its parameters.
        *args: example arguments; arrays or ``jax.ShapeDtypeStruct``. They need not be those that come later: what
            counts is their number of axes and the sizes of those that carry features.

    Returns:
        The groups, with the work of all products. Indices that the function's results or its operations need are in no
        group; ``Groups.locked`` says why.

    Example::

        groups = autoinfer.channel_groups(model.apply, params, x)
        print(groups)
        masks = groups.masks({groups[0].name: np.arange(groups[0].size) < 8})
        small, small_params = autoinfer.shrink(model.apply, params, masks, x)
    """
    leaves, tree = jax.tree.flatten((params, args))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def flat(*arrays: Any) -> list[Any]:
        rest = iter(arrays)
        own, others = jax.tree.unflatten(tree, [next(rest) if a else x for x, a in zip(leaves, is_array)])
        return jax.tree.leaves(fun(own, *others))

    avals = [x if isinstance(x, jax.ShapeDtypeStruct) else _jax.aval_of(x) for x, a in zip(leaves, is_array) if a]
    graph = fold(trace(_jax.make_jaxpr(flat, avals)))
    paths = [path for path, x in jax.tree_util.tree_leaves_with_path(params) if hasattr(x, "shape")]
    domain = Coupling()
    sources = [
        tuple(domain.units.fresh(d) if d > 1 else free(d) for d in aval.shape)
        if i < len(paths)
        else tuple(map(given, aval.shape))
        for i, aval in enumerate(avals)
    ]
    for result in interpret(graph, domain, *sources):
        for vector in result:
            domain.units.lock(vector, "an axis of the results")
    return _Assembly(domain, paths, sources[: len(paths)]).groups(params)


class _Assembly:
    """Groups of the atoms that parameters are left with."""

    def __init__(self, domain: Coupling, paths: Sequence[tuple[Any, ...]], sources: Sequence[Axes]):
        self._units, self._work, self._paths = domain.units, domain.work, paths
        self._locked = domain.units.settle()
        made = {i for what, ids in domain.units.marks if what == "made" for i in ids.tolist()}
        self._made = {
            (leaf_name(paths[leaf]), axis)
            for leaf, axes in enumerate(sources)
            for axis, vector in enumerate(axes)
            if not made.isdisjoint(vector.tolist())
        }
        self._all = {
            (leaf, axis): [self._units.atoms(i) for i in self._units.roots(v).tolist()] if len(v) > 1 else []
            for leaf, axes in enumerate(sources)
            for axis, v in enumerate(axes)
        }
        for row in self._all.values():
            # What is everywhere on an axis would leave nothing of it.
            for atom in set(row[0]).intersection(*row[1:]) if row else ():
                self._locked.setdefault(atom, "all of an axis")
        self._where = self._owned()

    def _owned(self) -> dict[int, dict[Place, list[int]]]:
        """For each atom that can be removed, the indices it owns."""
        found: dict[int, dict[Place, list[int]]] = {}
        for place, row in self._all.items():
            for index, atoms in enumerate(row):
                for atom in atoms:
                    if atom not in self._locked:
                        found.setdefault(atom, {}).setdefault(place, []).append(index)
        return found

    def groups(self, params: Any) -> Groups:
        sorted_ = self._sorted()
        unit_of = {atom: (g, u) for g, atoms in enumerate(sorted_) for u, atom in enumerate(atoms)}
        names: dict[str, None] = {}
        groups = [self._group(atoms, names) for atoms in sorted_]
        products = [self._product(work, unit_of) for work in self._work]
        locked = {
            (leaf_name(self._paths[leaf]), axis): self._locked[row[0][0]]
            for (leaf, axis), row in self._all.items()
            if row and all(atom in self._locked for atoms in row for atom in atoms)
        }
        return Groups(groups, products, params, locked)

    def _sorted(self) -> list[list[int]]:
        """Atoms that own equally many indices of the same axes, and none of them in common, make a group."""
        taken: list[tuple[list[int], set[tuple[Place, int]]]] = []
        order = sorted(self._where.items(), key=lambda item: [(p, i[0], i) for p, i in sorted(item[1].items())])
        buckets: dict[Any, list[tuple[list[int], set[tuple[Place, int]]]]] = {}
        for atom, owned in order:
            key = frozenset((place, len(indices)) for place, indices in owned.items())
            mine = {(place, i) for place, indices in owned.items() for i in indices}
            for atoms, theirs in buckets.setdefault(key, []):
                if not theirs & mine:
                    atoms.append(atom)
                    theirs |= mine
                    break
            else:
                taken.append(([atom], mine))
                buckets[key].append(taken[-1])
        return [atoms for atoms, _ in taken]

    def _group(self, atoms: Sequence[int], names: dict[str, None]) -> Group:
        members = []
        for leaf, axis in sorted(self._where[atoms[0]]):
            unit_of = np.full(len(self._all[leaf, axis]), NO_UNIT)
            for unit, atom in enumerate(atoms):
                unit_of[self._where[atom][leaf, axis]] = unit
            members.append(Member(self._paths[leaf], axis, unit_of))
        # Units are named after the product that makes them, if there is one, rather than those that read them.
        best = next((m for m in members if (leaf_name(m.path), m.axis) in self._made), members[0])
        name = base = f"{best.name}:{best.axis}"
        count = 1
        while name in names:
            count += 1
            name = f"{base} ({count})"
        names[name] = None
        return Group(name, len(atoms), tuple(members), self._kind(atoms))

    def _kind(self, atoms: Sequence[int]) -> Kind:
        for mark, kind in (("head", "head"), ("reads", "input")):
            if self._units.marked(mark).issuperset(atoms):
                return kind  # type: ignore[return-value]
        return "channel"

    def _product(self, work: Work, unit_of: dict[int, tuple[int, int]]) -> Product:
        axes = []
        for vector in work.axes:
            found = [
                [unit_of[atom] for atom in self._units.atoms(i) if atom in unit_of] if i >= 0 else []
                for i in self._units.roots(vector).tolist()
            ]
            depth = max(map(len, found))
            if depth:
                table = np.full((len(found), depth, 2), NO_UNIT)
                for index, units in enumerate(found):
                    table[index, : len(units)] = np.reshape(units, (-1, 2))
                axes.append(ProductAxis(table[..., 0], table[..., 1]))
        return Product(_jax.source_line(work.node.source) or work.node.op, work.macs, tuple(axes))
