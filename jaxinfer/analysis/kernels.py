"""This project's own kernels among the operations of a program."""

from __future__ import annotations

import math

from jaxinfer.graph import Graph, Node
from jaxinfer.native import KERNELS


def uses_kernels(graph: Graph) -> bool:
    """Whether a program, or one nested in it, calls a kernel that exists on this machine only."""
    return any(node.op in KERNELS or any(map(uses_kernels, node.subgraphs)) for node in graph.nodes)


def kernel_flops(node: Node) -> float:
    """Arithmetic operations of a kernel; a multiply-add counts as two."""
    if node.op == "vector_loop":
        loop = node.params["loop"]
        return float(loop.steps * sum(i.size * (2 * i.depth or 1) for i in loop.step))
    weights = node.inputs[1].aval.shape
    if node.op == "integer_product":
        return 2.0 * math.prod(node.avals[0].shape) * node.inputs[0].shape[1]
    window = weights[1:4] if node.op == "packed_convolution" else weights[:2]
    return 2.0 * math.prod(node.avals[0].shape) * math.prod(window)
