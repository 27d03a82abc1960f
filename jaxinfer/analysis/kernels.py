"""This project's own kernels among the operations of a program."""

from __future__ import annotations

from jaxinfer.graph import Graph

# The names that their primitives are registered under, see `jaxinfer.native`.
KERNELS = frozenset({"packed_convolution", "depthwise_convolution"})


def uses_kernels(graph: Graph) -> bool:
    """Whether a program, or one nested in it, calls a kernel that exists on this machine only."""
    return any(node.op in KERNELS or any(map(uses_kernels, node.subgraphs)) for node in graph.nodes)
