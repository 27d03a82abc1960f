"""What a program costs: operations, bytes, and an estimate of seconds from a device's peak rates.

Counts are of the program as written; loops multiply their body by the trip count where it is known (a ``while`` counts
as one iteration). Elementwise work is assumed to be fused: it reads and writes memory only where its operands or
results cross an operation that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.kernels import KERNELS, kernel_flops
from jaxinfer.graph import Graph, Node, Value

# Operations that move or relabel data and compute nothing.
MOVES = frozenset(
    "broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice gather iota pad reshape "
    "rev select_n slice split squeeze stack tile transpose expand_dims bitcast_convert_type stop_gradient "
    "copy_p real imag device_put optimization_barrier".split()
)
# Operations that XLA's fusions cannot swallow: each reads its operands from memory and writes its results.
_UNFUSED = KERNELS | frozenset(
    "dot_general conv_general_dilated scan while cond sort top_k fft cholesky triangular_solve lu qr eigh svd "
    "custom_linear_solve scatter scatter-add scatter_add gather reduce_window reduce_window_sum reduce_window_max "
    "cumsum cumprod cummax cummin cumlogsumexp ragged_dot_general".split()
)
# Elementwise functions that take many machine operations each.
_TRANSCENDENTAL = frozenset(
    "exp exp2 expm1 log log1p log2 sin cos tan tanh logistic erf erfc erf_inv pow rsqrt sqrt cbrt atan2 asin acos atan "
    "sinh cosh asinh acosh atanh lgamma digamma igamma".split()
)
_TRANSCENDENTAL_OPERATIONS = 10

# The share of the matrix-product peak that XLA reaches on convolutions, by platform: dense, and with groups. XLA:CPU
# has no fast path for groups and runs them as scalar loops.
_CONVOLUTION_SHARE = {"cpu": (0.5, 0.005), "gpu": (0.5, 0.1), "tpu": (0.7, 0.02)}


class Rates(Protocol):
    """Peak rates of a device; :class:`jaxinfer.search.device.Peaks` is one."""

    @property
    def vector(self) -> float: ...
    @property
    def bandwidth(self) -> float: ...
    @property
    def launch_s(self) -> float: ...
    def dot_rate(self, dtype: Any) -> float: ...


@dataclass(frozen=True)
class Cost:
    """Work of a program.

    Attributes:
        flops: arithmetic operations; a multiply-add counts as two.
        nbytes: bytes read and written by operations that are not fused.
    """

    flops: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.nbytes * times)


def size(aval: Any) -> int:
    """Number of elements; symbolic dimensions count as one."""
    return math.prod(d if isinstance(d, int) else 1 for d in getattr(aval, "shape", ()))


def nbytes(aval: Any) -> int:
    """Bytes of an array of this type; JAX's extended dtypes count as nothing."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or _jax.is_extended(dtype):
        return 0
    return size(aval) * np.dtype(dtype).itemsize


def flops(node: Node) -> float:
    """Arithmetic operations of one node, nested graphs not included."""
    if node.op in MOVES or not node.avals:
        return 0.0
    if node.op == "dot_general":
        (contract, _), _ = node.params["dimension_numbers"]
        lhs = node.inputs[0].aval
        return 2.0 * size(node.avals[0]) * math.prod(lhs.shape[d] for d in contract if isinstance(lhs.shape[d], int))
    if node.op == "conv_general_dilated":
        kernel = node.inputs[1].aval
        out_features = kernel.shape[node.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * size(node.avals[0]) * size(kernel) / max(out_features, 1)
    if node.op in KERNELS:
        return kernel_flops(node)
    if node.op in ("cholesky", "triangular_solve", "lu", "qr", "eigh", "svd", "custom_linear_solve"):
        n = node.inputs[0].shape[-1] if node.inputs[0].shape else 1
        return float(size(node.inputs[0].aval)) * (n if isinstance(n, int) else 1)
    work = max((size(a) for a in (*node.avals, *(v.aval for v in node.inputs))), default=0)
    return float(work) * (_TRANSCENDENTAL_OPERATIONS if node.op in _TRANSCENDENTAL else 1)


def trips(node: Node) -> int:
    """How often the graphs in a node run."""
    return node.params["length"] if node.op == "scan" else 1


def cost(graph: Graph) -> Cost:
    """Operations and bytes of a program, nested graphs included."""
    total = Cost()
    for node in graph.nodes:
        nested = [cost(sub) for sub in node.subgraphs]
        if node.op == "cond":
            total += max(nested, key=lambda c: c.flops, default=Cost())
        elif nested:
            total += sum(nested, Cost()) * trips(node)
        else:
            total += Cost(flops(node), _memory(graph, node))
    return total


def seconds(graph: Graph, rates: Rates, platform: str) -> float:
    """An estimate of how long a program takes on a device.

    Args:
        graph: the program.
        rates: the device's peak rates.
        platform: ``"cpu"``, ``"tpu"``, or anything else for a GPU.
    """
    total = 0.0
    for node in graph.nodes:
        nested = [seconds(sub, rates, platform) for sub in node.subgraphs]
        if nested:
            total += (max(nested) if node.op == "cond" else sum(nested)) * trips(node) + rates.launch_s
        else:
            total += _node_seconds(graph, node, rates, platform)
    return total


def _node_seconds(graph: Graph, node: Node, rates: Rates, platform: str) -> float:
    memory = _memory(graph, node) / rates.bandwidth
    work = flops(node)
    if node.op == "dot_general":
        return max(work / rates.dot_rate(node.inputs[0].dtype), memory) + rates.launch_s
    if node.op in KERNELS:
        rate = rates.vector if node.op == "depthwise_convolution" else rates.dot_rate(node.inputs[0].dtype)
        return max(work / rate, memory) + rates.launch_s
    if node.op == "conv_general_dilated":
        kind = platform if platform in _CONVOLUTION_SHARE else "gpu"
        share = _CONVOLUTION_SHARE[kind][node.params["feature_group_count"] > 1]
        return max(work / (share * rates.dot_rate(node.inputs[0].dtype)), memory) + rates.launch_s
    launch = rates.launch_s if node.op in _UNFUSED else 0.0
    return max(work / rates.vector, memory) + launch


def _memory(graph: Graph, node: Node) -> float:
    """Bytes a node moves: all of its operands and results if it is not fused, else what crosses the fusion's edge."""
    if node.op in _UNFUSED:
        return float(_total(v.aval for v in node.inputs) + _total(node.avals))
    read = _total(v.aval for v in node.inputs if _crosses(v))
    written = _total(
        aval
        for i, aval in enumerate(node.avals)
        if any(user is None or user.op in _UNFUSED for user, _ in graph.uses.get(Value(node, i), ()))
    )
    return float(read + written)


def _crosses(value: Value) -> bool:
    return value.node.op in ("input", "const") or value.node.op in _UNFUSED


def _total(avals: Iterable[Any]) -> int:
    return sum(nbytes(a) for a in avals)
