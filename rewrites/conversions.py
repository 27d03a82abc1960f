"""Conversions, selections and marks that stand between operations that belong together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.structure import known_number, layout, rebind
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule, op, var
from jaxinfer.rewriting.sampler import Frozen

# -- conditions -------------------------------------------------------------------------------------------------------


def holds(wide: Any, narrow: Any) -> bool:
    """Whether every value of the dtype ``narrow`` is a value of the dtype ``wide``."""
    wide, narrow = jnp.dtype(wide), jnp.dtype(narrow)
    if wide == narrow or narrow == np.bool_:
        return True
    if wide == np.bool_ or jnp.issubdtype(narrow, jnp.complexfloating):
        return jnp.issubdtype(wide, jnp.complexfloating) and wide.itemsize > narrow.itemsize
    if jnp.issubdtype(wide, jnp.complexfloating):
        return holds(jnp.finfo(wide).dtype, narrow)
    if not jnp.issubdtype(wide, jnp.floating):
        if jnp.issubdtype(narrow, jnp.floating):
            return False
        whole, part = jnp.iinfo(wide), jnp.iinfo(narrow)
        return int(whole.min) <= int(part.min) and int(part.max) <= int(whole.max)
    w = jnp.finfo(wide)
    if jnp.issubdtype(narrow, jnp.floating):
        n = jnp.finfo(narrow)
        # Formats of one byte differ in infinities and NaNs too.
        return narrow.itemsize > 1 and w.nmant >= n.nmant and w.minexp <= n.minexp and w.maxexp >= n.maxexp
    return jnp.iinfo(narrow).bits <= min(w.nmant + 1, w.maxexp)


def _to_itself(m: Match) -> bool:
    return m["x"].dtype == m.roots[0].dtype


def _and_back(m: Match) -> bool:
    return _to_itself(m) and holds(m.nodes["wide"].aval.dtype, m["x"].dtype)


def _of_one_kind(m: Match) -> bool:
    dtypes = (m["x"].dtype, m.nodes["wide"].aval.dtype, m.roots[0].dtype)
    alike = any(all(jnp.issubdtype(d, kind) for d in dtypes) for kind in (jnp.floating, jnp.signedinteger))
    return alike and holds(dtypes[1], dtypes[0])


def _chosen(m: Match) -> int | None:
    """The case that a known predicate always takes."""
    predicate = layout(m["p"]).source.node
    if not predicate.is_const:
        return None
    values = np.asarray(predicate.value)
    if values.size == 0 or not np.all(values == values.flat[0]):
        return None
    return int(values.flat[0])


# -- numbers ----------------------------------------------------------------------------------------------------------

# Operations that every platform computes alike.
_EXACT = "add sub mul neg max min and or xor not eq ne lt le gt ge convert_element_type select_n clamp sign abs".split()


def _find_number(graph: Graph, node: Node) -> Match | None:
    """A scalar computed from scalar constants."""
    if node.aval.shape != () or not node.inputs or not all(v.node.is_const and v.shape == () for v in node.inputs):
        return None
    return Match(graph, (Value(node, 0),))


def _number(m: Match) -> Any:
    return known_number(m.graph, m.roots[0])


# -- replacements -----------------------------------------------------------------------------------------------------


def _keep(m: Match, x: Any, **_: Any) -> Any:
    return x


def _convert(m: Match, x: Any) -> Any:
    return rebind(m.roots[0].node, x)


# -- cases ------------------------------------------------------------------------------------------------------------


def _case_number(s: Any) -> Iterator[Any]:
    two = jnp.asarray(2, s.dtype)
    yield lambda x, k: x * (k + two), (s.array(*s.shape(2)), Frozen(two))


def _case_to_itself(s: Any) -> Iterator[Any]:
    dtype = s.dtype
    convert = lax.convert_element_type_p.bind
    yield lambda x: convert(x, new_dtype=dtype, weak_type=True, sharding=None), (s.array(*s.shape(2)),)


def _case_and_back(s: Any) -> Iterator[Any]:
    s.only("bfloat16", "float16")
    dtype = s.dtype
    yield lambda x: x.astype("float32").astype(dtype), (s.array(*s.shape(2)),)


def _case_of_one_kind(s: Any) -> Iterator[Any]:
    s.only("bfloat16")
    yield lambda x: x.astype("float32").astype("float16"), (s.array(*s.shape(2)),)


def _case_same(s: Any) -> Iterator[Any]:
    shape = s.shape(2)
    yield lambda p, x: lax.select_n(p, x, x), (s.array(*shape, dtype="bool"), s.array(*shape))


def _case_known(s: Any) -> Iterator[Any]:
    shape = s.shape(2)
    predicate = Frozen(jnp.full((), s.choice((True, False))))
    yield lambda p, x, y: lax.select_n(p, x, y), (predicate, s.array(*shape), s.array(*shape))


_x, _p = var("x"), var("p")
_wide = op("convert_element_type", _x, name="wide")

RULES: tuple[Rule, ...] = (
    # ** numbers **
    Rule(
        "number",
        "f(1, 2) → its value, for operations that every platform computes alike",
        Find(tuple(_EXACT), _find_number),
        _number,
        "bitwise",
        reads_values=True,
        cases=_case_number,
    ),
    # ** conversions **
    Rule(
        "convert-to-itself",
        "convert(x) to its own type → x",
        op("convert_element_type", _x),
        _keep,
        "bitwise",
        when=_to_itself,
        cases=_case_to_itself,
    ),
    Rule(
        "widen-and-back",
        "convert(convert(x) to a wider type) to the type of x → x",
        op("convert_element_type", _wide),
        _keep,
        "bitwise",
        when=_and_back,
        cases=_case_and_back,
    ),
    Rule(
        "widen-then-convert",
        "convert(convert(x) to a wider type) → convert(x)",
        op("convert_element_type", _wide),
        _convert,
        "bitwise",
        when=_of_one_kind,
        cases=_case_of_one_kind,
    ),
    # ** selections **
    Rule(
        "select-same",
        "select(p, x, x) → x",
        op("select_n", _p, _x, _x),
        _keep,
        "bitwise",
        cases=_case_same,
    ),
    Rule(
        "select-known",
        "select(known p, x, y) → x or y",
        op("select_n", _p, _x, var("y")),
        lambda m, p, x, y: y if _chosen(m) else x,
        "bitwise",
        when=lambda m: _chosen(m) is not None,
        reads_values=True,
        cases=_case_known,
    ),
    # ** marks that mean nothing in a program that is only run **
    Rule(
        "drop-stop-gradient",
        "stop_gradient(x) → x",
        op("stop_gradient", _x),
        _keep,
        "bitwise",
        # The derivatives of both sides differ on purpose, save where they vanish.
        cases=lambda s: iter([(lambda x: lax.stop_gradient(jnp.sign(x)), (s.array(*s.shape(2)),))]),
    ),
    Rule(
        "drop-copy",
        "copy(x) → x",
        op("copy", _x),
        _keep,
        "bitwise",
        cases=lambda s: iter([(jnp.copy, (s.array(*s.shape(2)),))]),
    ),
)
