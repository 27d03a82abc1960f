"""Programs that one process settles and another loads: the same bits, the same explanations, or a compilation."""

import functools
import os
import shutil
import subprocess
import sys
import textwrap

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import _jax, autoinfer, judge, ready, settle
from jaxinfer.search import device, program_files
from jaxinfer.search.cache import default_cache
from jaxinfer.search.measure import PairedRatio

SIZE = 160


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / SIZE**0.5, jnp.float32)


A, B, C, BIAS, X = draw(0, SIZE, SIZE), draw(1, SIZE, SIZE), draw(2, SIZE, SIZE), draw(3, SIZE), draw(4, SIZE)


def network(a, b, c, bias, x, *, scale=2.0):
    """Two products of known matrices, which folding spares every call."""
    return {"y": jnp.tanh(a @ b @ c @ a @ b @ x + bias) * scale, "x": x * 2}


def by_hand(x=X, scale=2.0):
    a, b, c, bias, x = (np.asarray(v, np.float64) for v in (A, B, C, BIAS, x))
    return np.tanh(a @ b @ c @ a @ b @ x + bias) * scale


def frozen(fun=network, **options):
    return autoinfer.optimize(fun, tune=20.0, **options).freeze(A, B, C, BIAS)


def use(folder, monkeypatch):
    """Goes on with another cache folder, as a new process would."""
    default_cache().close()
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(folder))
    default_cache.cache_clear()


def rewritten_wins(monkeypatch, weights):
    """On a busy machine nothing is faster beyond doubt: here the plainly rewritten program always is."""
    monkeypatch.setattr(judge, "_WRITTEN_BYTES", {"passed": 0, "written in": 1 << 20}[weights])
    monkeypatch.setattr(judge, "time_candidates", lambda calls, budget_s, sample_s: list(range(len(calls))))
    monkeypatch.setattr(judge, "compare", lambda *_, **__: PairedRatio(0.5, 0.4, 0.6, 8, 2.0, 1.0))


@pytest.fixture(scope="module", params=["passed", "written in"])
def filled(tmp_path_factory, request):
    """A cache folder in which the network is settled, and the function that settled it.

    The weights of its program are passed to it, or written into it.
    """
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        rewritten_wins(patch, request.param)
        first = frozen()
        first(X)
        default_cache().close()
    default_cache.cache_clear()
    assert first.program(X).optimized and first.program(X).form.holds_weights == (request.param == "written in")
    return folder, first, request.param


@pytest.fixture
def first(filled):
    """The function that settled the network."""
    return filled[1]


@pytest.fixture(autouse=True)
def folder(filled, tmp_path, monkeypatch):
    """A copy of that folder for each test; where its compiled programs are."""
    shutil.copytree(filled[0], tmp_path / "cache")
    use(tmp_path / "cache", monkeypatch)
    rewritten_wins(monkeypatch, filled[2])
    yield tmp_path / "cache" / program_files.FOLDER_NAME
    default_cache().close()
    default_cache.cache_clear()


def settled(fun, *args, **options):
    """A function settled by a call here, as an earlier process would have left it."""
    fast = frozen(fun, **options)
    fast(*args)
    return fast


def is_loaded(function):
    return bool(function._recalled)


def forbid_compiling(monkeypatch):
    def compile_nothing(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_nothing)


def assert_same(have, want):
    jax.tree.map(np.testing.assert_array_equal, have, want)


# -- another process --------------------------------------------------------------------------------------------------

PROGRAM = """
    import sys
    import numpy as np
    import jax, jax.numpy as jnp
    from jaxinfer import autoinfer, judge
    from jaxinfer.search.measure import PairedRatio

    judge.time_candidates = lambda calls, budget_s, sample_s: list(range(len(calls)))
    judge.compare = lambda *_, **__: PairedRatio(0.5, 0.4, 0.6, 8, 2.0, 1.0)
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    depthwise, deep, x = draw(0, 3, 3, 1, 24), draw(1, 1, 1, 24, 8), draw(2, 1, 24, 24, 24)
    kernel, recurrent = draw(3, 24, 96) / 8, draw(4, 96, 96) / 16

    def fun(depthwise, deep, kernel, recurrent, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, depthwise, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=24)
        z = jax.nn.relu(jax.lax.conv_general_dilated(y, deep, (1, 1), "SAME", dimension_numbers=dims))
        step = lambda h, row: (jnp.tanh(row @ kernel + h @ recurrent), h.sum())
        return z, jax.lax.scan(step, jnp.zeros(96), y[0, 0])

    fast = autoinfer.optimize(fun, tune=20.0).freeze(depthwise, deep, kernel, recurrent)
    results = [np.asarray(r).tobytes().hex() for r in jax.tree.leaves(fast(x))]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    again = [np.asarray(r).tobytes().hex() for r in jax.tree.leaves(fast(x))]
    print("loaded", bool(fast._recalled))
    print("same again", again == results and not any("compile" in event for event in compiled))
    print("results", *results)
    told = fast.explain(x)
    print("verdict", told.verdict, told.verification.when, told.reason)
    print("graph", fast.graph(x).fingerprint)
"""


def run(folder):
    environment = {**os.environ, "JAXINFER_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_another_process_computes_the_same_bits(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert (first["loaded"], second["loaded"]) == ("False", "True")
    assert second["results"] == first["results"]
    assert second["graph"] == first["graph"]
    assert first["verdict"].startswith("optimized now") and second["verdict"].startswith("optimized earlier")
    assert first["same"] == second["same"] == "again True"


# -- calls of a loaded program ----------------------------------------------------------------------------------------


def test_nothing_is_compiled(first, monkeypatch):
    want = first(X)
    with monkeypatch.context() as patch:
        forbid_compiling(patch)
        second = frozen()
        have = second(X)
    assert is_loaded(second)
    assert_same(have, want)
    np.testing.assert_allclose(have["y"], by_hand(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [np.asarray(X), X * 3, [X] * 3])
def test_other_values_of_the_same_kind(other):
    second = frozen()
    for x in other if isinstance(other, list) else [X, other]:
        np.testing.assert_allclose(second(x)["y"], by_hand(x), rtol=1e-5, atol=1e-5)
    assert is_loaded(second)


def test_arguments_of_another_kind_are_settled_anew():
    second = frozen()
    second(X)
    np.testing.assert_allclose(second(X, scale=3.0)["y"], by_hand(scale=3.0), rtol=1e-5, atol=1e-5)
    assert_same(second(X), frozen()(X))


def doubled(a, b, c, bias, x, factor):
    return (a @ b @ c @ a @ b @ x + bias) * factor


def test_weak_types_are_kept_apart():
    """A Python number and an array of one element give results of other types."""
    settled(doubled, X.astype(jnp.bfloat16), 2.0)
    second = frozen(doubled)
    jitted = jax.jit(doubled)
    for factor in (2.0, np.float32(2), jnp.bfloat16(2), 2.0):
        have, want = second(X.astype(jnp.bfloat16), factor), jitted(A, B, C, BIAS, X.astype(jnp.bfloat16), factor)
        assert (have.dtype, have.weak_type) == (want.dtype, want.weak_type)


def test_results_are_committed_as_those_of_jit_are():
    second = frozen()
    bound = jax.device_put(X, jax.devices()[0])
    assert not second(X)["y"].committed
    assert second(bound)["y"].committed
    assert_same(second(bound), second(X))


def test_static_arguments():
    def power(a, b, c, bias, x, n):
        return (a @ b @ c @ a @ b @ x + bias) ** n

    options = {"static_argnums": 5}
    settled(power, X, 2, **options)
    second = frozen(power, **options)
    for n in (2, 3, 2):
        np.testing.assert_allclose(second(X, n), (np.arctanh(by_hand() / 2)) ** n, rtol=1e-3, atol=1e-4)
    assert is_loaded(second)


def test_modules():
    class Layer(equinox.Module):
        a: jax.Array
        b: jax.Array
        name: str

        def __call__(self, x):
            return self.a @ self.b @ self.a @ x

    layer = Layer(A, B, "layer")
    want = autoinfer.optimize(layer, tune=20.0).freeze()(X)
    second = autoinfer.optimize(layer, tune=20.0).freeze()
    assert_same(second(X), want)
    assert is_loaded(second._inner)


def test_functions_that_donate_are_compiled_here(folder):
    shutil.rmtree(folder)
    fast = frozen(donate_argnums=4)
    x = X + 0
    np.testing.assert_allclose(fast(x)["y"], by_hand(), rtol=1e-5, atol=1e-5)
    assert x.is_deleted() and not is_loaded(fast) and not folder.exists()


# -- everything that needs the graph ----------------------------------------------------------------------------------


def test_explanations_and_graphs(first):
    second = frozen()
    second(X)
    weights = second._recalled[next(iter(second._recalled))].run.weights
    assert second.graph(X).fingerprint == first.graph(X).fingerprint
    mine = second.program(X)
    assert mine.verified == "earlier" and mine.reason == first.program(X).reason
    if mine.form.holds_weights:
        assert not weights and mine.weights(mine.form)
    else:
        assert all(a is b for a, b in zip(mine.weights(mine.form), weights, strict=True)), "arrays are not there twice"
    assert [c.chosen for c in mine.improved.choices] == [c.chosen for c in first.program(X).improved.choices]
    assert any(product in second.lower(X).as_text() for product in ("dot_general", "jaxinfer_convolution"))
    assert str(second.compare_hlo(X))
    assert_same(second(X), first(X))


def test_derivatives_batches_and_nesting():
    second = frozen()
    second(X)
    assert is_loaded(second)
    have = jax.grad(lambda x: second(x)["y"].sum())(X)
    want = jax.grad(lambda x: network(A, B, C, BIAS, x)["y"].sum())(X)
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    rows = jnp.stack([X, 2 * X])
    np.testing.assert_allclose(jax.vmap(second)(rows)["y"][1], by_hand(2 * X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(second)(X)["y"], by_hand(), rtol=1e-5, atol=1e-5)


def test_as_a_pytree():
    second = frozen()
    second(X)
    zeroed = jax.tree.map(jnp.zeros_like, second)
    np.testing.assert_allclose(zeroed(X)["y"], np.zeros(SIZE), atol=1e-6)
    np.testing.assert_allclose(second(X)["y"], by_hand(), rtol=1e-5, atol=1e-5)


def test_release_original():
    second = frozen()
    want = second(X)
    assert is_loaded(second)
    second.release_original()
    assert_same(second(X), want)
    assert second.explain(X).verdict == "optimized"
    with pytest.raises(RuntimeError, match="release_original"):
        second(X.astype(jnp.float16))


def test_a_program_that_comes_out_otherwise_is_replaced(monkeypatch):
    second = frozen()
    second(X)
    with monkeypatch.context() as patch:
        patch.setattr(settle, "_find", lambda forms, stored: None)
        mine = second.program(X)
    assert mine.verified == "never" and "neither verified nor timed" in mine.reason
    assert not is_loaded(second)
    np.testing.assert_allclose(second(X)["y"], by_hand(), rtol=1e-5, atol=1e-5)


# -- what cannot be loaded --------------------------------------------------------------------------------------------


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda c: c[:-7], lambda c: c[:20], lambda c: b"", lambda c: b"x" * 9000])
def test_damaged_files_are_compiled_again(first, folder, damage):
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    second = frozen()
    assert_same(second(X), first(X))
    assert not is_loaded(second) and second.program(X).verified == "earlier"
    third = frozen()
    assert_same(third(X), first(X))
    assert is_loaded(third), "and it was kept again"


def test_another_program_s_file_is_not_taken(first, folder):
    (file,) = folder.iterdir()
    settled(doubled, X, jnp.float32(2))
    (other,) = set(folder.iterdir()) - {file}
    file.write_bytes(other.read_bytes())
    second = frozen()
    assert_same(second(X), first(X))
    assert not is_loaded(second)


@pytest.mark.parametrize("change", ["jaxlib", "processor", "source"])
def test_another_version_or_machine(folder, change, monkeypatch):
    monkeypatch.setattr(device, "measure_peaks", lambda _: device.default_peaks("cpu"))
    if change == "jaxlib":
        monkeypatch.setattr(device.jaxlib, "__version__", "0.0.0")
    elif change == "processor":
        monkeypatch.setattr(device, "_host", lambda: "another one")
    else:
        monkeypatch.setattr(ready, "_source_digest", lambda: "another one")
    second = frozen()
    np.testing.assert_allclose(second(X)["y"], by_hand(), rtol=1e-5, atol=1e-5)
    assert not is_loaded(second)
    assert len(list(folder.iterdir())) == 2


def test_code_that_the_backend_refuses(first, monkeypatch):

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("not for this device")

    monkeypatch.setattr(_jax, "Loaded", refuse)
    second = frozen()
    assert_same(second(X), first(X))
    assert not is_loaded(second) and second.program(X).verified == "earlier"


def test_a_platform_that_cannot_write_programs(first, folder, monkeypatch):
    monkeypatch.setattr(_jax, "serialize", lambda compiled: None)
    shutil.rmtree(folder)
    for _ in range(2):
        second = frozen()
        assert_same(second(X), first(X))
        assert not is_loaded(second) and not folder.exists()


def test_programs_that_call_libraries_are_compiled_here(folder):
    """LAPACK's kernels are found when a program is lowered, which a loaded one never is."""

    def solve(a, b, c, bias, x):
        return jnp.linalg.cholesky(jnp.eye(SIZE) * 9 + jnp.outer(x, x)) @ (a @ b @ c @ a @ b @ bias)

    shutil.rmtree(folder)
    mine, second = settled(solve, X), frozen(solve)
    assert_same(second(X), mine(X))
    assert mine.program(X).optimized and not is_loaded(second) and not folder.exists()


def test_serialized_programs_are_code_alone():
    def callback(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def printing(x):
        jax.debug.print("{}", x)
        return x

    for fun, kept in ((jnp.sin, True), (callback, False), (printing, False), (jnp.linalg.cholesky, False)):
        compiled = jax.jit(fun).lower(jnp.eye(3)).compile()
        assert (_jax.serialize(compiled) is not None) == kept


def test_programs_with_a_sort_are_kept(folder):
    """XLA cannot write a sort down once it has run."""

    def ordered(a, b, c, bias, x):
        return jnp.sort(a @ b @ c @ a @ b @ x + bias)

    shutil.rmtree(folder)
    mine, second = settled(ordered, X), frozen(ordered)
    assert_same(second(X), mine(X))
    assert mine.program(X).optimized and is_loaded(second)


def test_unused_arguments():
    fun = functools.partial(jax.jit, keep_unused=False)(lambda x, unused, y: [x * y, y])
    compiled = fun.lower(1.0, jnp.ones(3), X).compile()
    code, kept = _jax.serialize(compiled)
    assert kept == [0, 2]
    types = [_jax.abstract(v) for v in (1.0, jnp.ones(3), X)]
    loaded = _jax.Loaded("loaded", code, kept, types, [_jax.abstract(X)] * 2, jax.devices()[0], False)
    assert_same(loaded(2.0, jnp.ones(3), X), [2 * X, X])
