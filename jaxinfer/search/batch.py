"""Programs mapped over parts of their batch, offered beside the whole-batch program."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxinfer.analysis.batch import batch_axes, value_axes
from jaxinfer.analysis.cost import cost, flops, nbytes
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting.mapping import Stage, crossing_values, map_stages

# Below this much work for each part a loop over parts costs more than it can win.
_LEAST_FLOPS = 5e7
# Memory that a program needs at once, in bytes, from which on it no longer stays in the caches of a processor.
_LARGE = 16 << 20
# Memory that one operation should find in the cache, in bytes.
_CACHE = 2 << 20
_LEAST_EXAMPLES = 4


def batch_variants(original: Graph, improve_one: Callable[[Graph], Graph]) -> list[tuple[str, Graph]]:
    """Other forms of a program with many examples: loops over parts of the batch.

    A part that stays in the caches can be faster than the whole batch, whose intermediate values go through memory; it
    must be measured which one is. Examples are computed by other products than before, so results differ by rounding.

    Args:
        original: the program as written, with its examples along axis 0 of every input.
        improve_one: optimizes the program of a part.

    Returns:
        Name and graph of each form, the most promising first, with the inputs and outputs of the original; none where
        examples meet or a loop cannot pay.
    """
    found = batch_axes(original)
    if found is None or found.size < _LEAST_EXAMPLES:
        return []
    least = _least_step(original, found.size)
    if least is None:
        return []
    stages = choose_stages(original, found.size, least=least)
    steps = (least,) if len(stages) > 1 else (least, 2 * least)
    forms = {f"mapped by {step}": [Stage(0, step)] for step in steps if found.size % step == 0 and step < found.size}
    if len(stages) > 1:
        name = "mapped in stages of " + ", ".join(str(stage.step) for stage in stages)
        forms = {name: stages, **forms}
    graphs = {name: map_stages(original, form, improve_one) for name, form in forms.items()}
    return [(name, graph) for name, graph in graphs.items() if graph is not None]


def choose_stages(graph: Graph, examples: int, budget: int = _CACHE, least: int = 1) -> list[Stage]:
    """Stages whose parts hold as many examples as stay in the cache.

    Networks for images start with few large features and end with many small ones: single images first, where a batch
    would not stay in the cache; the whole batch last, where one image leaves the matrix units idle.

    Args:
        graph: a batch-parallel program.
        examples: number of examples.
        budget: bytes that operand and result of a product may take for one part.
        least: the fewest examples of a part.
    """
    found = batch_axes(graph)
    assert found is not None
    axes = value_axes(graph, found)
    products = [i for i, node in enumerate(graph.nodes) if node.op in PRODUCTS and Value(node, 0) in axes]
    steps = [d for d in range(1, examples + 1) if examples % d == 0]
    stages: list[Stage] = []
    largest = 0
    for i, position in reversed(list(enumerate(products))):
        node = graph.nodes[position]
        batched = [v for v in (*node.inputs, Value(node, 0)) if v in axes]
        largest = max([largest, *(nbytes(v.aval) for v in batched)])
        step = max([least, *(d for d in steps if d * largest <= budget * examples)])
        if not stages or step < stages[0].step:
            stages.insert(0, Stage(0, step))
        # Between this product and the one before, where the fewest bytes cross, as late as possible: what follows
        # a product (its bias, scale and activation) is computed with it.
        before = products[i - 1] + 1 if i else 0
        stages[0] = Stage(min(range(position, before - 1, -1), key=lambda p: _bytes_crossing(graph, axes, p)), step)
    stages[0] = Stage(0, stages[0].step)
    return stages


def _bytes_crossing(graph: Graph, axes: Mapping[Value, int], position: int) -> int:
    return sum(nbytes(v.aval) for v in crossing_values(graph, axes, position))


def _least_step(graph: Graph, examples: int) -> int | None:
    """The fewest examples worth a step of a loop; None where none pays."""
    work = cost(graph).flops
    convolutions = sum(flops(node) for node in graph.walk() if node.op == "conv_general_dilated")
    if 2 * convolutions <= work and live_bytes(graph) <= _LARGE:
        return None
    steps = (d for d in range(1, examples) if examples % d == 0 and d * work >= _LEAST_FLOPS * examples)
    return next(steps, None)


def live_bytes(graph: Graph) -> int:
    """Bytes of the largest set of products alive at once: memory that no fusion spares."""
    last: dict[Node, int] = {}
    for position, node in enumerate(graph.nodes):
        last.update((v.node, position) for v in node.inputs)
    ends: dict[int, int] = {}
    live = most = 0
    for position, node in enumerate(graph.nodes):
        if node.op in PRODUCTS and node not in graph.known:
            size = sum(map(nbytes, node.avals))
            live += size
            end = last.get(node, len(graph.nodes))
            ends[end] = ends.get(end, 0) + size
        most = max(most, live)
        live -= ends.pop(position, 0)
    return most
