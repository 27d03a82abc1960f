"""Frozen arguments: folded once, held as a pytree, carried as arrays and never as literals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer

# More than 64 columns: smaller arrays are written into the program.
ROWS, HIDDEN, OUT = 16, 96, 80


def optimize(fun, **options):
    return autoinfer.optimize(fun, tune="off", **options)


def layer(params, x, *, scale=1.0):
    """A dense layer whose scale can be folded into its kernel."""
    return jnp.tanh(x @ params["kernel"] * params["scale"] + params["bias"]) * scale


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(HIDDEN, OUT)) / 8, jnp.float32),
        "scale": jnp.asarray(rng.uniform(1, 2, OUT), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=OUT), jnp.float32),
    }


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, HIDDEN)), jnp.float32)


def assert_close(have, want):
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=3e-5)


def literals(text):
    """The longest literal in a lowered program, in characters."""
    return max((len(line) for line in text.splitlines() if "stablehlo.constant" in line), default=0)


# -- binding ----------------------------------------------------------------------------------------------------------


def test_leading_positional_arguments(params, x):
    frozen = optimize(layer).freeze(params)
    assert_close(frozen(x), layer(params, x))
    assert_close(frozen(x, scale=2.0), layer(params, x, scale=2.0))
    assert frozen.program(x).optimized
    assert frozen.graph(x).count("mul") == 0, "the scale is folded into the kernel"


def test_keyword_arguments(params, x):
    frozen = optimize(lambda x, *, params: layer(params, x)).freeze(params=params)
    assert_close(frozen(x), layer(params, x))
    assert_close(optimize(layer).freeze(params, scale=3.0)(x), layer(params, x, scale=3.0))


def test_freezing_twice(params, x):
    def blocks(first, second, x):
        return layer(second, jnp.pad(layer(first, x), ((0, 0), (0, HIDDEN - OUT))))

    other = jax.tree.map(lambda leaf: leaf * 0.5, params)
    once, twice = optimize(blocks).freeze(params, other), optimize(blocks).freeze(params).freeze(other)
    assert_close(twice(x), blocks(params, other, x))
    assert_close(once(x), twice(x))
    by_name = optimize(layer).freeze(params).freeze(scale=2.0)
    assert_close(by_name(x), layer(params, x, scale=2.0))


def test_freezing_a_call_again_gives_other_weights_their_own_program(params, x):
    base = optimize(layer)
    double = jax.tree.map(lambda leaf: leaf * 2, params)
    first, second = base.freeze(params), base.freeze(double)
    assert_close(first(x), layer(params, x))
    assert_close(second(x), layer(double, x))
    assert_close(first(x), layer(params, x))
    assert_close(base(params, x), layer(params, x))


def test_static_and_donated_arguments_behind_frozen_ones(params, x):
    def call(params, mode, x):
        return x + jnp.pad(layer(params, x), ((0, 0), (0, HIDDEN - OUT))) if mode == "layer" else x * 2.0

    frozen = autoinfer.optimize(call, tune="off", static_argnums=1, donate_argnums=2).freeze(params)
    want = call(params, "layer", x)
    for _ in range(2):
        moving = jnp.array(x)
        assert_close(frozen("layer", moving), want)
        assert moving.is_deleted()
    assert_close(frozen("other", jnp.array(x)), x * 2)
    same = autoinfer.optimize(lambda p, x: x + p, tune="off", donate_argnums=1).freeze(jnp.ones(4))
    for _ in range(2):
        moving = jnp.arange(4.0)
        assert_close(same(moving), jnp.arange(4.0) + 1)
        assert moving.is_deleted()


def test_everything_frozen(params, x):
    assert_close(optimize(layer).freeze(params, x)(), layer(params, x))


def test_numpy_and_scalar_weights(x):
    def fun(w, scale, x):
        return x @ w * scale

    w = np.full((HIDDEN, OUT), 0.1, np.float32)
    assert_close(optimize(fun).freeze(w, 2.0)(x), x @ w * 2)
    assert optimize(fun).freeze(w, 2.0)(x).dtype == jnp.float32


def test_random_keys_as_weights(x):
    def noisy(key, x):
        return x + jax.random.normal(key, x.shape)

    assert_close(optimize(noisy).freeze(jax.random.key(3))(x), noisy(jax.random.key(3), x))


def test_a_method_with_frozen_arguments(params, x):
    class Model:
        @autoinfer.optimize(tune="off")
        def __call__(self, params, x):
            return layer(params, x)

    class Named:
        @autoinfer.optimize(tune="off")
        def run(self, params, x):
            return layer(params, x)

    assert_close(Named().run.freeze(params)(x), layer(params, x))


# -- transformations --------------------------------------------------------------------------------------------------


def test_gradient_and_batch_of_a_frozen_function(params, x):
    frozen = optimize(layer).freeze(params)
    for _ in range(2):
        have = jax.grad(lambda v: jnp.sum(frozen(v)))(x)
        assert_close(have, jax.grad(lambda v: jnp.sum(layer(params, v)))(x))
        assert_close(jax.vmap(frozen)(x), layer(params, x))
        assert_close(jax.jit(frozen)(x), layer(params, x))
        frozen(x)


def test_gradient_in_the_weights_of_a_frozen_pytree(params, x):
    """Its leaves are folded weights: a function of them like any other."""
    frozen = optimize(layer).freeze(params)
    frozen(x)
    gradient = jax.grad(lambda f: jnp.sum(f(x)))(frozen)
    assert type(gradient) is type(frozen)
    leaves = jax.tree.leaves(gradient)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in jax.tree.leaves(frozen)]
    # The bias is a leaf in either form, and its derivative the sum over rows of 1 - tanh².
    want = jnp.sum(1 - layer(params, x) ** 2, 0)
    assert any(leaf.size == OUT and np.allclose(leaf.ravel(), want, atol=1e-4) for leaf in leaves)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))


def quantized(params, x):
    return jnp.sum(straight_through(x @ params["kernel"] * params["scale"]) ** 2)


TRANSFORMATIONS = {
    "grad": jax.grad,
    "vmap": jax.vmap,
    "vmap of grad": lambda f: jax.vmap(jax.grad(f)),
    "grad of vmap": lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(f)(x))),
    "grad of vmap of vmap": lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(jax.vmap(f))(x[:, None]))),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_derivatives_that_the_user_chose_survive_folding(name, params, x):
    frozen = optimize(quantized).freeze(params)
    assert_close(frozen(x), quantized(params, x))
    assert frozen.program(x[0]).optimized
    transform = TRANSFORMATIONS[name]
    want = transform(functools.partial(quantized, params))(x)
    for have in (transform(frozen)(x), jax.jit(transform(frozen))(x)):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


def test_derivatives_that_folded_weights_do_not_know_are_refused(params, x):
    frozen = optimize(quantized).freeze(params)
    frozen(x)
    with pytest.raises(TypeError, match="quantized defines derivatives of its own"):
        jax.jit(lambda f, x: jax.grad(f)(x))(frozen, x)
    assert_close(jax.jit(lambda f, x: jax.vmap(f)(x[None]))(frozen, x)[0], quantized(params, x))
    frozen.release_original()
    with pytest.raises(TypeError, match="release_original"):
        jax.grad(frozen)(x)
    assert_close(jax.jit(frozen)(x), quantized(params, x))


def test_batches_of_a_frozen_function_use_its_folded_weights(params, x):
    frozen = optimize(layer).freeze(params)
    row = frozen(x[0])
    text = jax.jit(jax.vmap(frozen)).lower(x).as_text()
    assert "stablehlo.multiply" not in text, "the scale is in the kernel"
    assert_close(jax.vmap(frozen)(x)[0], row)


def test_repeated_derivatives_and_batches_do_not_compile_again(params, x):
    frozen, plain = optimize(layer).freeze(params), optimize(layer)
    frozen(x)
    plain(params, x)
    row = jnp.ones(HIDDEN)
    frozen(row)
    calls = [
        lambda: jax.grad(lambda v: frozen(v).sum())(x),
        lambda: jax.vmap(frozen)(x),
        lambda: jax.grad(lambda p: plain(p, x).sum())(params),
        lambda: jax.vmap(plain, (None, 0))(params, x),
    ]
    for call in calls:
        call()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        note := lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    try:
        for call in calls:
            call()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


# -- as a pytree ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [False, True], ids=["before the first call", "after it"])
def test_weights_travel_as_arguments_of_an_outer_jit(params, x, settled):
    frozen = optimize(layer).freeze(params)
    if settled:
        frozen(x)
    outer = jax.jit(lambda f, x: f(x) + 1)
    assert_close(outer(frozen, x), layer(params, x) + 1)
    assert literals(outer.lower(frozen, x).as_text()) < 200
    assert outer._cache_size() == 1
    outer(frozen, x)
    assert outer._cache_size() == 1


def test_leaves_are_the_folded_weights(params, x):
    frozen = optimize(layer).freeze(params)
    frozen(x)
    leaves = jax.tree.leaves(frozen)
    assert sorted(leaf.size for leaf in leaves) == [OUT, HIDDEN * OUT]
    folded = next(leaf for leaf in leaves if leaf.size == HIDDEN * OUT).reshape(HIDDEN, OUT)
    assert_close(folded, params["kernel"] * params["scale"])


def test_rebuilt_from_other_leaves(params, x):
    frozen = optimize(layer).freeze(params)
    frozen(x)
    zero = jax.tree.map(jnp.zeros_like, frozen)
    assert_close(zero(x), jnp.zeros((ROWS, OUT)))
    assert_close(frozen(x), layer(params, x))
    leaves, structure = jax.tree.flatten(frozen)
    assert_close(jax.tree.unflatten(structure, leaves)(x), layer(params, x))
    assert jax.tree.structure(frozen) == jax.tree.structure(zero)


def test_lowered_text_has_no_large_literals(params, x):
    frozen = optimize(layer).freeze(params)
    assert literals(frozen.lower(x).as_text()) < 200
    assert str(frozen.lower(x).as_text()).count(f"tensor<{HIDDEN}x{OUT}xf32>") >= 1


def test_exported_and_called_elsewhere(params, x):
    frozen = optimize(layer).freeze(params)
    frozen(x)
    leaves, structure = jax.tree.flatten(frozen)
    exported = jax.export.export(jax.jit(lambda leaves, x: jax.tree.unflatten(structure, leaves)(x)))(leaves, x)
    assert literals(exported.mlir_module()) < 200
    assert_close(jax.jit(exported.call)(leaves, x), layer(params, x))


# -- the original weights ---------------------------------------------------------------------------------------------


def test_originals_are_held_by_reference_and_let_go(params, x):
    import gc
    import weakref

    want = layer(params, x)
    kernel = jnp.array(params["kernel"])
    gone = weakref.ref(kernel)
    frozen = optimize(layer).freeze({**params, "kernel": kernel})
    frozen(x)
    del kernel
    gc.collect()
    assert gone() is not None
    frozen.release_original()
    gc.collect()
    assert gone() is None
    assert_close(frozen(x), want)
    with pytest.raises(RuntimeError, match=r"layer was called with arguments of a new kind after release_original\(\)"):
        frozen(x[:2])
    assert_close(frozen(x), want)


def test_explain_after_release(params, x):
    frozen = optimize(layer).freeze(params)
    frozen(x)
    frozen.release_original()
    told = frozen.explain(x)
    assert told.verdict == "optimized" and "layer" in str(told)
    assert_close(jax.jit(frozen)(x), layer(params, x))


def test_releasing_a_program_that_runs_as_written_keeps_it_running(x):
    frozen = optimize(lambda w, x: jnp.sin(x) @ w).freeze(jnp.eye(HIDDEN))
    assert not frozen.program(x).optimized
    assert_close(frozen(x), jnp.sin(x))
    frozen.release_original()
    assert_close(frozen(x), jnp.sin(x))
    assert_close(frozen(x[:2]), jnp.sin(x[:2]))


def test_explain_counts_the_weights(params, x):
    told = optimize(layer).freeze(params).explain(x)
    size = 4 * (HIDDEN * OUT + OUT)
    assert (told.weights.folded, told.weights.folded_bytes) == (2, size)
    assert told.weights.resident_folded_bytes == size
    assert told.weights.resident_original_bytes == size + 4 * OUT


def test_a_second_call_neither_traces_nor_compiles(params, x):
    count = 0

    def counted(params, x):
        nonlocal count
        count += 1
        return layer(params, x)

    frozen = optimize(counted).freeze(params)
    frozen(x)
    first = count
    compiled = functools.partial(len, frozen._runs)
    for _ in range(3):
        frozen(x)
    assert count == first == 1 and compiled() == 1
