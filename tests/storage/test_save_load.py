"""Programs through files: the same bits, the same structure, the same rules about calls."""

import collections
import functools
import re
from pathlib import Path
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from jaxinfer import autoinfer, judge
from jaxinfer.quantization.scheme import Int8, Override
from jaxinfer.search.measure import PairedRatio
from jaxinfer.storage import StorageError

W = jnp.asarray(np.random.default_rng(0).normal(size=(12, 10)), jnp.float32)
V = jnp.asarray(np.random.default_rng(1).normal(size=(10, 9)), jnp.float32)
X = jnp.asarray(np.random.default_rng(2).normal(size=(2, 12)), jnp.float32)


class Out(NamedTuple):
    value: jax.Array
    extra: dict


def chain(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["scale"]


PARAMS = {"w": W, "v": V, "scale": jnp.float32(0.5)}


def optimize(fun, **options):
    return autoinfer.optimize(fun, tune="off", verify=False, **options)


@pytest.fixture
def through(tmp_path):
    """Saves a program and loads it."""

    def save_and_load(program, *examples, **options):
        autoinfer.save(program, tmp_path / "program", *examples, **options)
        return autoinfer.load(tmp_path / "program")

    return save_and_load


def assert_same(have, want):
    chex.assert_trees_all_equal_structs(have, want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


# -- what can be saved ------------------------------------------------------------------------------------------------


def test_a_frozen_function_that_was_called(through):
    frozen = optimize(chain).freeze(PARAMS)
    want = frozen(X)
    loaded = through(frozen)
    assert_same(loaded(X), want)
    assert loaded.calls == ["chain(f32[2,12]): rewritten"] or "as written" in loaded.calls[0]


def test_a_frozen_function_that_measures(through):
    """Whatever form won and whatever compiler options it runs with."""
    frozen = autoinfer.optimize(chain, tune=1.0).freeze(PARAMS)
    want = frozen(X)
    assert_same(through(frozen)(X), want)


def test_an_optimized_function_takes_its_weights_as_arguments(through):
    fast = optimize(chain)
    want = fast(PARAMS, X)
    loaded = through(fast)
    assert not loaded.arrays
    assert_same(loaded(PARAMS, X), want)


def test_a_function_with_parameters_is_stored_as_it_is(through):
    loaded = through((chain, PARAMS), X)
    assert sorted(loaded.arrays) == ["scale", "v", "w"]
    for name in PARAMS:
        assert_same(loaded.arrays[name], PARAMS[name])
    assert_same(loaded(X), jax.jit(chain)(PARAMS, X))


def test_closed_over_arrays_are_weights_and_no_literals(through):
    large = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3000)), jnp.float32)

    def closing(x):
        return jax.jit(lambda y: y @ large)(x) + large[0]

    for program in (closing, optimize(closing), optimize(lambda p, x: closing(x) * p).freeze(jnp.float32(1))):
        loaded = through(program, X)
        (name,) = loaded.arrays
        assert_same(loaded.arrays[name], large)
        assert_same(loaded(X), jax.jit(closing)(X))
        assert len(loaded._stored.entries[0].exported.mlir_module_serialized) < large.nbytes / 10


def test_examples_may_be_types(through):
    frozen = optimize(chain).freeze(PARAMS)
    loaded = through(frozen, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert_same(loaded(X), optimize(chain).freeze(PARAMS)(X))


def test_every_kind_of_call_is_kept_and_equal_arrays_once(through):
    frozen = optimize(chain).freeze(PARAMS)
    inputs = [X, X[:1], X.astype(jnp.bfloat16)]
    want = [frozen(x) for x in inputs]
    loaded = through(frozen)
    assert len(loaded.calls) == 3
    for x, y in zip(inputs, want):
        assert_same(loaded(x), y)
    assert len({np.asarray(a).tobytes() for a in loaded.arrays.values()}) == len(loaded.arrays)


def test_modules(through):
    module = eqx.nn.MLP(12, 3, 16, 2, key=jax.random.key(0))
    for program in (optimize(module), optimize(module).freeze()):
        want = program(X[0])
        assert_same(through(program)(X[0]), want)
    module = nnx.Sequential(nnx.Linear(12, 8, rngs=nnx.Rngs(0)), nnx.relu)
    for program in (optimize(module), optimize(module).freeze()):
        want = program(X)
        assert_same(through(program)(X), want)


def test_a_module_that_changes_its_state_is_refused(through):
    class Counter(nnx.Module):
        def __init__(self):
            self.count = nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.count[...] += 1
            return x + self.count[...]

    fast = optimize(Counter())
    fast(X)
    with pytest.raises(StorageError, match="changes the state of a module"):
        through(fast)


def test_static_arguments_are_part_of_the_call(through):
    def powers(x, n, mode="sum", flag=False):
        return (x**n).sum() if mode == "sum" and not flag else x**n

    fast = optimize(powers, static_argnums=1, static_argnames=("mode", "flag"))
    want = [fast(X, 2), fast(X, 3, mode="none"), fast(X, 2, flag=True)]
    loaded = through(fast)
    assert_same([loaded(X, 2), loaded(X, 3, mode="none"), loaded(X, 2, flag=True)], want)
    with pytest.raises(TypeError, match=r"powers\(f32\[2,12\], 1=3, mode='none'\)"):
        loaded(X, 4)


def test_structures_of_arguments_and_results(through):
    def structured(batch, *, scales=None, rest):
        x = batch["x"]
        return Out(x @ W, {"list": [x, None], "ordered": collections.OrderedDict(z=x + 1, a=rest[0])})

    call = ({"x": X, "y": (None, X[0])},), {"rest": [X[1]]}
    fast = optimize(structured)
    want = fast(*call[0], **call[1])
    loaded = through(fast)
    assert_same(loaded(*call[0], **call[1]), want)
    assert isinstance(loaded(*call[0], **call[1]), Out)
    with pytest.raises(TypeError, match="holds no program"):
        loaded({"x": X}, rest=[X[1]])


def test_arguments_of_another_kind_are_refused_by_name(through):
    loaded = through((chain, PARAMS), X)
    for other in (X[:1], X.astype(jnp.float16), X[0], (X, X)):
        with pytest.raises(TypeError, match=r"it has chain\(f32\[2,12\]\)"):
            loaded(other)
    assert loaded(X).shape == (2, 9)


# -- types ------------------------------------------------------------------------------------------------------------

DTYPES = "bool int4 uint4 int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64 float8_e4m3fn".split()


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e5m2"])
def test_weights_arguments_and_results_of_every_type(through, dtype):
    numbers = np.random.default_rng(0).integers(-8, 8, (3, 50))
    array = jnp.asarray(numbers if dtype[0] != "u" else numbers + 8).astype(dtype)

    def program(w, x):
        return w[:, ::-1], x[1:], jnp.concatenate([w, x], 1)

    loaded = through((program, array), array[:, :7])
    assert_same(loaded(array[:, :7]), jax.jit(program)(array, array[:, :7]))


def test_numbers_keep_their_weak_types(through):
    loaded = through(lambda x, y: (x + y, y * 2), X, 2.0)
    half, double = loaded(X, 3.0)
    want = jax.jit(lambda x, y: (x + y, y * 2))(X, 3.0)
    assert_same((half, double), want)
    assert double.weak_type and not half.weak_type


def test_random_keys(through):
    keys = jax.random.split(jax.random.key(7, impl="rbg"), 70)

    def program(known, key, x):
        return jax.random.normal(known[3], (4,)) + jax.random.uniform(key, (4,)), jax.random.split(key)

    key = jax.random.key(1)
    loaded = through((program, keys), key, X)
    have, want = loaded(key, X), jax.jit(program)(keys, key, X)
    assert_same(have[0], want[0])
    assert_same(jax.random.key_data(have[1]), jax.random.key_data(want[1]))
    assert jax.random.key_impl(loaded.arrays["params"]) == jax.random.key_impl(keys)


def test_64_bits_need_to_be_allowed(tmp_path):
    with jax.enable_x64(True):
        array = jnp.linspace(0, 1, 100, dtype=jnp.float64)
        autoinfer.save((lambda w, x: w.sum() + x, array), tmp_path / "wide", jnp.float64(1))
        assert_same(autoinfer.load(tmp_path / "wide")(jnp.float64(2)), jax.jit(lambda w: w.sum() + 2)(array))
    with pytest.raises(StorageError, match="jax_enable_x64"):
        autoinfer.load(tmp_path / "wide")


# -- symbolic sizes ---------------------------------------------------------------------------------------------------


def test_a_symbolic_batch_takes_any_size(through):
    loaded = through((chain, PARAMS), X, batch_axes=0)
    assert loaded.calls == ["chain(f32[2,12]): as written", "chain(f32[batch,12]): as written"]
    for size in (1, 2, 5):
        x = jnp.tile(X, (3, 1))[:size]
        assert_same(loaded(x), jax.jit(chain)(PARAMS, x))
    with pytest.raises(TypeError, match=r"f32\[batch,12\]"):
        loaded(X[:, :3])


def test_batch_axes_are_those_of_vmap(through):
    def program(table, pair, flag):
        return table @ pair["a"] + pair["b"].T.sum(), flag

    pair = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 5))}
    loaded = through(program, jnp.eye(3), pair, 1.0, batch_axes=(None, {"a": 1, "b": 0}, None))
    pair = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 5))}
    assert_same(loaded(jnp.eye(3), pair, 1.0), jax.jit(program)(jnp.eye(3), pair, 1.0))
    pair["b"] = jnp.ones((6, 5))
    with pytest.raises(ValueError, match="batch"):
        loaded(jnp.eye(3), pair, 1.0)


def test_symbolic_sizes_of_the_users_own(through):
    a, b = export.symbolic_shape("a, b")
    loaded = through(lambda x: x.reshape(-1) * 2, jax.ShapeDtypeStruct((a, 2 * b), jnp.float32))
    assert_same(loaded(X), X.reshape(-1) * 2)


@pytest.mark.parametrize(
    ("examples", "axes", "message"),
    [
        ((), 0, "goes with positional examples"),
        ((X, X), (0,), "no prefix"),
        ((X,), 3, "axis 3 of an argument of shape"),
        ((X,), {"a": 0}, "no prefix"),
    ],
)
def test_batch_axes_that_do_not_fit_are_refused(through, examples, axes, message):
    with pytest.raises(StorageError, match=message):
        through(lambda *a: a[0], *examples, batch_axes=axes)


# -- how a loaded program behaves -------------------------------------------------------------------------------------


def test_arrays_are_read_when_they_are_used(through, monkeypatch):
    loaded = through((chain, PARAMS), X)
    read = []
    original = type(loaded._stored.container).read
    monkeypatch.setattr(type(loaded._stored.container), "read", lambda self, n: read.append(n) or original(self, n))
    assert loaded.arrays["w"].shape == (12, 10) and read == ["w"]
    loaded(X)
    loaded(X)
    assert sorted(read) == ["autoinfer.program.0", "scale", "v", "w"]


def test_it_composes(through):
    loaded = through((chain, PARAMS), X, vjp_order=2)
    fun = functools.partial(chain, PARAMS)
    assert_same(jax.jit(lambda x: loaded(x) * 2)(X), jax.jit(lambda x: fun(x) * 2)(X))
    loss = lambda f: lambda x: (f(x) ** 2).sum()  # noqa: E731
    chex.assert_trees_all_close(jax.grad(loss(loaded))(X), jax.grad(loss(fun))(X), rtol=1e-5)
    twice = lambda f: jax.grad(lambda x: (jax.grad(loss(f))(x) ** 2).sum())  # noqa: E731
    chex.assert_trees_all_close(twice(loaded)(X), twice(fun)(X), rtol=1e-4)
    with jax.disable_jit():
        chex.assert_trees_all_close(loaded(X), fun(X), rtol=1e-6)


def test_as_an_argument_its_weights_are_leaves(through):
    loaded = through((chain, PARAMS), X)
    assert len(jax.tree.leaves(loaded)) == 3
    doubled = jax.tree.map(lambda w: 2 * w, loaded)
    want = jax.jit(chain)(jax.tree.map(lambda w: 2 * w, PARAMS), X)
    assert_same(jax.jit(lambda f, x: f(x))(doubled, X), want)
    assert_same(loaded(X), jax.jit(chain)(PARAMS, X))


def test_what_was_loaded_can_be_saved_again(through, tmp_path):
    loaded = through((chain, PARAMS), X)
    autoinfer.save(loaded, tmp_path / "again", X)
    again = autoinfer.load(tmp_path / "again")
    assert_same(again(X), loaded(X))
    assert len(again.arrays) >= 2


def test_each_platform_gets_a_program_of_its_own(tmp_path):
    frozen = optimize(chain).freeze(PARAMS)
    want = frozen(X)
    autoinfer.save(frozen, tmp_path / "many", platforms=("tpu", "cuda", "cpu"))
    loaded = autoinfer.load(tmp_path / "many")
    assert_same(loaded(X), want)
    entries = loaded._stored.container.content["entries"]
    assert [entry["platform"] for entry in entries] == ["tpu", "cuda", "cpu"]
    autoinfer.save(frozen, tmp_path / "elsewhere", platforms=["tpu"])
    with pytest.raises(StorageError, match="holds programs for tpu, and JAX runs on cpu"):
        autoinfer.load(tmp_path / "elsewhere")


def test_every_platforms_program_is_for_that_platform(tmp_path, monkeypatch):
    from jaxinfer.storage import loading

    autoinfer.save(optimize(chain).freeze(PARAMS), tmp_path / "many", X, platforms=("cuda", "tpu"))
    for platform in ("cuda", "tpu"):
        monkeypatch.setattr(loading, "platform_now", lambda p=platform: p)
        (entry,) = autoinfer.load(tmp_path / "many")._stored.entries
        assert entry.exported.platforms == (platform,)


def test_released_weights_are_missed_only_where_they_are_needed(tmp_path):
    frozen = optimize(lambda a, b, x: x @ (a @ b)).freeze(W, V)
    want = frozen(X)
    frozen.release_original()
    autoinfer.save(frozen, tmp_path / "here")
    assert_same(autoinfer.load(tmp_path / "here")(X), want)
    with pytest.raises(StorageError, match=r"save before release_original"):
        autoinfer.save(frozen, tmp_path / "there", platforms=["tpu"])


def test_the_manifest_tells_scheme_and_versions(through):
    fun = lambda p, x: chain(p, x)  # noqa: E731
    fun.scheme = {"weights": "int8", "per": ("channel", 0)}
    loaded = through((fun, PARAMS), X)
    assert loaded.scheme == {"weights": "int8", "per": ["channel", 0]}
    assert loaded.versions["jax"] == jax.__version__
    assert through((fun, PARAMS), X, scheme="mine").scheme == "mine"
    scheme = through((fun, PARAMS), X, scheme=Int8(overrides=[Override(re.compile("bias.*"))])).scheme
    assert scheme["kind"] == "Scheme" and scheme["weights"]["number"] == "int8"
    assert scheme["overrides"] == [{"kind": "Override", "match": "re.compile('bias.*')", "scheme": None}]
    assert through((chain, PARAMS), X).scheme is None


def test_compiler_options_unknown_here_are_told(through, monkeypatch):
    frozen = optimize(chain).freeze(PARAMS)
    frozen(X)
    loaded = through(frozen)
    loaded._stored.entries[0]._compiler = {"xla_option_of_another_release": "1"}
    with pytest.warns(UserWarning, match="does not know .*xla_option_of_another_release"):
        loaded(X)


def test_programs_say_nothing_about_the_folders_they_come_from(through):
    loaded = through((chain, PARAMS), X, vjp_order=1)
    code = loaded._stored.entries[0].exported
    for module in (code.mlir_module_serialized, code.vjp().mlir_module_serialized):
        assert str(Path(__file__).parent).encode() not in module
        assert str(Path(autoinfer.__file__).parent).encode() not in module


# -- what cannot be saved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "examples", "message"),
    [
        (chain, (), "was not called yet"),
        (optimize(chain), (), "was not called yet"),
        ((chain, PARAMS), (), "was not called yet"),
        (3, (X,), "type int is no program"),
        ((chain, {**PARAMS, "name": "x"}), (X,), "params hold 'x'"),
        ((chain, jax.eval_shape(lambda: PARAMS)), (X,), "type of an array without its numbers"),
        (lambda x: x, ("text",), "function of arrays"),
        (lambda x: jax.pure_callback(np.sin, x, x), (X,), "cannot be stored for cpu"),
        (optimize(lambda x, n: x * len(n.__name__), static_argnums=1), (X, collections.Counter), r"functools\.partial"),
        (optimize(jax.nn.relu), (X,), "derivatives of its own"),
    ],
)
def test_refusals(through, tmp_path, program, examples, message):
    with pytest.raises(StorageError, match=message):
        through(program, *examples, vjp_order=1)
    assert not list(tmp_path.iterdir())


def test_unknown_platforms_are_refused(through):
    for platforms in (["gpu"], "cpu", []):
        with pytest.raises(StorageError, match="'cuda'"):
            through((chain, PARAMS), X, platforms=platforms)


def test_nothing_is_pickled(tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    autoinfer.save((chain, PARAMS), tmp_path / "program", X)
    assert autoinfer.load(tmp_path / "program")(X).shape == (2, 9)


def test_weights_written_in_are_written_in_again(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "time_candidates", lambda calls, budget_s, sample_s: list(range(len(calls))))
    monkeypatch.setattr(judge, "compare", lambda *_, **__: PairedRatio(0.5, 0.4, 0.6, 8, 2.0, 1.0))
    w, x = jnp.sin(jnp.arange(900.0)).reshape(30, 30), jnp.cos(jnp.arange(30.0))
    fast = autoinfer.optimize(lambda w, x: jnp.tanh(w @ w @ x), tune=5.0).freeze(w)
    want = fast(x)
    assert fast.program(x).form.holds_weights
    autoinfer.save(fast, tmp_path / "p")
    loaded = autoinfer.load(tmp_path / "p")
    assert loaded.calls[0].endswith("weights written in")
    np.testing.assert_array_equal(loaded(x), want)
    np.testing.assert_array_equal(loaded(x), want)
    # As an argument of another program, and where others take their place, its weights are arrays like any other.
    np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(loaded, x), want, rtol=1e-6)
    twice = jax.tree.map(lambda a: 2 * a, loaded)
    np.testing.assert_allclose(twice(x), jnp.tanh(2 * (w @ w) @ x), rtol=1e-5)
