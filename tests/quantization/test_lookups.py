"""Parameters of which rows are looked up: written in fewer bits, and only the rows that a call takes are widened."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.autoinfer import BF16, FP8, Int4, Int8, Int8Dynamic, Int8Weights, Override
from jaxinfer.quantization.tensor import Quantized

WORDS, WIDTH = 41, 24
SCHEMES = {
    "int8": Int8(),
    "int8 weights": Int8Weights(),
    "int8 dynamic": Int8Dynamic(),
    "int4 in groups": Int4(8),
    "int4 in groups, affine": Int4(8, affine=True),
    "int4 in groups that are not filled": Int4(10),
    "int4 by row": Int4(None),
    "fp8": FP8(),
    "bf16": BF16(),
}


def _model(params, ids):
    return jnp.tanh(jnp.take(params["table"], ids, axis=0)) @ params["w"]


def _params(dtype=np.float32):
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.1, 3, (WORDS, 1))
    return {
        "table": jnp.asarray(rng.normal(size=(WORDS, WIDTH)) * scales, dtype),
        "w": jnp.asarray(rng.normal(size=(WIDTH, 5)), dtype),
    }


def _ids(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(0, WORDS, shape), jnp.int32)


def _small(fun, params, ids, scheme, **options):
    return autoinfer.quantize(fun, params, scheme, [ids], prefer="size", tune="off", **options)


def _report(program, name):
    (found,) = [x for x in program.explain().layers if x.name == name]
    return found


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (0,)], ids=str)
def test_rows_are_those_of_the_table_written_out(scheme, shape) -> None:
    params = {"table": _params()["table"]}

    def fun(params, ids):
        return jnp.take(params["table"], ids, axis=0)

    program, small = _small(fun, params, _ids(3), scheme)
    ids = _ids(*shape)
    assert isinstance(small["table"], Quantized) and small["table"].nbytes < params["table"].nbytes
    np.testing.assert_array_equal(program(small, ids), small["table"].dequantize()[ids])
    found = _report(program, "table")
    assert found.form == "lookup" and found.position is None and found.after == small["table"].nbytes
    assert 0 < found.error < 0.2


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_whole_table_is_never_written_out(scheme) -> None:
    program, small = _small(_model, _params(), _ids(3), scheme)
    assert f"f32[{WORDS},{WIDTH}]" not in str(jax.make_jaxpr(program)(small, _ids(3)))


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_rows_that_do_not_exist(mode) -> None:
    params = {"table": _params()["table"]}

    def fun(params, ids):
        return jnp.take(params["table"], ids, axis=0, mode=mode)

    ids = jnp.array([0, WORDS, -1, -WORDS - 1, 3])
    for scheme in SCHEMES.values():
        program, small = _small(fun, params, ids, scheme)
        np.testing.assert_array_equal(program(small, ids), fun({"table": small["table"].dequantize()}, ids))


@pytest.mark.parametrize("fill_value", [0, 7, np.nan])
def test_a_fill_value_of_its_own(fill_value) -> None:
    params = {"table": _params()["table"]}

    def fun(params, ids):
        return params["table"].at[ids].get(mode="fill", fill_value=fill_value)

    ids = jnp.array([2, WORDS + 2])
    program, small = _small(fun, params, ids, Int8Weights())
    np.testing.assert_array_equal(program(small, ids), fun({"table": small["table"].dequantize()}, ids))


def test_one_scale_for_the_whole_table() -> None:
    params, ids = _params(), jnp.array([4, WORDS + 9, 0])
    program, small = _small(_model, params, ids, BF16())
    assert small["table"].scale is None
    scheme = autoinfer.Scheme(autoinfer.Format("int8", "tensor"))
    program, small = _small(_model, params, ids, scheme)
    assert small["table"].scale.size == 1
    wide = {k: v.dequantize() for k, v in small.items()}
    np.testing.assert_allclose(program(small, ids), _model(wide, ids), 1e-5, 1e-6)
    assert np.isnan(program(small, ids)[1]).all()


def test_a_table_stays_where_speed_is_preferred() -> None:
    params, ids = _params(), _ids(3)
    program, small = autoinfer.quantize(_model, params, Int8Weights(), [ids], tune="off")
    assert small["table"] is params["table"] and isinstance(small["w"], Quantized)
    found = _report(program, "table")
    assert found.form == "float" and "save no time" in found.reason and found.before == found.after


def test_a_table_can_be_left_out() -> None:
    params, ids = _params(), _ids(3)
    program, small = _small(_model, params, ids, Int8Weights(overrides=[Override("table")]))
    assert small["table"] is params["table"] and _report(program, "table").reason == "left out by the scheme"
    program, small = _small(_model, params, ids, Int8Weights(overrides=[Override("table", Int4(None))]))
    assert small["table"].format.number == "int4" and small["w"].format.number == "int8"


def test_a_table_that_a_product_reads_too() -> None:
    def tied(params, ids):
        return jnp.take(params["table"], ids, axis=0) @ params["table"].T

    params, ids = {"table": _params()["table"]}, _ids(2, 3)
    for scheme in (Int8Weights(), Int4(8), Int4(None)):
        program, small = _small(tied, params, ids, scheme)
        found = _report(program, "table")
        assert found.position == 0 and found.form != "float"
        np.testing.assert_allclose(program(small, ids), tied({"table": small["table"].dequantize()}, ids), 1e-4, 1e-4)


def test_inside_a_loop() -> None:
    def fun(params, ids):
        def step(h, i):
            h = jnp.tanh(h + params["table"][i])
            return h, h @ params["w"]

        return lax.scan(step, jnp.zeros(WIDTH), ids)

    params, ids = _params(), _ids(6)
    program, small = _small(fun, params, ids, Int8Weights())
    assert _report(program, "table").form == "lookup"
    wide = {k: v.dequantize() for k, v in small.items()}
    for have, want in zip(jax.tree.leaves(program(small, ids)), jax.tree.leaves(fun(wide, ids))):
        np.testing.assert_allclose(have, want, 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_other_dtypes_and_transformations(dtype) -> None:
    params, ids = _params(dtype), _ids(4, 3)
    program, small = _small(_model, params, ids[0], Int8Weights())
    wide = {k: v.dequantize() for k, v in small.items()}
    want = jax.vmap(lambda i: _model(wide, i))(ids)
    have = jax.jit(jax.vmap(lambda i: program(small, i)))(ids)
    assert have.dtype == want.dtype == dtype
    np.testing.assert_allclose(have.astype(np.float32), want.astype(np.float32), 0.05, 0.05)


def test_a_cast_on_the_way() -> None:
    def fun(params, ids):
        return jnp.take(params["table"].astype(jnp.bfloat16), ids, axis=0) * 2

    params, ids = {"table": _params()["table"]}, _ids(3)
    program, small = _small(fun, params, ids, Int8Weights())
    np.testing.assert_array_equal(program(small, ids), fun({"table": small["table"].dequantize()}, ids))


def test_stored_and_loaded(tmp_path) -> None:
    params, ids = _params(), _ids(3)
    program, small = _small(_model, params, ids, Int8Weights())
    autoinfer.save((program, small), tmp_path / "m", ids)
    np.testing.assert_array_equal(autoinfer.load(tmp_path / "m")(ids), program(small, ids))
