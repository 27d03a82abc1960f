"""Structures of arguments and results: what comes back, what counts as the same, what is refused."""

import collections
import dataclasses
import json
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.storage import StorageError
from jaxinfer.storage.structure import describe, describe_static, rebuild, rebuild_static, shape_of


class Pair(NamedTuple):
    left: object
    right: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    logits: object
    hidden: object
    name: str = dataclasses.field(default="", metadata={"static": True})


class Module(eqx.Module):
    weight: object
    bias: object


@jax.tree_util.register_pytree_node_class
class Nameless:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def described(tree):
    return json.loads(json.dumps(describe(jax.tree.structure(tree))))


def rebuilt(tree):
    return rebuild(described(tree), iter(jax.tree.leaves(tree)))


plain = st.recursive(
    st.integers() | st.none(),
    lambda node: (
        st.lists(node, max_size=3)
        | st.lists(node, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), node, max_size=3)
        | st.dictionaries(st.integers(), node, max_size=3)
        | st.lists(st.tuples(st.text(max_size=3), node), max_size=3).map(collections.OrderedDict)
        | st.builds(Pair, node, node)
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_structures_come_back(tree):
    back = rebuilt(tree)
    assert back == tree and jax.tree.structure(back) == jax.tree.structure(tree)


@given(plain, plain)
def test_descriptions_are_equal_exactly_for_equal_structures(a, b):
    same = jax.tree.structure(a) == jax.tree.structure(b)
    assert (shape_of(described(a)) == shape_of(described(b))) == same


def test_a_named_tuple_without_its_class_has_the_same_fields():
    structure = described(Pair(1, {"x": 2}))
    structure["type"] = "a_module_nobody_has:Outer.Pair"
    back = rebuild(structure, iter([1, 2]))
    assert type(back).__name__ == "Pair" and back.left == 1 and back.right == {"x": 2}
    assert shape_of(structure) == shape_of(described(Pair(1, {"x": 2})))


@pytest.mark.parametrize("made", [Record, Module])
def test_nodes_with_attributes_come_back_as_named_tuples(made):
    tree = made(1, [2, 3])
    back = rebuilt(tree)
    first, second = back._fields
    assert isinstance(back, tuple)
    assert (getattr(back, first), getattr(back, second)) == (getattr(tree, first), getattr(tree, second))
    assert shape_of(described(back)) == shape_of(described(tree))


def test_nodes_with_keys_come_back_as_dicts():
    tree = FrozenDict({"b": 1, "a": {"c": 2}})
    assert rebuilt(tree) == {"b": 1, "a": {"c": 2}}
    assert shape_of(described(tree)) == shape_of(described({"a": {"c": 2}, "b": 1}))


def test_nodes_without_names_are_refused():
    with pytest.raises(StorageError, match=r"Nameless.*no names"):
        described((1, Nameless(2, 3)))


def test_dicts_with_other_keys_are_refused():
    with pytest.raises(StorageError, match=r"key \(1, 2\)"):
        described({(1, 2): 3})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v).map(tuple)))
def test_static_values_come_back(value):
    back = rebuild_static(json.loads(json.dumps(describe_static(value))))
    assert back == value and type(back) is type(value)


def test_static_values_of_other_types_are_refused():
    with pytest.raises(StorageError, match=r"functools\.partial"):
        describe_static(np.tanh)


def test_one_and_true_are_not_the_same():
    assert str(describe_static(1)) != str(describe_static(True)) != str(describe_static(1.0))
