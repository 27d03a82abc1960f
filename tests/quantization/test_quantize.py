"""Quantized programs: exact where they can be, close where they cannot, at any batch size, and integer throughout."""

from __future__ import annotations

import collections
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.analysis.weights import Weights
from jaxinfer.graph import trace_function
from jaxinfer.graph.retrace import Parameters, Program
from jaxinfer.quantization.activations import Static
from jaxinfer.quantization.forms import FORMS, Use, apply, forms_of
from jaxinfer.quantization.measure import Timings, laid_out, written
from jaxinfer.quantization.quantize import layers_of
from jaxinfer.quantization.scheme import Format, Group, Override, Scheme


def _scaled(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def _conv(x, w, stride=1, groups=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=dims, feature_group_count=groups)


def _image_net(p, x):
    """Every kind of convolution, a residual, pooling, a concatenation and a transposed product."""
    x = jax.nn.relu(_conv(x, p["stem"], 2))
    y = jax.nn.relu6(_conv(x, p["expand"]) + p["bias"])
    y = jax.nn.relu6(_conv(y, p["each"], 1, 32))
    x = x + _conv(y, p["project"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jnp.concatenate([x, jax.nn.relu(_conv(x, p["three"]))], -1)
    return x.reshape(x.shape[0], -1) @ p["head"].T


def _image_params(rng):
    return {
        "stem": _scaled(rng, 3, 3, 3, 8),
        "expand": _scaled(rng, 1, 1, 8, 32),
        "bias": _scaled(rng, 32),
        "each": _scaled(rng, 3, 3, 1, 32),
        "project": _scaled(rng, 1, 1, 32, 8),
        "three": _scaled(rng, 3, 3, 8, 8),
        "head": _scaled(rng, 10, 256),
    }


def _attention(p, x, mask):
    """Projections with axes for heads, which are never merged."""
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) + mask[:, None, None])
    x = x + jnp.einsum("bhts,bshe,hed->btd", weights, v, p["out"])
    return jnp.tanh(x @ p["wide"].reshape(16, 24)) @ p["narrow"]


def _attention_params(rng):
    shapes = {
        "q": (16, 2, 8),
        "k": (16, 2, 8),
        "v": (16, 2, 8),
        "out": (2, 8, 16),
        "wide": (4, 4, 24),
        "narrow": (24, 5),
    }
    return {name: _scaled(rng, *shape) for name, shape in shapes.items()}


def _recurrent(p, x):
    def step(h, x):
        h = jnp.tanh(h @ p["hidden"] + x @ p["input"])
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[0], 12)), jnp.swapaxes(x, 0, 1))[1]


def _programs():
    rng = np.random.default_rng(0)
    yield _image_net, _image_params(rng), lambda n: (rng.normal(size=(n, 16, 16, 3)).astype(np.float32),)
    mask = np.zeros((1, 6), np.float32)
    yield (
        _attention,
        _attention_params(rng),
        lambda n: (rng.normal(size=(n, 6, 16)).astype(np.float32), np.repeat(mask, n, 0)),
    )
    params = {"hidden": _scaled(rng, 12, 12), "input": _scaled(rng, 7, 12)}
    yield _recurrent, params, lambda n: (rng.normal(size=(n, 4, 7)).astype(np.float32),)


_SCHEMES = [
    (autoinfer.Int8(), 0.06),
    (autoinfer.Int8(affine=False, observer=autoinfer.MSE()), 0.09),
    (autoinfer.Int8Dynamic(), 0.05),
    (autoinfer.Int8Dynamic(per="tensor"), 0.05),
    (Scheme(Format("int8", "tensor"), Format("int8", "token", affine=True), dynamic=True), 0.05),
    (autoinfer.Int8Weights(), 0.03),
    (Scheme(Format("int8", Group(4), affine=True)), 0.03),
    (autoinfer.Int4(4), 0.3),
    (autoinfer.Int4(None, affine=True), 0.4),
    (autoinfer.FP8(), 0.15),
    (Scheme(Format("fp8_e4m3"), Format("fp8_e4m3", "tensor")), 0.2),
    (autoinfer.BF16(), 0.02),
    (Scheme(Format("bf16", "tensor"), Format("bf16", "tensor")), 0.04),
    (autoinfer.F16(), 0.002),
]


# Compiled once for all schemes.
_original = functools.cache(jax.jit)


def _distance(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _name(x) -> str | None:
    return x[0].__name__ if isinstance(x, tuple) else str(x) if isinstance(x, Scheme) else ""


def _cases():
    """All schemes on convolutions, each kind of arithmetic on the others."""
    first, *others = _programs()
    yield from ((first, *case) for case in _SCHEMES)
    for program in others:
        yield from ((program, *_SCHEMES[i]) for i in (0, 2, 4, 6, 12))


@pytest.mark.parametrize(("program", "scheme", "bound"), list(_cases()), ids=_name)
def test_results_are_close_at_any_batch_size(program, scheme, bound) -> None:
    fun, params, make = program
    q, small = autoinfer.quantize(fun, params, scheme, [make(9), make(9)], tune="off")
    report = q.explain()
    assert report.after < report.before and all(layer.is_quantized for layer in report.layers)
    for size in (1, 4):
        args = make(size)
        assert _distance(q(small, *args), _original(fun)(params, *args)) < bound
    before = sum(x.nbytes for x in jax.tree.leaves(params))
    assert (report.before, report.after) == (before, sum(x.nbytes for x in jax.tree.leaves(small)))


def _count(fun, *args) -> collections.Counter:
    flat, tree = jax.tree.flatten(args)
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jnp.asarray, flat)]
    graph = trace_function(lambda *xs: jax.tree.leaves(fun(*jax.tree.unflatten(tree, xs))), *avals)
    found: collections.Counter = collections.Counter()
    for node in graph.walk():
        found[node.op, str(node.inputs[0].dtype) if node.inputs else ""] += 1
    return found


def test_segments_stay_integer() -> None:
    fun, params, make = next(_programs())
    q, small = autoinfer.quantize(fun, params, autoinfer.Int8(), [make(2)], tune="off")
    ops = _count(q, small, *make(2))
    assert ops["conv_general_dilated", "int8"] == 2 and ops["dot_general", "int8"] == 3
    assert ops["reduce_window_max", "int8"] == 1 and ops["concatenate", "int8"] == 1
    assert not any(
        ops[op, "float32"] for op in ("conv_general_dilated", "dot_general", "reduce_window_max", "concatenate")
    )


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_static_product_is_what_integers_say(rows, affine) -> None:
    rng = np.random.default_rng(4)
    w = rng.normal(size=(40, 24)).astype(np.float32)
    x = (rng.normal(size=(rows, 40)) + 0.5).astype(np.float32)
    q, small = autoinfer.quantize(lambda p, x: x @ p, w, autoinfer.Int8(affine=affine), [x], tune="off")
    low, high = min(x.min(), 0), max(x.max(), 0)
    if affine:
        sx = np.float32((high - low) / np.float32(255))
        zx = int(np.clip(-128 - np.round(low / sx), -128, 127))
    else:
        sx, zx = np.float32(max(-low, high) / np.float32(127)), 0
    codes = np.clip(np.round(x * (np.float32(1) / sx)) + zx, -128, 127).astype(np.int64)
    sw = np.abs(w).max(0) / np.float32(127)
    sums = (codes - zx) @ np.clip(np.round(w / sw), -128, 127).astype(np.int64)
    np.testing.assert_allclose(q(small, x), sums * (sx.astype(np.float64) * sw), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_no_layer_is_slower_than_in_floating_point_unless_size_was_asked_for(prefer, monkeypatch) -> None:
    fun, params, make = next(_programs())
    rng = np.random.default_rng(5)

    def seconds(self, layer, scheme):
        return {"float": 1.0, **{form: rng.uniform(0.5, 1.5) for form in forms_of(layer, scheme)}}

    monkeypatch.setattr(Timings, "of", seconds)
    q, small = autoinfer.quantize(fun, params, autoinfer.Int8Dynamic(), [make(2)], prefer=prefer)
    layers = q.explain().layers
    slower = [layer for layer in layers if min(t for f, t in layer.seconds.items() if f != "float") > 1]
    assert 0 < len(slower) < len(layers)
    for layer in layers:
        assert layer.is_quantized == (prefer == "size" or layer not in slower)
        assert layer.is_quantized or "times as long" in layer.reason
    text = str(q.explain())
    assert all(layer.name in text for layer in layers)
    assert _distance(q(small, *make(2)), fun(params, *make(2))) < 10


def test_forms_are_timed() -> None:
    rng = np.random.default_rng(6)
    w, x = _scaled(rng, 64, 256), rng.normal(size=(1, 64)).astype(np.float32)
    q, small = autoinfer.quantize(lambda p, x: x @ p, w, autoinfer.Int8Weights(), [x], prefer="size")
    (layer,) = q.explain().layers
    expected = {"float", "multiply and sum", "digits", "digits, columns", "dequantize in blocks", "dequantize"}
    assert set(layer.seconds) == expected and layer.form in expected - {"float"}
    assert min(layer.seconds[f] for f in expected - {"float"}) == layer.seconds[layer.form]
    assert _distance(q(small, x), x @ w) < 0.02


@pytest.mark.parametrize(("side", "rows"), [(0, 3), (1, 3), (1, 1), (0, 1)])
@pytest.mark.parametrize(
    "scheme",
    [
        autoinfer.Int8(),
        autoinfer.Int8Dynamic(),
        autoinfer.Int8Weights(),
        Scheme(Format("int8", affine=True)),
        autoinfer.Int4(16),
        autoinfer.Int4(16, affine=True),
    ],
    ids=str,
)
def test_all_forms_agree(scheme, side, rows) -> None:
    rng = np.random.default_rng(7)
    w = _scaled(rng, 2, 32, 128) if side else _scaled(rng, 128, 2, 32)
    x = rng.normal(size=(rows, 2, 32)).astype(np.float32)

    def plain(p, x):
        axes = ((1, 2), (0, 1)) if side else ((1, 2), (1, 2))
        operands = (x, p) if side else (p, x)
        return lax.dot_general(*operands, (axes, ((), ())))

    program = Program(plain, [w.shape], TypeError)
    (layer,) = layers_of(program, Parameters(jnp.asarray(w)), x).layers
    read = layer.reads[0]
    static = None if scheme.dynamic or scheme.activations is None else Static.of(scheme.activations, -3.0, 4.0)
    forms = forms_of(layer, scheme)
    assert len(forms) > 1 and set(forms) <= set(FORMS)
    assert ("multiply and sum" in forms) == (rows == 1 and scheme.activations is None and scheme.weights.bits == 8)
    quantized = written(layer, jnp.asarray(w), scheme)
    want = plain(quantized.dequantize(), x)
    for form in forms:
        lying = laid_out(layer, quantized, form)
        got = apply(form, Use(read.node, read.side, Weights(0, lying, read.move, read.place), scheme, static), x)
        assert got.shape == want.shape
        bound = 0.02 if scheme.activations is not None else 1e-5
        assert _distance(got, want) < bound, form


# -- exceptions -------------------------------------------------------------------------------------------------------


def test_exceptions_hold_and_idle_ones_are_reported() -> None:
    fun, params, make = next(_programs())
    four = autoinfer.Int4(8)
    scheme = autoinfer.Int8(overrides=[Override("head", four), Override(0), Override("t*ee")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, small = autoinfer.quantize(fun, params, scheme, [make(2)], tune="off")
    by_name = {layer.name: layer for layer in q.explain().layers}
    assert by_name["head"].scheme == four and by_name["head"].form == "dequantize"
    assert not by_name["stem"].is_quantized and not by_name["three"].is_quantized and by_name["each"].is_quantized
    assert isinstance(small["stem"], jax.Array) and isinstance(small["head"], autoinfer.Quantized)
    assert _distance(q(small, *make(2)), fun(params, *make(2))) < 10
    with pytest.warns(autoinfer.QuantizationWarning, match="'haed'"):
        autoinfer.quantize(fun, params, autoinfer.Int8(overrides=[Override("haed")]), [make(2)], tune="off")
    with pytest.raises(autoinfer.SchemeError, match="99"):
        strict = autoinfer.Int8(overrides=[Override(99)], unmatched="error")
        autoinfer.quantize(fun, params, strict, [make(2)], tune="off")


def test_parameters_that_more_than_products_and_lookups_read_stay() -> None:
    rng = np.random.default_rng(8)
    params = {"table": _scaled(rng, 20, 8), "square": _scaled(rng, 8, 8), "w": _scaled(rng, 8, 8)}

    def fun(p, ids):
        x = p["table"][ids] @ p["w"] + p["square"].sum()
        return x @ p["square"] @ p["table"].T

    q, small = autoinfer.quantize(fun, params, autoinfer.Int8Dynamic(), [np.array([1, 2, 3])], tune="off")
    reasons = {layer.name: layer.reason for layer in q.explain().layers}
    assert reasons["w"] == reasons["table"] == "" and "as well" in reasons["square"]
    assert _distance(q(small, np.array([5])), fun(params, np.array([5]))) < 0.05


# -- how it composes --------------------------------------------------------------------------------------------------


def test_it_is_a_function_like_any_other() -> None:
    fun, params, make = next(_programs())
    q, small = autoinfer.quantize(fun, params, autoinfer.Int8Dynamic(), [make(2)], tune="off")
    (x,) = make(3)
    want = np.asarray(q(small, x))
    np.testing.assert_allclose(jax.jit(q)(small, x), want, rtol=1e-5, atol=1e-5)
    each = jax.vmap(lambda x: q(small, x[None])[0])(x)
    np.testing.assert_allclose(each, np.concatenate([q(small, x[i : i + 1]) for i in range(3)]), rtol=0.02, atol=0.02)
    fast = autoinfer.optimize(q, tune="off", verify=False).freeze(small)
    assert _distance(fast(x), want) < 0.02


def test_weights_alone_are_differentiable_in_the_inputs() -> None:
    _, (fun, params, make), _ = _programs()
    q, small = autoinfer.quantize(fun, params, autoinfer.F16(), [make(2)], tune="off")
    args = make(2)
    got = jax.jit(jax.grad(lambda *args: q(small, *args).sum()))(*args)
    assert _distance(got, jax.jit(jax.grad(lambda *args: fun(params, *args).sum()))(*args)) < 0.005


def test_it_is_saved_and_loaded(tmp_path) -> None:
    fun, params, make = next(_programs())
    q, small = autoinfer.quantize(fun, params, autoinfer.Int8(), [make(2)], tune="off")
    args = make(2)
    path = tmp_path / "program"
    autoinfer.save((q, small), path, *args)
    np.testing.assert_array_equal(autoinfer.load(path)(*args), q(small, *args))
