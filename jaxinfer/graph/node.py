"""The program as data: immutable nodes, hash-consed as they are built, and the graphs they form.

A :class:`Graph` lists its nodes in program order, so effects keep their order and an untouched program is emitted as it
was traced. Equal pure nodes are one node by construction; nodes that nothing needs are dropped when a graph is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxinfer import _jax

# Constants up to this many elements are written into the program; larger ones become arguments of what is compiled.
INLINE_ELEMENTS = 64
# Primitives that must run as often as they are written although they declare no effect.
_STATEFUL = frozenset({"rng_uniform"})
_UNIQUE = _STATEFUL | {"optimization_barrier"}


class Value(NamedTuple):
    """One result of a node: what a use refers to."""

    node: Node
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a value for

    @property
    def aval(self) -> Any:
        """Shape, dtype and weak type of the value."""
        return self.node.avals[self.index]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of the value; entries are ints or symbolic dimensions."""
        return self.node.avals[self.index].shape

    @property
    def dtype(self) -> Any:
        """Element type of the value."""
        return self.node.avals[self.index].dtype

    @property
    def op(self) -> str:
        """Operation of the producing node."""
        return self.node.op


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. ``op`` is ``"input"``, ``"const"`` or the name of a JAX primitive.

    Attributes:
        op: operation name, as :func:`jaxinfer._jax.operation` gives it.
        primitive: the JAX primitive to bind, None for inputs and constants.
        params: the primitive's parameters. Control flow holds :class:`Graph` values here in place of jaxprs.
        inputs: the operands.
        avals: abstract values of the results.
        effects: JAX effects; a node with any is a root and never merged.
        context: JAX's equation context (threefry mode, mesh, compute type, metadata), replayed at emission.
        source: JAX's source info: the user's line and name stack.
    """

    op: str
    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Value, ...]
    avals: tuple[Any, ...]
    effects: frozenset[Any] = frozenset()
    context: Any = None
    source: Any = None

    @property
    def aval(self) -> Any:
        """Abstract value of the only result."""
        (aval,) = self.avals
        return aval

    @property
    def is_const(self) -> bool:
        """Whether this is a known array."""
        return self.op == "const"

    @cached_property
    def is_pure(self) -> bool:
        """Whether the node may be merged, moved, dropped or evaluated ahead of time."""
        return not (self.effects or self.op in _UNIQUE or any(g.is_stateful for g in self.subgraphs))

    @property
    def value(self) -> Any:
        """The array of a constant."""
        return self.params["value"]

    @cached_property
    def params_key(self) -> Any:
        """A hashable key of the parameters."""
        return params_key(self.params)

    @cached_property
    def subgraphs(self) -> Sequence[Graph]:
        """The graphs that control flow holds."""
        found: list[Graph] = []
        for param in self.params.values():
            if isinstance(param, Graph):
                found.append(param)
            elif isinstance(param, tuple):
                found.extend(part for part in param if isinstance(part, Graph))
        return found

    def on(self, inputs: tuple[Value, ...]) -> Node:
        """The same operation on other operands."""
        new = object.__new__(Node)
        # With the fields goes what was found out about the parameters.
        new.__dict__.update(self.__dict__, inputs=inputs)
        return new

    def __repr__(self) -> str:
        shapes = ", ".join(a.str_short(True) if hasattr(a, "str_short") else str(a) for a in self.avals)
        return f"{self.op}[{shapes}]"


@dataclass(frozen=True, eq=False)
class Graph:
    """A closed program: inputs, nodes in program order, outputs.

    Attributes:
        inputs: input nodes, one for each argument.
        nodes: operations in program order; constants and inputs are not listed.
        outputs: the results.
        origin: the jaxpr this graph is an untouched copy of, or None once anything was rewritten.
        out_avals: the avals the results must have when emitted (rewriting may change weak types inside).
    """

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    origin: Any = field(default=None, repr=False)
    out_avals: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if not self.out_avals:
            object.__setattr__(self, "out_avals", tuple(v.aval for v in self.outputs))

    @cached_property
    def constants(self) -> tuple[Node, ...]:
        """Every distinct constant node, those of nested graphs included, in order of first use."""
        found: dict[Node, None] = {}
        for node in self.nodes:
            found.update((v.node, None) for v in node.inputs if v.node.is_const)
            for sub in node.subgraphs:
                found.update((c, None) for c in sub.constants)
        found.update((v.node, None) for v in self.outputs if v.node.is_const)
        return tuple(found)

    @cached_property
    def weights(self) -> tuple[Node, ...]:
        """The constants that are passed to the compiled function instead of being written into it."""
        return tuple(c for c in self.constants if not is_inline(c))

    @cached_property
    def uses(self) -> dict[Value, list[tuple[Node | None, int]]]:
        """Where each value is used: (node, operand position), or (None, output position)."""
        uses: dict[Value, list[tuple[Node | None, int]]] = {}
        for node in self.nodes:
            for position, value in enumerate(node.inputs):
                uses.setdefault(value, []).append((node, position))
        for position, value in enumerate(self.outputs):
            uses.setdefault(value, []).append((None, position))
        return uses

    @cached_property
    def known(self) -> frozenset[Node]:
        """The nodes that depend on constants only: they can be computed before the program runs."""
        found: set[Node] = set()
        for node in self.nodes:
            if node.is_pure and all(v.node.is_const or v.node in found for v in node.inputs):
                found.add(node)
        return frozenset(found)

    def is_known(self, value: Value) -> bool:
        """Whether a value depends on constants only."""
        return value.node.is_const or value.node in self.known

    @cached_property
    def size(self) -> int:
        """Number of operations, nested graphs included."""
        return sum(1 + sum(g.size for g in node.subgraphs) for node in self.nodes)

    @cached_property
    def has_effects(self) -> bool:
        """Whether running the program does anything besides computing its results."""
        return any(node.effects for node in self.nodes)

    def count(self, *ops: str) -> int:
        """How many nodes, nested graphs included, have one of the given operations."""
        return sum((node.op in ops) + sum(g.count(*ops) for g in node.subgraphs) for node in self.nodes)

    def walk(self) -> Iterator[Node]:
        """All nodes, those of nested graphs after the node that holds them."""
        for node in self.nodes:
            yield node
            for sub in node.subgraphs:
                yield from sub.walk()

    @cached_property
    def is_stateful(self) -> bool:
        """Whether the program holds an operation that gives something else each time it runs."""
        return any(node.op in _STATEFUL for node in self.walk())

    @cached_property
    def key(self) -> Any:
        """A hashable key: in this process, equal keys mean interchangeable programs."""
        names = {node: i for i, node in enumerate((*self.inputs, *self.nodes))}

        def use(value: Value) -> Any:
            node = value.node
            return _const_key(node.value, node.aval) if node.is_const else (names[node], value.index)

        return (
            "graph",
            tuple(_type_text(n.aval) for n in self.inputs),
            tuple((n.primitive, n.params_key, tuple(map(use, n.inputs)), context_key(n.context)) for n in self.nodes),
            tuple(map(use, self.outputs)),
            tuple(map(_type_text, self.out_avals)),
        )

    @cached_property
    def fingerprint(self) -> str | None:
        """A digest equal for equal programs in any process, or None where a parameter has no stable text."""
        text = _canonical_text(self)
        return None if text is None else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __str__(self) -> str:
        return _canonical_text(self, exact=False) or ""


def is_inline(const: Node) -> bool:
    """Whether a constant is small enough to be written into the program."""
    aval = const.aval
    if _jax.is_ref(aval) or _jax.is_extended(aval.dtype):
        return False
    return int(np.prod(aval.shape)) <= INLINE_ELEMENTS


class GraphBuilder:
    """Builds a graph node by node; asking twice for the same pure node gives the same node."""

    def __init__(self) -> None:
        self._interned: dict[Any, Node] = {}
        self._constants: dict[Node, Node] = {}
        self._listed: set[Node] = set()
        self.inputs: list[Node] = []
        self.nodes: list[Node] = []

    def input(self, aval: Any) -> Value:
        """A new argument of the program."""
        node = Node("input", None, {"position": len(self.inputs)}, (), (aval,))
        self.inputs.append(node)
        return Value(node, 0)

    def const(self, value: Any, aval: Any = None) -> Value:
        """A known array. Small ones are merged by content, large ones by identity."""
        aval = _jax.aval_of(value) if aval is None else aval
        node = Node("const", None, {"value": value}, (), (aval,))
        return Value(self._intern(("const", *_const_key(value, aval)), node), 0)

    def apply(
        self,
        primitive: Any,
        params: Mapping[str, Any],
        inputs: Sequence[Value],
        avals: Sequence[Any],
        effects: frozenset[Any] = frozenset(),
        context: Any = None,
        source: Any = None,
    ) -> Node:
        """A node for ``primitive`` on ``inputs``, or the equal one that is already there."""
        op = _jax.operation(primitive)
        return self.add(Node(op, primitive, params, tuple(inputs), tuple(avals), effects, context, source))

    def add(self, node: Node) -> Node:
        """Lists a finished node, whose inputs belong to this builder, and returns the node that stands for it."""
        if node.op in ("input", "const"):
            return node if node.op == "input" else self._intern(("const", *_const_key(node.value, node.aval)), node)
        if node.is_pure:
            key = (node.primitive, node.inputs, node.params_key, context_key(node.context))
            node = self._intern(key, node)
        if node not in self._listed:
            self._listed.add(node)
            self.nodes.append(node)
        return node

    def copy(self, node: Node, inputs: Sequence[Value], **changes: Any) -> Node:
        """The node with other operands (and parameters); the very same object when nothing differs."""
        # Equal constants come from different builders as different nodes.
        inputs = tuple(Value(self._known(v.node), 0) if v.node.op == "const" else v for v in inputs)
        if changes:
            return self.add(replace(node, inputs=inputs, **changes))
        return self.add(node if inputs == node.inputs else node.on(inputs))

    def build(self, outputs: Sequence[Value], *, origin: Any = None, out_avals: Sequence[Any] = ()) -> Graph:
        """The finished graph: what the outputs and the effects need, in the order it was added."""
        live = _reachable([v.node for v in outputs], [n for n in self.nodes if n.effects])
        nodes = tuple(n for n in self.nodes if n in live)
        return Graph(tuple(self.inputs), nodes, tuple(outputs), origin, tuple(out_avals))

    def _known(self, const: Node) -> Node:
        found = self._constants.get(const)
        if found is None:
            found = self._constants[const] = self.add(const)
        return found

    def _intern(self, key: Any, node: Node) -> Node:
        return self._interned.setdefault(key, node)


def _reachable(*groups: Sequence[Node]) -> set[Node]:
    live: set[Node] = set()
    stack = [n for group in groups for n in group]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(v.node for v in node.inputs)
    return live


# -- keys: what makes two nodes equal ---------------------------------------------------------------------------------

_context_keys: dict[int, tuple[Any, Any]] = {}


def context_key(context: Any) -> Any:
    """A hashable key of an equation context, remembered by identity while the context lives here."""
    if context is None:
        return None
    held = _context_keys.get(id(context))
    if held is None or held[0] is not context:
        held = _context_keys[id(context)] = (context, _jax.context_key(context))
        if len(_context_keys) > 4096:
            _context_keys.clear()
    return held[1]


def params_key(params: Mapping[str, Any]) -> Any:
    """A hashable key of a primitive's parameters: equal keys mean interchangeable parameters."""
    return tuple((name, param_key(params[name])) for name in sorted(params) if not name.startswith("_"))


def param_key(value: Any) -> Any:
    """A hashable key of one parameter; unhashable objects are told apart by identity."""
    if isinstance(value, (bool, int, float, complex, np.generic)):
        # 1, 1.0 and True are equal in Python, and so are 0.0 and -0.0; as parameters they differ.
        return (type(value), repr(value))
    if isinstance(value, tuple):
        return (type(value), *map(param_key, value))
    if isinstance(value, Graph):
        return value.key
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return value


def _const_key(value: Any, aval: Any) -> tuple[Any, ...]:
    kind = (getattr(aval, "shape", None), str(getattr(aval, "dtype", "")), getattr(aval, "weak_type", False))
    by_identity = not hasattr(aval, "shape") or _jax.is_ref(aval) or _jax.is_extended(aval.dtype)
    if not by_identity and int(np.prod(aval.shape)) <= INLINE_ELEMENTS:
        return (*kind, np.asarray(value).tobytes())
    return (*kind, id(value))


# -- canonical text ---------------------------------------------------------------------------------------------------


def _canonical_text(graph: Graph, exact: bool = True) -> str | None:
    names: dict[Node, str] = {node: f"a{i}" for i, node in enumerate(graph.inputs)}
    lines = ["(" + ", ".join(f"a{i}:{_type_text(n.aval)}" for i, n in enumerate(graph.inputs)) + ")"]

    def use(value: Value) -> str | None:
        node = value.node
        if node not in names:  # a constant
            names[node] = f"c{len(names)}"
            content = _const_text(node)
            lines.append(f"{names[node]} = const {_type_text(node.aval)} {content}")
        return names[node] + (f".{value.index}" if value.index else "")

    for node in graph.nodes:
        uses = " ".join(use(v) or "" for v in node.inputs)
        params = {k: _param_text(v, exact) for k, v in sorted(node.params.items()) if not k.startswith("_")}
        if exact and any(p is None for p in params.values()):
            return None
        names[node] = f"v{len(names)}"
        types = ",".join(map(_type_text, node.avals))
        text = " ".join(f"{k}={v}" for k, v in params.items())
        context = "" if node.context is None or not exact else f" @{_context_text(node.context)}"
        lines.append(f"{names[node]} = {node.op} {types} [{text}] {uses}{context}")
    lines.append("return " + " ".join(use(v) or "" for v in graph.outputs))
    return "\n".join(lines)


def _type_text(aval: Any) -> str:
    if hasattr(aval, "dtype"):
        return f"{aval.dtype}{list(aval.shape)}{'~' if getattr(aval, 'weak_type', False) else ''}"
    return str(aval)


def _const_text(node: Node) -> str:
    if not is_inline(node):
        return "known"
    value = np.asarray(node.value)
    return f"{value.tolist()} {value.tobytes().hex()[:64]}"


def _context_text(context: Any) -> str:
    key = context_key(context)
    return hashlib.blake2b(repr(key).encode(), digest_size=4).hexdigest()


def _param_text(value: Any, exact: bool) -> str | None:
    if isinstance(value, Graph):
        text = _canonical_text(value, exact)
        return None if text is None else "{\n  " + text.replace("\n", "\n  ") + "\n}"
    if isinstance(value, tuple):
        parts = [_param_text(v, exact) for v in value]
        return None if None in parts else type(value).__name__ + "(" + ", ".join(map(str, parts)) + ")"
    if hasattr(value, "eqns") and exact and _jax.holds_arrays(value):
        return None
    text = str(value) if hasattr(value, "eqns") else repr(value)
    # An address means that the text depends on this process.
    return None if exact and (" at 0x" in text or "<function" in text) else text
