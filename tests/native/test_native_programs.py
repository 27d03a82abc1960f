"""Optimized programs with kernels: run here, exported, stored, and read where there are none."""

import importlib
import os
import subprocess
import sys
import textwrap
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_convolution import random
from jax import export, lax

from jaxinfer import autoinfer, judge
from jaxinfer.analysis.kernels import uses_kernels
from jaxinfer.graph import trace
from jaxinfer.pipeline import Settings
from jaxinfer.rewrites import RULES as REGISTERED
from jaxinfer.rewrites import native_kernels
from jaxinfer.rewriting import Rewriter
from jaxinfer.search import choose as choosing
from jaxinfer.search.cache import default_cache
from jaxinfer.search.device import default_peaks
from jaxinfer.search.measure import PairedRatio
from jaxinfer.storage import loading

pytestmark = pytest.mark.usefixtures("kernels")
PLATFORMS = ("cpu", "cuda", "tpu")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
X = random(2, 20, 20, 3)
WEIGHTS = {
    "stem": random(3, 3, 3, 24) / 5,
    "deep": random(3, 3, 1, 24) / 3,
    "mix": random(1, 1, 24, 24) / 5,
    "bias": random(3, 24),
    "last": random(24, 700) / 5,
}


def network(p, x):
    """A small convolutional network: one layer of each kind, and one that is added to what came before."""

    def conv(x, w, stride=1, groups=1):
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=DIMENSIONS, feature_group_count=groups
        )

    y = jnp.clip(conv(x, p["stem"], 2) + p["bias"][0], 0, 6)
    z = jnp.clip(conv(y, p["deep"], groups=24) + p["bias"][1], 0, 6)
    z = y + (conv(z, p["mix"]) + p["bias"][2])
    return z.mean((1, 2)) @ p["last"]


def exactly(x=X):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (WEIGHTS, x))
        return np.asarray(jax.jit(network)(*wide))


def assert_right(have, x=X):
    want = exactly(x)
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module")
def fast(kernels, tmp_path_factory):
    """The network as a frozen function that was called, with kernels wherever there are some.

    What a busy machine would measure is left to chance: here kernels always win.
    """
    with pytest.MonkeyPatch.context() as patch:
        default_cache().close()
        patch.setenv("JAXINFER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        default_cache.cache_clear()
        patch.setattr(choosing, "time_candidates", lambda calls, **_: [1.0 / (1 + i) for i in range(len(calls))])
        patch.setattr(judge, "time_candidates", lambda calls, **_: list(range(len(calls))))
        patch.setattr(judge, "compare", lambda *_, **__: PairedRatio(0.5, 0.4, 0.6, 8, 2.0, 1.0))
        patch.setattr(judge, "_WRITTEN_BYTES", 0)
        function = autoinfer.optimize(network, tune=30.0, rules=native_kernels.RULES).freeze(WEIGHTS)
        function(X)
        default_cache().close()
    default_cache.cache_clear()
    return function


def test_kernels_are_used_and_right(fast):
    assert_right(fast(X))
    program = fast.program(X)
    assert program.optimized and uses_kernels(program.form.graph)
    kinds = [n.op for n in program.form.graph.walk() if n.op.endswith("_convolution")]
    assert sorted(kinds) == ["depthwise_convolution", *["packed_convolution"] * 3]
    assert fast.lower(X).as_text().count("custom_call @jaxinfer_") == 4
    chosen = {choice.chosen for choice in program.improved.choices}
    assert {"packed-convolution", "depthwise-kernel", "packed-product"} <= chosen


def test_derivatives_and_batches(fast):
    def slope(function, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))(x)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (WEIGHTS, X))
        want = np.asarray(slope(lambda x: network(wide[0], x), wide[1]))
    np.testing.assert_allclose(slope(fast, X), want, rtol=0, atol=1e-4 * np.abs(want).max())
    for x, y in zip((X, 2 * X), jax.jit(jax.vmap(fast))(np.stack([X, 2 * X])), strict=True):
        assert_right(y, x)


def test_what_is_exported_holds_no_kernel(fast):
    for function, args in (
        (lambda x: fast(x), (X,)),
        (lambda f, x: f(x), (fast, X)),
        (jax.vmap(fast), (X[None],)),
        (jax.grad(lambda x: fast(x).sum()), (X,)),
    ):
        whole = export.export(jax.jit(function), platforms=PLATFORMS)(*args)
        assert "jaxinfer_" not in whole.mlir_module() and "stablehlo.convolution" in whole.mlir_module()
    whole = export.export(jax.jit(lambda x: fast(x)))(X)
    assert_right(jax.jit(export.deserialize(whole.serialize()).call)(X))


# -- stored -----------------------------------------------------------------------------------------------------------


def stored_programs(path, entry):
    """The programs of a stored one's entry, as text, by what they are for."""
    content = autoinfer.load(path)._stored.container
    names = {key: entry[key] for key in ("program", "kernel_program") if key in entry}
    found = {key: zlib.decompress(content.read(name).tobytes()) for key, name in names.items()}
    return {key: export.deserialize(bytearray(code)).mlir_module() for key, code in found.items()}


@pytest.fixture
def path(fast, tmp_path):
    autoinfer.save(fast, tmp_path / "program")
    return tmp_path / "program"


def test_loaded_it_computes_the_same_bits(fast, path):
    np.testing.assert_array_equal(autoinfer.load(path)(X), fast(X))


def test_it_is_stored_with_kernels_and_without(path):
    (entry,) = autoinfer.load(path)._stored.container.content["entries"]
    text = stored_programs(path, entry)
    assert "jaxinfer_" not in text["program"] and "stablehlo.convolution" in text["program"]
    assert text["kernel_program"].count("custom_call @jaxinfer_") == 4


@pytest.mark.parametrize("why", ["no library", "panels of another width"])
def test_it_is_loaded_where_these_kernels_are_not(why, fast, path, kernels, monkeypatch):
    other = None if why == "no library" else type(kernels)(panel=kernels.panel // 2, digest="another")
    monkeypatch.setattr(loading, "library", lambda: other)
    loaded = autoinfer.load(path)
    (stored,) = loaded._stored.entries
    assert "jaxinfer_" not in stored.exported.mlir_module()
    if other is None:
        module = importlib.import_module("jaxinfer.native.library")
        monkeypatch.setattr(module, "_loaded", lambda: (None, why))
    assert_right(loaded(X))


def test_other_platforms_are_stored_without_kernels(fast, tmp_path, monkeypatch):
    autoinfer.save(fast, tmp_path / "many", platforms=PLATFORMS)
    for entry in autoinfer.load(tmp_path / "many")._stored.container.content["entries"]:
        text = stored_programs(tmp_path / "many", entry)
        assert ("kernel_program" in text) == (entry["platform"] == "cpu")
        assert "jaxinfer_" not in text["program"]


def test_a_loaded_program_composes(fast, path):
    loaded = autoinfer.load(path)
    assert_right(jax.jit(lambda x: loaded(x) * 1)(X))
    zeroed = jax.tree.map(jnp.zeros_like, loaded)
    np.testing.assert_array_equal(zeroed(X), np.zeros((2, 700)))


def test_a_loaded_program_is_exported_without_kernels(path):
    loaded = autoinfer.load(path)
    loaded(X)
    whole = export.export(jax.jit(lambda x: loaded(x)))(X)
    assert "jaxinfer_" not in whole.mlir_module()


def test_a_loaded_program_is_stored_without_kernels_too(path):
    again = path.with_name("again")
    autoinfer.save(autoinfer.load(path), again, X)
    (entry,) = autoinfer.load(again)._stored.container.content["entries"]
    assert "jaxinfer_" not in stored_programs(again, entry)["program"]
    assert_right(autoinfer.load(again)(X))


# -- the rules among the others ---------------------------------------------------------------------------------------


def test_these_rules_are_native():
    native = {r.name for r in REGISTERED if r.native}
    assert {r.name for r in native_kernels.RULES} <= native
    assert all(r.platforms == {"cpu"} for r in REGISTERED if r.native)


def test_portable_settings_leave_them_out():
    for settings in (Settings(), Settings(rules=REGISTERED), Settings(rules=native_kernels.RULES)):
        portable = settings.portable()
        assert any(r.native for r in settings.active_rules("cpu"))
        assert not any(r.native for r in portable.active_rules("cpu"))
        assert portable.rules == tuple(r for r in (settings.rules or portable.rules) if not r.native)
    assert not any(r.native for r in Settings().active_rules("tpu"))


def test_where_nothing_is_measured_they_are_left_out():
    assert not any(r.native for r in Settings(tune="off").active_rules("cpu"))
    told = autoinfer.optimize(network, tune="off").freeze(WEIGHTS).explain(X)
    assert {r.declined_reason for r in told.rules if r.name == "packed-product"} == {
        "kernels are chosen by measurement only"
    }


# -- processes with one cache folder ----------------------------------------------------------------------------------

PROGRAM = """
    import jax.numpy as jnp
    import numpy as np
    from jaxinfer import autoinfer, judge, native
    from jaxinfer.rewrites import native_kernels
    from jaxinfer.search import choose
    from jaxinfer.search.measure import PairedRatio

    choose.time_candidates = lambda calls, **_: [1.0 / (1 + i) for i in range(len(calls))]
    judge.time_candidates = lambda calls, **_: list(range(len(calls)))
    judge.compare = lambda *_, **__: PairedRatio(0.5, 0.4, 0.6, 8, 2.0, 1.0)
    a, x = np.random.default_rng(0).normal(size=(2, 200, 200)).astype(np.float32)
    fast = autoinfer.optimize(lambda a, x: jnp.maximum(x @ a @ a.T, 0), tune=9.0).freeze(a)
    wide = a.astype(np.float64)
    np.testing.assert_allclose(fast(x), np.maximum(x @ wide @ wide.T, 0), rtol=0, atol=1e-2)
    print(bool(native.library()), bool(fast._recalled), "jaxinfer_" in fast.lower(x).as_text())
"""


def process(folder, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM)],
        env={**os.environ, "JAXINFER_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu", **environment},
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    return [word == "True" for word in done.stdout.split()]


@pytest.mark.slow
def test_what_was_settled_with_kernels_is_not_run_without(tmp_path):
    """Nor the other way round; each finds again what its like has settled."""
    for found_before in (False, True):
        assert process(tmp_path) == [True, found_before, True]
        assert process(tmp_path, JAXINFER_NATIVE="off") == [False, found_before, False]


def test_what_was_not_timed_is_no_kernel():
    """Estimates say nothing of this machine's kernels, loops among them."""

    def loop(w, xs):
        return lax.scan(lambda h, x: (jnp.tanh(h @ w + x), h), xs[0], xs)

    w, xs = random(64, 64) / 8, random(9, 1, 64)
    for function, known, x in ((network, WEIGHTS, X), (loop, w, xs)):
        graph = trace(jax.make_jaxpr(lambda x, f=function, k=known: f(k, x))(x))
        rewriter = Rewriter(r for r in REGISTERED if r.native)
        offers = rewriter.offers(graph)
        assert offers
        chosen, choices = choosing.choose(graph, offers, choosing.Policy("cpu", default_peaks("cpu")))
        assert not chosen and {c.chosen for c in choices} == {"original"}
