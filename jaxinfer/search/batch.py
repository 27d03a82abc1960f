"""Programs mapped over parts of their batch, offered beside the whole-batch program."""

from __future__ import annotations

from collections.abc import Callable

from jaxinfer.analysis.batch import batch_axes
from jaxinfer.analysis.cost import cost, flops, nbytes
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.graph import Graph, Node
from jaxinfer.rewriting.rebatch import map_batch

# Below this much work for each example a loop over examples costs more than it can win.
_LEAST_FLOPS = 5e7
# Memory that a program needs at once, in bytes, from which on it no longer stays in the caches of a processor.
_LARGE = 16 << 20
_LEAST_EXAMPLES = 4
_STEPS = (1, 2)


def batch_variants(original: Graph, improve_one: Callable[[Graph], Graph]) -> list[tuple[str, Graph]]:
    """Other forms of a program with many examples: loops over parts of the batch.

    A part that stays in the caches can be faster than the whole batch, whose intermediate values go through memory; it
    must be measured which one is. Examples are computed by other products than before, so results differ by rounding.

    Args:
        original: the program as written, with its examples along axis 0 of every input.
        improve_one: optimizes the program of a part.

    Returns:
        Name and graph of each form, with the inputs and outputs of the original; none where examples meet or a loop
        cannot pay.
    """
    found = batch_axes(original)
    if found is None or found.size < _LEAST_EXAMPLES or not _is_worth_it(original, found.size):
        return []
    graphs = {f"mapped by {step}": map_batch(original, step, improve_one) for step in _STEPS}
    return [(name, graph) for name, graph in graphs.items() if graph is not None]


def _is_worth_it(graph: Graph, examples: int) -> bool:
    work = cost(graph).flops
    if work < _LEAST_FLOPS * examples:
        return False
    convolutions = sum(flops(node) for node in graph.walk() if node.op == "conv_general_dilated")
    return 2 * convolutions > work or live_bytes(graph) > _LARGE


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
