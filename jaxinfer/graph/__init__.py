"""The program as data: tracing, emitting, interpreting and checking graphs."""

from jaxinfer.graph.check import GraphError, check
from jaxinfer.graph.emit import emit, run
from jaxinfer.graph.interpret import Domain, interpret
from jaxinfer.graph.node import Graph, GraphBuilder, Node, Value, is_inline
from jaxinfer.graph.trace import splice, trace, trace_function

__all__ = [
    "Domain",
    "Graph",
    "GraphBuilder",
    "GraphError",
    "Node",
    "Value",
    "check",
    "emit",
    "interpret",
    "is_inline",
    "run",
    "splice",
    "trace",
    "trace_function",
]
