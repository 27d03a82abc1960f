"""Function → graph → function gives the same results and types, as traced and after every body was touched."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.graph import Graph, check, emit, run, trace

VECTOR = jnp.linspace(-1.0, 2.0, 5)
MATRIX = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
CONTROL_FLOW = ("scan", "while", "cond", "remat")


def touch(graph):
    """The same program, whose nested programs no longer say that they are untouched copies of a jaxpr."""

    def copy(param):
        if isinstance(param, Graph):
            return touch(param)
        return tuple(map(copy, param)) if isinstance(param, tuple) else param

    moved, nodes = {}, []
    for node in graph.nodes:
        inputs = tuple(v._replace(node=moved.get(v.node, v.node)) for v in node.inputs)
        params = {k: copy(v) for k, v in node.params.items()} if node.op in CONTROL_FLOW else node.params
        moved[node] = dataclasses.replace(node, inputs=inputs, params=params)
        nodes.append(moved[node])
    outputs = tuple(v._replace(node=moved.get(v.node, v.node)) for v in graph.outputs)
    return Graph(graph.inputs, tuple(nodes), outputs, None, graph.out_avals)


def traced(function, *args, **options):
    leaves, tree = jax.tree.flatten(args)
    jaxpr = jax.make_jaxpr(lambda *xs: jax.tree.leaves(function(*jax.tree.unflatten(tree, xs))))(*leaves)
    return trace(jaxpr, **options), jaxpr


def described(aval):
    return aval.shape, aval.dtype, aval.weak_type


def values(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else x)


def round_trip(function, *args, exact=True):
    """Checks results and types of a program before and after, both as traced and with every body touched."""
    graph, jaxpr = traced(function, *args)
    expected = jax.tree.leaves(jax.jit(function)(*args))
    for form in (graph, touch(graph)):
        check(form)
        weights = [w.value for w in form.weights]
        again = jax.make_jaxpr(emit(form))(weights, *jax.tree.leaves(args))
        assert list(map(described, again.out_avals)) == list(map(described, jaxpr.out_avals))
        found = jax.jit(emit(form))(weights, *jax.tree.leaves(args))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and a.aval.weak_type == b.aval.weak_type
            if exact:
                np.testing.assert_array_equal(values(a), values(b))
            else:
                np.testing.assert_allclose(values(a), values(b), rtol=1e-6)
    return graph


# -- a broad list -----------------------------------------------------------------------------------------------------


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), 3 * tangents[0]))


@jax.custom_vjp
def scaled(x):
    return x * 2


scaled.defvjp(lambda x: (x * 2, x), lambda x, g: (g * 5,))


def nested_loops(x):
    def row(carry, r):
        def inner(state):
            i, v = state
            return i + 1, lax.cond(v.sum() > 0, lambda v: v - 1, lambda v: v * 0.5, v)

        _, v = lax.while_loop(lambda s: s[0] < 3, inner, (0, r))
        return carry + v.sum(), v

    return lax.scan(row, 0.0, x, reverse=True, unroll=2)


def two_while_consts(x, a, b):
    return lax.while_loop(lambda c: c[0] < a.sum(), lambda c: (c[0] + b.max(), c[1] * b), (jnp.float32(0), x))


PROGRAMS = {
    "elementwise": (lambda x: (jnp.sin(x) ** 2, x > 0, jnp.where(x > 0, x, -x)), VECTOR),
    "an argument as a result": (lambda x, y: (y, x, x), VECTOR, MATRIX),
    "a constant as a result": (lambda x: (jnp.arange(3), 1.0, x), VECTOR),
    "unused arguments": (lambda x, y: x, VECTOR, MATRIX),
    "no arguments": (lambda: jnp.arange(4) * 2,),
    "captured large array": (lambda x: x @ np.ones((4, 100), np.float32), MATRIX),
    "captured extended array": (lambda: jax.random.split(jax.random.key(3)),),
    "pytrees": (lambda p: {"b": p["a"][0] + p["c"], "d": p["a"][1]}, {"a": (VECTOR, MATRIX), "c": 2.0}),
    "scan": (lambda x: lax.scan(lambda c, r: (c + r, c * r), x[0], x), MATRIX),
    "scan without inputs": (lambda x: lax.scan(lambda c, _: (c * 2, None), x, None, length=4), VECTOR),
    "scan of no steps": (lambda x: lax.scan(lambda c, r: (c + r, c), x[0], x[:0]), MATRIX),
    "scan of a weak carry": (lambda x: lax.scan(lambda c, r: (c * 2, r), 1.0, x), VECTOR),
    "scan with captured weights": (lambda x: lax.scan(lambda c, r: (c @ np.ones((4, 4), "f"), r), x[0], x), MATRIX),
    "nested loops": (nested_loops, MATRIX),
    "while with constants on both sides": (two_while_consts, VECTOR, jnp.full(5, 2.0), jnp.full(5, 3.0)),
    "while of a weak carry": (
        lambda n: lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] * 2.0), (0, 1.0)),
        5,
    ),
    "fori": (lambda x: lax.fori_loop(0, 4, lambda i, v: v + i, x), VECTOR),
    "cond": (lambda x: lax.cond(x.sum() > 0, lambda y: (y, 1.0), lambda y: (-y, 2.0), x), VECTOR),
    "switch": (lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, lambda y: y * np.ones(5, "f")], x), 2, VECTOR),
    "switch with captured weights": (
        lambda i, x: lax.switch(i, [lambda y: y @ np.ones((4, 80), "f"), lambda y: y @ np.zeros((4, 80), "f")], x),
        1,
        MATRIX,
    ),
    "map of vmap": (lambda x: lax.map(jax.vmap(lambda v: v**3), x), MATRIX),
    "associative scan": (lambda x: lax.associative_scan(jnp.add, x), MATRIX),
    "custom jvp": (clipped, VECTOR),
    "custom vjp": (scaled, VECTOR),
    "gradient of custom rules": (jax.grad(lambda x: (clipped(x) + scaled(x)).sum()), VECTOR),
    "gradient of scan": (jax.grad(lambda x: lax.scan(lambda c, r: (c * jnp.sin(r), r), x[0], x)[0].sum()), MATRIX),
    "gradient of remat": (jax.grad(lambda x: jax.checkpoint(lambda y: jnp.sin(jnp.exp(y)))(x).sum()), VECTOR),
    "gradient of remat with weights": (
        jax.grad(lambda x: jax.checkpoint(lambda y: jnp.sin(y @ np.ones((4, 80), "f")))(x).sum()),
        MATRIX,
    ),
    "nested jit": (lambda x: jax.jit(lambda y: jax.jit(jnp.sin)(y) + 1)(x) * 2, VECTOR),
    "linear solve": (lambda x: jnp.linalg.solve(x @ x.T + 5 * jnp.eye(3), x), MATRIX),
    "typed random keys": (
        lambda k: (jax.random.normal(k, (3,)), jax.random.split(k), jax.random.fold_in(k, 7)),
        jax.random.key(0),
    ),
    "raw random keys": (lambda k: jax.random.uniform(k, (3,)), jax.random.PRNGKey(1)),
    "a key as a carry": (
        lambda k: lax.scan(lambda k, _: (jax.random.split(k)[0], jax.random.bits(k)), k, None, length=3),
        jax.random.key(0, impl="rbg"),
    ),
    "complex": (lambda x: (jnp.exp(1j * x), jnp.conj(x + 2j).imag, jnp.fft.fft(x)), VECTOR),
    "integers": (
        lambda i: (i // 3, i % 3, i << 2, ~i, i.astype(jnp.uint8), lax.population_count(i)),
        jnp.arange(-4, 5),
    ),
    "small integers": (lambda i: (i.astype(jnp.int4) + 1).astype(jnp.int8), jnp.arange(5)),
    "booleans": (lambda b: (b & ~b, b.any(), b ^ True), jnp.array([True, False])),
    "bfloat16": (lambda x: (x.astype(jnp.bfloat16) * 2).sum(), VECTOR),
    "float8": (lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), VECTOR),
    "mixed precision product": (
        lambda x: jnp.matmul(x.astype(jnp.bfloat16), x.T.astype(jnp.bfloat16), preferred_element_type=jnp.float32),
        MATRIX,
    ),
    "empty shapes": (lambda x: (x.sum(1), x @ jnp.ones((0, 3)), jnp.concatenate([x, x], 1)), jnp.zeros((2, 0))),
    "scalars": (lambda x: (x * 2, jnp.sqrt(x)), jnp.float32(3)),
    "weak scalars": (lambda x, i: (x * 2, x + i, jnp.float32(1) * x, jnp.asarray(x)), 3.0, 4),
    "weak types inside": (lambda x: lax.cond(x > 0, lambda: 1.0, lambda: 2.0) * jnp.ones(2, jnp.bfloat16), 3.0),
    "negative zero": (lambda x: (x + -0.0, x + 0.0, jnp.array([-0.0, 0.0])), jnp.array([0.0, -0.0])),
    "NaN and infinity": (lambda x: (x * jnp.nan, x / 0, jnp.array([np.inf, -np.inf, np.nan])), VECTOR),
    "indexing": (lambda x, i: (x[i], x.at[i].add(2.0), x.at[0, 1].set(9)), MATRIX, jnp.array([2, 0])),
    "sorting": (lambda x: (jnp.sort(x, 1), jnp.argsort(x, 0), lax.top_k(x, 2)), MATRIX),
    "windows": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME"), MATRIX),
    "reductions of one's own": (lambda x: lax.reduce(x, 1.0, lambda a, b: a * b + 1, (1,)), MATRIX),
    "decompositions": (lambda x: (jnp.linalg.qr(x), jnp.linalg.cholesky(x @ x.T + 4 * jnp.eye(3))), MATRIX),
    "barrier": (lambda x: lax.optimization_barrier((x, x * 2)), VECTOR),
    "named values": (lambda x: checkpoint_name(x * 2, "doubled"), VECTOR),
    "metadata": (jax.named_scope("scope")(lambda x: x * 2), VECTOR),
    "precision": (lambda x: lax.dot(x, x.T, precision="highest"), MATRIX),
    "pure callback": (
        lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((5,), jnp.float32), x, vmap_method="sequential"),
        VECTOR,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_round_trip(name):
    function, *args = PROGRAMS[name]
    round_trip(function, *args)


@pytest.mark.parametrize("name", ["scan", "nested loops", "complex", "integers", "weak scalars", "gradient of remat"])
def test_round_trip_in_64_bits(name):
    function, *args = PROGRAMS[name]
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: np.asarray(x, np.float64) if getattr(x, "dtype", 0) == np.float32 else x, args)
        graph = round_trip(function, *args)
        kinds = [str(v.dtype) for n in graph.walk() for v in n.inputs]
        assert any(k in ("float64", "int64") for k in kinds)


def test_both_threefry_modes_are_replayed():
    function = partial(jax.random.uniform, shape=(4,))
    key = jax.random.key(0)
    with jax.threefry_partitionable(False):
        graph, _ = traced(function, key)
        expected = jax.jit(function)(key)
    (found,) = jax.jit(lambda k: run(graph, {}, k))(key)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, jax.jit(function)(key))


# -- what is inlined, and what is kept --------------------------------------------------------------------------------


def test_plain_calls_vanish():
    graph, _ = traced(lambda x: jax.jit(lambda y: clipped(y) + scaled(jax.checkpoint(jnp.sin)(y)))(x), VECTOR)
    assert graph.count("jit", "custom_jvp_call", "custom_vjp_call", "remat", "closed_call") == 0


def test_custom_rules_are_kept_when_asked_and_still_differentiate():
    def function(x):
        return lax.scan(lambda c, _: (clipped(c), scaled(c)), x, None, length=2)

    graph, _ = traced(function, VECTOR, keep_custom=True)
    assert graph.count("custom_jvp_call") == 1 and graph.count("custom_vjp_call") == 1

    def loss(f):
        return lambda x: sum(y.sum() for y in jax.tree.leaves(f(x)))

    for form in (graph, touch(graph)):
        found = jax.grad(loss(lambda x, form=form: run(form, {}, x)))(VECTOR)
        np.testing.assert_array_equal(found, jax.grad(loss(function))(VECTOR))


def test_differentiated_remat_is_kept():
    graph, _ = traced(jax.grad(lambda x: jax.checkpoint(lambda y: jnp.sin(jnp.exp(y)))(x).sum()), VECTOR)
    assert graph.count("remat") == 1


def test_calls_that_ask_for_something_are_kept():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    placed = NamedSharding(mesh, PartitionSpec("d"))
    calls = {
        "donation": jax.jit(jnp.sin, donate_argnums=0),
        "input shardings": jax.jit(jnp.sin, in_shardings=placed),
        "output shardings": jax.jit(jnp.sin, out_shardings=placed),
    }
    for name, call in calls.items():
        graph, _ = traced(call, jnp.ones(4))
        (node,) = graph.nodes
        assert node.op == "jit", name
        again = jax.make_jaxpr(lambda x, graph=graph: run(graph, {}, x))(jnp.ones(4)).eqns[0]
        for key in ("donated_invars", "in_shardings", "out_shardings"):
            assert again.params[key] == node.params[key], name
        np.testing.assert_allclose(jax.jit(emit(graph))([], jnp.ones(4))[0], np.sin(np.ones(4)), rtol=1e-6)


def test_sharding_constraints_and_shard_map():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    placed = NamedSharding(mesh, PartitionSpec("d"))

    def function(x):
        x = lax.with_sharding_constraint(x * 2, placed)
        return jax.shard_map(
            lambda y: lax.psum(y, "d"), mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec()
        )(x)

    graph = round_trip(function, jnp.ones(4))
    assert graph.count("sharding_constraint") == 1 and graph.count("shard_map") == 1


def test_pallas_calls_are_kept():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2 + 1

    def function(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x) + 1

    assert round_trip(function, jnp.ones((8, 8))).count("pallas_call") == 1


foreign = Primitive("sin")  # A name that JAX uses too.
foreign.def_impl(lambda x, *, times: x * times)
foreign.def_abstract_eval(lambda x, *, times: x)
mlir.register_lowering(foreign, mlir.lower_fun(lambda x, times: x * times, multiple_results=False))


def test_foreign_primitives_pass_through_and_are_taken_for_no_other():
    graph = round_trip(lambda x: foreign.bind(jnp.sin(x), times=3) + 1, VECTOR)
    assert graph.count("sin") == 1 and graph.size == 3
    assert [n.op for n in graph.nodes][1].startswith("sin@")


def test_known_arguments_become_constants():
    _, jaxpr = traced(lambda x, w, y: (x @ w + y, w), MATRIX, jnp.ones((4, 30)), 2.0)
    graph = trace(jaxpr, {1: jnp.full((4, 30), 2.0)})
    assert len(graph.inputs) == 2 and [w.aval.shape for w in graph.weights] == [(4, 30)] and graph.origin is None
    found, same = emit(graph)([graph.weights[0].value], MATRIX, 2.0)
    np.testing.assert_allclose(found, MATRIX @ jnp.full((4, 30), 2.0) + 2, rtol=1e-6)
    assert same.shape == (4, 30)
    with pytest.raises(ValueError, match="has 1 weights, 0 were given"):
        emit(graph)([], MATRIX, 2.0)


def test_large_constants_travel_as_arguments():
    graph, _ = traced(lambda x: x @ np.full((4, 100), 7.0, np.float32), MATRIX)
    text = jax.jit(emit(graph)).lower([graph.weights[0].value], MATRIX).as_text()
    assert "dense<7.0" not in text


def test_symbolic_shapes():
    rows, columns = jax.export.symbolic_shape("a, b")
    aval = jax.ShapeDtypeStruct((rows, columns), jnp.float32)

    def function(x):
        return jnp.concatenate([x.T.reshape(-1), jnp.zeros(x.shape[0] * 2)]), lax.scan(lambda c, r: (c + r, r), x[0], x)

    def again(x):
        jaxpr = jax.make_jaxpr(lambda y: jax.tree.leaves(function(y)))(aval)
        return run(touch(trace(jaxpr)), {}, x)

    exported = jax.export.export(jax.jit(again))(aval)
    for a, b in zip(exported.call(MATRIX), jax.tree.leaves(function(MATRIX)), strict=True):
        np.testing.assert_array_equal(a, b)


# -- effects ----------------------------------------------------------------------------------------------------------


def effects_of(function, capfd, *args):
    capfd.readouterr()
    jax.block_until_ready(jax.jit(function)(*args))
    jax.effects_barrier()
    return capfd.readouterr().out.splitlines()


def test_ordered_prints_keep_their_order_and_number(capfd):
    def function(x):
        jax.debug.print("first {}", x.sum(), ordered=True)
        jax.debug.print("same", ordered=True)
        jax.debug.print("same", ordered=True)

        def step(c, r):
            jax.debug.print("row {}", r, ordered=True)
            return c + r, None

        y, _ = lax.scan(step, 0.0, x)
        lax.cond(y > 0, lambda: jax.debug.print("positive", ordered=True), lambda: None)
        jax.debug.print("last {}", y, ordered=True)
        return y

    graph, _ = traced(function, VECTOR)
    expected = effects_of(function, capfd, VECTOR)
    assert len(expected) == 3 + 5 + 2
    for form in (graph, touch(graph)):
        assert effects_of(lambda x, form=form: run(form, {}, x), capfd, VECTOR) == expected


def test_unordered_prints_all_happen_even_where_nothing_uses_them(capfd):
    def function(x):
        for _ in range(3):
            jax.debug.print("seen {}", jnp.sin(x).sum())
        return x

    graph, _ = traced(function, VECTOR)
    expected = effects_of(function, capfd, VECTOR)
    assert len(expected) == 3 and effects_of(lambda x: run(graph, {}, x), capfd, VECTOR) == expected


def test_callbacks_are_called_as_often_and_in_the_same_order():
    calls = []

    def note(i, x):
        calls.append((int(i), float(x)))
        return np.float32(len(calls))

    def function(x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        first = jax.experimental.io_callback(note, shape, 0, x.sum(), ordered=True)
        jax.experimental.io_callback(note, shape, 1, x.sum(), ordered=True)
        jax.experimental.io_callback(note, shape, 1, x.sum(), ordered=True)
        return first

    graph, _ = traced(function, VECTOR)
    jax.block_until_ready(jax.jit(lambda x: run(graph, {}, x))(VECTOR))
    jax.effects_barrier()
    assert [i for i, _ in calls] == [0, 1, 1]


def test_stateful_randomness_is_drawn_as_often_as_written():
    graph, _ = traced(lambda a, b: (lax.rng_uniform(a, b, (3,)), lax.rng_uniform(a, b, (3,))), 0.0, 1.0)
    assert graph.count("rng_uniform") == 2
    first, second = jax.jit(emit(graph))([], 0.0, 1.0)
    assert not np.array_equal(first, second)
