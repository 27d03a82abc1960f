"""The structure of arguments and results as JSON, for a process that does not know their classes.

Dicts, lists, tuples, ``OrderedDict`` and ``None`` are themselves. Of every other node its names are kept: a node whose
children have keys (a ``FrozenDict``) is a dict, one whose children are attributes (a named tuple, a registered
dataclass, an Equinox module) comes back as a named tuple of the same fields. Arguments are told apart by the same
description, so a stored program takes the caller's own class as well as the plain counterpart.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey

from jaxinfer.storage.container import StorageError

_KEYS = (str, int, bool, float)
_SCALARS = (str, int, bool, float, type(None))
_LEAF = "*"


class _Leaf:
    """Stands for an array."""


def describe(tree: Any) -> Any:
    """The structure of a pytree, given as ``jax.tree.structure`` gives it, in JSON types.

    Raises:
        StorageError: for a node that has no names for its children, or a dict whose keys are no strings or numbers.
    """
    return _describe(jax.tree.unflatten(tree, [_Leaf()] * tree.num_leaves))


def _describe(node: Any) -> Any:
    if isinstance(node, _Leaf):
        return _LEAF
    if node is None:
        return None
    if type(node) in (tuple, list):
        return {type(node).__name__: [_describe(child) for child in node]}
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    keys = [path[0] for path, _ in children]
    nodes = [_describe(child) for _, child in children]
    fields = getattr(node, "_fields", None)
    if fields or (keys and all(isinstance(key, GetAttrKey) for key in keys)):
        names = fields or [key.name for key in keys]
        kind = f"{type(node).__module__}:{type(node).__qualname__}"
        return {"named": [[name, child] for name, child in zip(names, nodes, strict=True)], "type": kind}
    if isinstance(node, dict) or (keys and all(isinstance(key, DictKey) for key in keys)):
        kind = "ordered" if isinstance(node, collections.OrderedDict) else "dict"
        return {kind: [[_key(key.key), child] for key, child in zip(keys, nodes)]}
    raise StorageError(
        f"a {type(node).__name__} stands among arguments or results, and it has no names for what it holds: use dicts, "
        "lists, tuples, named tuples or dataclasses, or register it with jax.tree_util.register_pytree_with_keys"
    )


def _key(key: Any) -> Any:
    if type(key) not in _KEYS:
        raise StorageError(f"a dict among arguments or results has the key {key!r}: use strings or numbers")
    return key


def rebuild(structure: Any, leaves: Iterator[Any]) -> Any:
    """A pytree of this structure around the leaves."""
    if structure == _LEAF:
        return next(leaves)
    if structure is None:
        return None
    ((kind, children), *more) = structure.items()
    if kind == "tuple":
        return tuple(rebuild(child, leaves) for child in children)
    if kind == "list":
        return [rebuild(child, leaves) for child in children]
    values = {key: rebuild(child, leaves) for key, child in children}
    if kind == "dict":
        return values
    if kind == "ordered":
        return collections.OrderedDict(values)
    return _named_tuple(dict(more)["type"], tuple(values))(**values)


def _named_tuple(kind: str, fields: tuple[str, ...]) -> Any:
    """The named tuple of that name where its module is imported anyway, else one like it."""
    module, _, name = kind.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == fields:
        return found
    return collections.namedtuple(name.rpartition(".")[2], fields)


def shape_of(structure: Any) -> str:
    """A text equal for structures that stand for each other: without the names of classes."""
    return json.dumps(_without_types(structure))


def _without_types(structure: Any) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, children),) = ((k, v) for k, v in structure.items() if k != "type")
    if kind in ("tuple", "list"):
        return {kind: [_without_types(child) for child in children]}
    return {kind: [[key, _without_types(child)] for key, child in children]}


def describe_static(value: Any) -> Any:
    """A static argument in JSON types; equal descriptions mean equal values of equal types.

    Raises:
        StorageError: for anything else than strings, numbers, flags, None, and tuples of them.
    """
    if type(value) is tuple:
        return {"tuple": [describe_static(item) for item in value]}
    if type(value) in _SCALARS:
        return value
    raise StorageError(
        f"a static argument is {value!r}, which cannot be written down: bind it beforehand, with functools.partial"
    )


def rebuild_static(described: Any) -> Any:
    """The value that was described."""
    if isinstance(described, dict):
        return tuple(map(rebuild_static, described["tuple"]))
    return described


def describe_type(shape: Sequence[Any], dtype: str) -> str:
    """A type as messages show it: ``f32[b,3]``."""
    short = dtype.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace("int", "i")
    return f"{short}[{','.join(map(str, shape))}]"
