"""Calling an optimized function: every kind of argument, one compilation for each signature, errors, other traces."""

import collections
import functools
import threading
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer import autoinfer

Point = collections.namedtuple("Point", "x y")


def optimize(fun, **options):
    return autoinfer.optimize(fun, tune="off", **options)


def chain(a, b, x):
    """A product that is cheaper from the right: something for the rules to do."""
    return a @ b @ x


def chain_arguments(size=32, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return (*(jnp.asarray(rng.normal(size=(size, size)), dtype) for _ in range(2)), jnp.ones(size, dtype))


def assert_same(have, want, tolerance=0.0):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
        assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
        wide = np.complex128 if b.dtype.kind == "c" else np.float64
        a, b = (np.asarray(x).astype(wide) for x in (a, b))
        scale = np.abs(b[np.isfinite(b)]).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


class Traces:
    """Counts how often a function is traced."""

    def __init__(self, fun):
        self.count, self.fun = 0, fun

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.fun(*args, **kwargs)


class Compilations:
    """Counts what JAX compiles while it is open."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def _note(self, event, duration, **kwargs):
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self._note)


# -- what it does -----------------------------------------------------------------------------------------------------


def test_the_rewritten_program_runs_and_is_verified():
    fast = optimize(chain)
    args = chain_arguments()
    assert_same(fast(*args), jax.jit(chain)(*args), 1e-5)
    program = fast.program(*args)
    assert program.optimized and program.verified == "now" and program.agreement.passed
    assert fast.graph(*args).count("dot_general") == 2
    assert [v.shape for v in fast.graph(*args).nodes[0].inputs] == [(32, 32), (32,)]


def test_as_a_decorator_with_and_without_options():
    @autoinfer.optimize
    def one(x):
        """Adds one."""
        return x + 1

    @autoinfer.optimize(tune="off", numerics="bitwise")
    def two(x):
        return x + 2

    assert float(one(1.0)) == 2.0 and float(two(1.0)) == 3.0
    assert one.__name__ == "one" and one.__doc__ == "Adds one." and one.__wrapped__(1) == 2


@pytest.mark.parametrize("fun", [chain, lambda a, b, x: jnp.sin(a @ x)])
def test_measuring_keeps_the_original_unless_it_is_faster(fun):
    fast = autoinfer.optimize(fun, tune=2.0)
    args = chain_arguments(128)
    assert_same(fast(*args), jax.jit(fun)(*args), 1e-5)
    program = fast.program(*args)
    assert program.optimized == (program.ratio is not None and program.ratio.is_faster)


# -- kinds of arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fun", "args"),
    [
        (lambda p: p.x * p.y, (Point(jnp.ones(3), 2.0),)),
        (lambda p: {"a": p["b"][0], "c": (p["b"][1], None)}, ({"b": [jnp.ones(2), 3]},)),
        (lambda: jnp.arange(3), ()),
        (lambda x: x, (jnp.ones(2),)),
        (lambda x: (x, x, 1, 2.5, np.arange(2)), (jnp.ones(2),)),
        (lambda x: x * 2, (3,)),
        (lambda x: x * 2, (3.0,)),
        (lambda x: x * 2, (True,)),
        (lambda x: x * 2, (1j,)),
        (lambda x: x * 2, (np.float32(3),)),
        (lambda x: x * 2, (np.ones(3),)),
        (lambda x: x @ x, (np.ones((0, 0), np.float32),)),
        (lambda x: (x @ x.T).sum(0), (jnp.ones((3, 0)),)),
        (lambda x: x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16), (jnp.ones((4, 4)),)),
        (lambda x: (x // 3) % 2 << 1, (jnp.arange(-5, 5),)),
        (lambda x: x * 0 + x / x - x, (jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan]),)),
        (lambda x: jnp.log(x) + (x + 0.0) * 1, (jnp.array([0.0, -1.0, 1e-40, jnp.nan]),)),
        (lambda k: (jax.random.split(k), jax.random.normal(k, (3,))), (jax.random.key(0),)),
        (lambda k: jax.random.normal(k, (3,)), (jax.random.PRNGKey(0),)),
        (lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), (jnp.linspace(0, 9, 7),)),
    ],
)
def test_kinds_of_arguments_and_results(fun, args):
    def opened(tree):
        keys = jax.dtypes.prng_key
        return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x, tree)

    assert_same(opened(optimize(fun)(*args)), opened(jax.jit(fun)(*args)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float64, 1e-14), (jnp.float32, 1e-6), (jnp.bfloat16, 2e-2), (jnp.float16, 2e-3), (jnp.complex128, 1e-14)],
)
def test_floating_types(dtype, tolerance):
    with jax.enable_x64(True):
        args = chain_arguments(dtype=dtype)
        assert_same(optimize(chain)(*args), jax.jit(chain)(*args), tolerance)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.int64])
def test_whole_numbers_are_exact(dtype):
    with jax.enable_x64(True):
        args = tuple(x.astype(dtype) for x in chain_arguments(dtype=jnp.float32))
        assert_same(optimize(chain)(*args), jax.jit(chain)(*args))


def test_keyword_arguments_and_defaults():
    fast = optimize(lambda x, *more, scale=2.0, shift: x * scale + shift + sum(more))
    assert float(fast(1.0, shift=3.0)) == 5.0
    assert float(fast(1.0, shift=3.0, scale=5.0)) == 8.0
    assert float(fast(1.0, 10.0, scale=5.0, shift=3.0)) == 18.0


def test_static_arguments_by_position_and_name():
    fast = optimize(
        lambda x, axis, *, mode: getattr(jnp, mode)(x, axis), static_argnums=(1,), static_argnames=("mode",)
    )
    x = jnp.arange(6.0).reshape(2, 3)
    assert_same(fast(x, 0, mode="sum"), x.sum(0))
    assert_same(fast(x, 1, mode="sum"), x.sum(1))
    assert_same(fast(x, -1, mode="max"), x.max(1))


def test_methods():
    class Scaler:
        def __init__(self, factor):
            self.factor = factor

        @autoinfer.optimize(tune="off")
        def scale(self, x, *, twice=False):
            return x * self.factor

        @autoinfer.optimize(tune="off", static_argnums=2)
        def power(self, x, n):
            return x**n

    two, three = Scaler(2.0), Scaler(3.0)
    assert float(two.scale(1.0)) == 2.0 and float(three.scale(1.0)) == 3.0 and float(two.scale(4.0)) == 8.0
    assert float(two.power(3.0, 2)) == 9.0
    assert two.scale is two.scale, "a method keeps what it compiled"


def test_a_bound_method_and_a_partial():
    class Shift:
        def __init__(self):
            self.by = jnp.arange(3.0)

        def add(self, x):
            return x + self.by

    assert_same(optimize(Shift().add)(jnp.ones(3)), jnp.ones(3) + jnp.arange(3.0))
    assert_same(optimize(functools.partial(jnp.add, jnp.ones(3)))(jnp.ones(3)), jnp.full(3, 2.0, jnp.float32))


def test_donated_buffers_are_used_up_and_given_to_the_result():
    fast = optimize(lambda x, y: x * 2 + y, donate_argnums=(0,))
    for _ in range(3):
        x, y = jnp.arange(8.0), jnp.ones(8)
        assert_same(fast(x, y), jnp.arange(8.0) * 2 + 1)
        assert x.is_deleted() and not y.is_deleted()
    assert fast.lower(jnp.arange(8.0), y).compile().memory_analysis().alias_size_in_bytes == 32


def test_donated_buffers_of_a_measured_program():
    fast = autoinfer.optimize(chain, tune=0.5, donate_argnums=(2,))
    a, b, x = chain_arguments(64)
    want = chain(a, b, x)
    assert_same(fast(a, b, x), want, 1e-4)
    assert x.is_deleted()


# -- one compilation for each signature -------------------------------------------------------------------------------


def test_a_second_call_neither_traces_nor_compiles():
    traced = Traces(chain)
    fast = optimize(traced)
    args = chain_arguments()
    fast(*args)
    first = traced.count
    with Compilations() as compilations:
        for _ in range(5):
            fast(*args)
    assert traced.count == first == 1 and compilations.count == 0


def test_alternating_signatures_compile_once_each():
    traced = Traces(lambda x, n: x * n)
    fast = optimize(traced, static_argnums=1)
    kinds = [(jnp.ones(3), 2), (jnp.ones((2, 2)), 2), (jnp.ones(3), 3), (np.ones(3, np.int32), 2), (1.0, 2)]
    want = [jax.jit(lambda x, n=n: x * n)(x) for x, n in kinds]
    for x, n in kinds:
        fast(x, n)
    assert traced.count == len(kinds)
    with Compilations() as compilations:
        for _ in range(3):
            for (x, n), result in zip(kinds, want):
                assert_same(fast(x, n), result)
    assert traced.count == len(kinds) and compilations.count == 0


def test_settings_that_change_the_program_are_part_of_the_signature():
    fast = optimize(lambda x: x * 2)
    x = np.ones(3)
    assert fast(x).dtype == jnp.float32
    with jax.enable_x64(True):
        assert fast(x).dtype == jnp.float64
    assert fast(x).dtype == jnp.float32


def test_threads_calling_at_once():
    fast = optimize(chain)
    kinds = [chain_arguments(size) for size in (8, 16, 24)]
    want = [jax.jit(chain)(*args) for args in kinds]
    failures = []
    start = threading.Barrier(6)

    def work(seed):
        start.wait()
        for step in range(12):
            i = (seed + step) % len(kinds)
            try:
                assert_same(fast(*kinds[i]), want[i], 1e-5)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- inside other traces ----------------------------------------------------------------------------------------------


def test_inside_jit_nothing_is_run_or_verified():
    fast = optimize(chain)
    args = chain_arguments()
    with Compilations() as compilations:
        jax.jit(lambda *a: fast(*a) + 1).trace(*args)
    assert compilations.count == 0 and not fast._programs
    text = jax.jit(lambda *a: fast(*a) + 1).lower(*args).as_text()
    assert "tensor<32x32xf32>, tensor<32x32xf32>" not in text, "the chain is computed from the right"
    assert_same(jax.jit(lambda *a: fast(*a) + 1)(*args), jax.jit(chain)(*args) + 1, 1e-5)


def test_abstract_arguments_are_rewritten_and_not_verified():
    fast = optimize(chain)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in chain_arguments()]
    program = fast.program(*shapes)
    assert program.optimized and program.verified == "never" and "neither verified nor timed" in program.reason


@pytest.mark.parametrize("transform", [jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jit, jax.hessian])
def test_closed_over_tracers(transform):
    x = jnp.arange(3.0)

    def loss(f, w):
        return f(lambda y: jnp.sum(jnp.tanh(y * w)) * w[0])(x)

    have, want = (transform(functools.partial(loss, f))(x + 1) for f in (optimize, lambda f: f))
    assert_same(have, want, 1e-6)
    have, want = (jax.vmap(transform(functools.partial(loss, f)))(jnp.ones((2, 3))) for f in (optimize, lambda f: f))
    assert_same(have, want, 1e-6)


def test_a_tracer_closed_over_by_one_optimized_function_called_twice():
    calls = []

    def outer(w):
        fast = optimize(lambda y: y * w)
        calls.append(fast)
        return fast(jnp.ones(3)) + fast(jnp.full(3, 2.0, jnp.float32))

    assert_same(jax.jit(outer)(jnp.arange(3.0)), jnp.arange(3.0) * 3)
    assert_same(jax.vmap(outer)(jnp.ones((2, 3))), jnp.full((2, 3), 3.0, jnp.float32))


def test_a_function_of_the_outside_world_traced_inside_and_outside():
    fast = optimize(lambda x: jnp.sin(x) * 2)
    inside = jax.jit(lambda x: fast(x))
    assert_same(inside(jnp.ones(3)), fast(jnp.ones(3)), 1e-6)
    assert_same(lax.map(fast, jnp.ones((2, 3))), jnp.sin(jnp.ones((2, 3))) * 2, 1e-6)


def test_disable_jit_runs_the_function_itself():
    seen = []

    def look(x):
        seen.append(type(x).__name__)
        return x + 1

    fast = optimize(look)
    fast(jnp.ones(2))
    with jax.disable_jit():
        assert_same(fast(jnp.ones(2)), jnp.full(2, 2.0, jnp.float32))
    assert "Tracer" in seen[0] and len(seen) == 2 and "Tracer" not in seen[1]


def test_symbolic_shapes():
    (rows,) = jax.export.symbolic_shape("rows")
    fast = optimize(lambda a, x: jax.nn.relu(x @ a) @ a.T)
    a = jnp.ones((4, 3))
    exported = jax.export.export(jax.jit(lambda a, x: fast(a, x)))(
        jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((rows, 4), jnp.float32)
    )
    for size in (1, 5):
        assert_same(exported.call(a, jnp.ones((size, 4))), jnp.full((size, 4), 12.0, jnp.float32))


# -- mutable arrays ---------------------------------------------------------------------------------------------------


def with_inner_ref(x):
    ref = jax.new_ref(x)
    ref[...] = ref[...] * 2
    ref[0] = 5.0
    return ref[...]


@pytest.mark.parametrize(
    "fun",
    [
        with_inner_ref,
        lambda x: jax.jit(with_inner_ref)(x) + 1,
        lambda x: lax.scan(lambda c, v: (c, with_inner_ref(x) * v), 0, x)[1],
        lambda x: lax.cond(x[0] > 1, with_inner_ref, lambda x: x, x),
    ],
)
def test_programs_with_refs_are_left_alone(fun):
    x = jnp.arange(3.0)
    want = jax.jit(fun)(x)
    fast = optimize(fun)
    assert_same(fast(x), want)
    assert not fast.program(x).optimized and "Refs" in fast.program(x).reason
    assert_same(jax.jit(fast)(x), want)


def test_refs_as_arguments_and_closed_over():
    ref = jax.new_ref(jnp.zeros(3))

    def add(target, x):
        target[...] = target[...] + x
        return target[0]

    fast = optimize(add)
    assert [float(fast(ref, 1.0)) for _ in range(3)] == [1.0, 2.0, 3.0]
    closed = optimize(lambda x: add(ref, x))
    assert [float(closed(1.0)) for _ in range(3)] == [4.0, 5.0, 6.0]
    assert float(jax.jit(lambda x: closed(x))(1.0)) == 7.0
    np.testing.assert_array_equal(ref[...], np.full(3, 7.0))


# -- errors -----------------------------------------------------------------------------------------------------------


class Mine(Exception):
    pass


def broken(x):
    raise Mine("from the user's line")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.grad, jax.vmap])
def test_exceptions_of_the_function_come_out_unchanged(wrap):
    with pytest.raises(Mine, match="from the user's line") as caught:
        wrap(optimize(broken))(jnp.ones(3))
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_a_failed_call_leaves_nothing_behind():
    ready = []

    def fun(x):
        if not ready:
            raise Mine
        return x + 1

    fast = optimize(fun)
    with pytest.raises(Mine):
        fast(1.0)
    ready.append(True)
    assert float(fast(1.0)) == 2.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: autoinfer.optimize(3), TypeError, "function or a callable module, not int"),
        (lambda: autoinfer.optimize(chain, numerics="exact"), ValueError, "'bitwise', 'reassociate', 'lossy'"),
        (lambda: autoinfer.optimize(chain, tune="fast"), ValueError, "'off', 'auto', 'full', or a number of seconds"),
        (lambda: autoinfer.optimize(chain, tune=True), ValueError, "tune=True"),
        (lambda: optimize(lambda x, n: x, static_argnums=1)(1.0, [1]), TypeError, "static argument 1 is a list"),
        (lambda: optimize(lambda x, n: x, static_argnames="n")(1.0, n={}), TypeError, "static argument 'n' is a dict"),
        (
            lambda: optimize(lambda x: x)({"a": {1, 2}}),
            TypeError,
            "holds a set, which is neither an array nor hashable",
        ),
        (lambda: optimize(lambda x, y: x)(1.0), TypeError, "missing 1 required positional argument: 'y'"),
        (lambda: optimize(lambda x: x)(1.0, z=2), TypeError, "unexpected keyword argument 'z'"),
        (lambda: optimize(lambda x: bool(x > 0))(1.0), jax.errors.TracerBoolConversionError, "Attempted boolean"),
        (lambda: optimize(chain)(jnp.ones(2), jnp.ones(3), 1.0), TypeError, "dot_general"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- looking ----------------------------------------------------------------------------------------------------------


def test_lower_and_trace_show_the_program_that_runs():
    fast = optimize(chain)
    args = chain_arguments()
    lowered = fast.lower(*args)
    assert_same(lowered.compile()(*args), fast(*args))
    assert lowered.cost_analysis()["flops"] < 0.5 * jax.jit(chain).lower(*args).cost_analysis()["flops"]
    products = [e for e in fast.trace(*args).jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [e.invars[1].aval.shape for e in products] == [(32,), (32,)]


def test_explain_says_what_happened():
    fast = optimize(chain)
    args = chain_arguments()
    told = fast.explain(*args)
    assert told.function == "chain" and told.verdict == "optimized" and told.numerics == "reassociate"
    assert told.tune == "off" and told.verification.passed is True
    assert told.after.flops < told.before.flops and told.before.equations == 2
    assert {rule.name: rule.fired for rule in told.rules}["matrix-chain"] == 1
    assert "matrix-chain" in str(told)


def test_explain_of_a_program_nothing_improves():
    told = optimize(lambda x: jnp.sin(x)).explain(jnp.ones(3))
    assert told.verdict == "original" and told.reason == "no rule improves it"
    assert not any(rule.fired for rule in told.rules)


def test_compare_hlo_shows_less_work():
    compared = optimize(chain).compare_hlo(*chain_arguments())
    text = str(compared)
    assert "dot" in text and compared.after.flops < compared.before.flops
