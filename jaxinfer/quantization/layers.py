"""Parameters that products read, and where their channels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.matrices import Matrix, as_matrix
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.analysis.weights import Move, OnWeights, Weights, bound, run_on
from jaxinfer.graph import Graph, Node
from jaxinfer.quantization.scheme import Format, Group


def product_positions(graph: Graph) -> dict[Node, int]:
    """The products of a program, numbered in the order they are computed; those of loops where the loop stands."""
    found: dict[Node, int] = {}
    for node in graph.walk():
        if node.op in PRODUCTS:
            found.setdefault(node, len(found))
    return found


@dataclass(frozen=True, eq=False)
class Read:
    """A product that reads a parameter.

    Attributes:
        node: the product, of the program at the shapes of the first batch.
        side: which operand is the parameter.
        position: its number in the program.
        place: how the parameter comes there; works on arrays of any dtype.
        move: the same with the casts on its way.
    """

    node: Node
    side: int
    position: int
    place: Move
    move: Move

    @property
    def form(self) -> Matrix:
        """Axes of the operand that are summed over and that are kept."""
        found = matrix_form(self.node, self.side)
        assert found is not None
        return found

    @property
    def groups(self) -> int:
        """Feature groups of a convolution, 1 for other products."""
        return int(self.node.params.get("feature_group_count", 1))


@dataclass(frozen=True, eq=False)
class Layer:
    """A parameter and the products that read it.

    Attributes:
        name: its key path.
        leaf: its position among the arrays of ``params``.
        shape: its shape.
        dtype: its element type.
        reads: the products; all of them have the same channels.
        kept: axes of the parameter along which channels of the result differ.
        summed: the others, from the slowest to the fastest in the order of the sum.
    """

    name: str
    leaf: int
    shape: tuple[int, ...]
    dtype: Any
    reads: tuple[Read, ...]
    kept: tuple[int, ...]
    summed: tuple[int, ...]

    @property
    def node(self) -> Node:
        """The first product that reads it."""
        return self.reads[0].node

    @property
    def position(self) -> int:
        """The number of the first product that reads it."""
        return self.reads[0].position

    def by_group(self, matrix: Any) -> np.ndarray:
        """A matrix [summed, kept] as those of channels that have the same inputs: [groups, summed, kept / groups].

        There is one group but in a convolution in groups.
        """
        return np.stack(np.split(np.asarray(matrix), self.reads[0].groups, 1))

    def axes(self, form: Format) -> tuple[tuple[int, ...], int | None]:
        """The ``axes`` and ``group_axis`` with which :func:`quantize_array` writes it in a format."""
        return _scale_axes(form, self.shape, self.kept, self.summed)

    @cached_property
    def entries(self) -> np.ndarray:
        """int32[summed, kept]: which entry of the flat parameter stands where in the matrix that the product reads."""
        return _entries(self.reads[0], self.shape)

    def matrix(self, array: Any) -> Any:
        """The parameter, or an array of its shape, as a matrix [summed, kept]."""
        return array.reshape(-1)[self.entries]

    def array(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`matrix`."""
        flat = np.empty(int(np.prod(self.shape)), matrix.dtype)
        flat[self.entries] = matrix
        return flat.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Table:
    """A parameter of which rows are looked up and that nothing else reads: an embedding.

    Attributes:
        name: its key path.
        leaf: its position among the arrays of ``params``.
        shape: its shape, rows first.
        node: the first operation that takes rows of it.
    """

    name: str
    leaf: int
    shape: tuple[int, ...]
    node: Node

    @property
    def position(self) -> None:
        """No product reads it."""
        return None

    def axes(self, form: Format) -> tuple[tuple[int, ...], int | None]:
        """As :meth:`Layer.axes`: each row is a channel."""
        return _scale_axes(form, self.shape, (0,), tuple(range(1, len(self.shape))))


def _scale_axes(
    form: Format, shape: tuple[int, ...], kept: tuple[int, ...], summed: tuple[int, ...]
) -> tuple[tuple[int, ...], int | None]:
    if form.per == "tensor" or not form.has_scale:
        return (), None
    if not isinstance(form.per, Group):
        return kept, None
    *others, last = [a for a in summed if shape[a] > 1] or summed
    return tuple(sorted((*kept, *others))), last


@dataclass(frozen=True, eq=False)
class Found:
    """What a program does with its parameters.

    Attributes:
        layers: parameters that products read, in the order they do; rows of them may be looked up as well.
        tables: parameters of which rows are looked up only.
        others: by the position of the leaf, why a parameter of two axes or more is none of them.
        products: how many products there are.
    """

    layers: tuple[Layer, ...]
    tables: tuple[Table, ...]
    others: Mapping[int, str]
    products: int


def find_layers(graph: Graph, names: Sequence[str], arrays: Sequence[Any], others: Sequence[Any]) -> Found:
    """Looks for the products that read parameters.

    Args:
        graph: the program; its first inputs are the parameters.
        names: key paths of the parameters.
        arrays: the parameters; types are enough.
        others: types of the further inputs.
    """
    positions = product_positions(graph)
    domain = _Finding(positions)
    types = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in arrays]

    def run(params: Sequence[Any], rest: Sequence[Any]) -> Any:
        inputs = [Weights.of(i, x) if is_weights(x) else x for i, x in enumerate(params)]
        return run_on(graph, domain, [*inputs, *rest])

    jax.eval_shape(run, types, list(others))
    layers, why = [], {}
    tables = [Table(names[i], i, types[i].shape, n) for i, n in domain.lookups.items() if i not in domain.found]
    for leaf, reads in domain.found.items():
        found = _layer(leaf, names[leaf], types[leaf], reads)
        if isinstance(found, str):
            why[leaf] = found
        else:
            layers.append(found)
    read = {*domain.found, *domain.lookups}
    why.update((i, "no product reads it") for i, x in enumerate(types) if is_weights(x) and i not in read)
    return Found(tuple(sorted(layers, key=lambda x: x.position)), tuple(tables), why, len(positions))


def is_weights(x: Any) -> bool:
    """Whether an array may be the weights of a product: floating-point, with two axes or more."""
    return len(x.shape) > 1 and bool(jnp.issubdtype(x.dtype, jnp.floating)) and 0 not in x.shape


def matrix_form(node: Node, side: int) -> Matrix | None:
    """As :func:`as_matrix`, and of a convolution in groups the axes of each group's matrix."""
    if node.op == "conv_general_dilated" and side == 1 and node.params["batch_group_count"] == 1:
        numbers = node.params["dimension_numbers"].rhs_spec
        return Matrix((*numbers[2:], numbers[1]), (numbers[0],))
    return as_matrix(node, side)


class _Finding(OnWeights):
    """Notes which products read which parameters, and which of them are looked up."""

    def __init__(self, positions: Mapping[Node, int]) -> None:
        super().__init__()
        self.positions = positions
        self.found: dict[int, dict[Node | None, Read | None]] = {}
        self.lookups: dict[int, Node] = {}

    def meets(self, node: Node, side: int) -> bool:
        return matrix_form(node, side) is not None

    def other(self, x: Any) -> Any:
        if isinstance(x, Weights):
            self.found.setdefault(x.leaf, {})[None] = None
        return super().other(x)

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        read = Read(node, side, self.positions[node], weights.place, weights.move)
        self.found.setdefault(weights.leaf, {})[node] = read
        return super().product(node, side, weights, x)

    def lookup(self, node: Node, weights: Weights, *indices: Any) -> Any:
        self.lookups.setdefault(weights.leaf, node)
        return bound(node, [self.array(weights), *indices])


def _layer(leaf: int, name: str, aval: Any, reads: Mapping[Node | None, Read | None]) -> Layer | str:
    """The layer, or why it is none."""
    found = sorted((r for r in reads.values() if r is not None), key=lambda r: r.position)
    if len(found) < len(reads):
        return "something else than a product reads it" + (" as well" if found else "")
    ways = {_axes(read, aval.shape) for read in found}
    if len(ways) > 1:
        return "two products read it along different axes"
    (way,) = ways
    if way is None:
        return "a reshape on its way mixes axes that are summed with those that are kept"
    return Layer(name, leaf, tuple(aval.shape), aval.dtype, tuple(found), *way)


def _entries(read: Read, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    with jax.ensure_compile_time_eval():
        moved = read.place(jnp.arange(count, dtype=jnp.int32).reshape(shape))
        apart = lax.transpose(moved, (*read.form.summed, *read.form.kept))
        rows = int(np.prod(apart.shape[: len(read.form.summed)]))
        return np.asarray(apart.reshape(rows, -1))


def _axes(read: Read, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes of the parameter that are kept and summed, or None where one is both."""
    entries = _entries(read, shape)
    rows, columns = (np.empty(entries.size, np.int32) for _ in range(2))
    rows[entries] = np.arange(entries.shape[0], dtype=np.int32)[:, None]
    columns[entries] = np.arange(entries.shape[1], dtype=np.int32)
    rows, columns = rows.reshape(shape), columns.reshape(shape)
    kept = [a for a in range(len(shape)) if _varies(columns, a)]
    summed = {a: _stride(rows, a) for a in range(len(shape)) if _varies(rows, a)}
    if set(kept) & set(summed):
        return None
    # Axes of size one belong nowhere; they are shared.
    rest = [a for a in range(len(shape)) if a not in kept and a not in summed]
    return tuple(kept), (*rest, *sorted(summed, key=lambda a: -summed[a]))


def _varies(x: np.ndarray, axis: int) -> bool:
    return bool((np.diff(x, axis=axis) != 0).any())


def _stride(x: np.ndarray, axis: int) -> int:
    return int(np.diff(x, axis=axis).ravel()[0])
