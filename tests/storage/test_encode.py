"""Encodings of arrays: every bit comes back, and what is thin takes little room."""

import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.storage import StorageError
from jaxinfer.storage.encode import decode, encode, loosen, pack_bits, squeeze, unpack_bits

FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
NARROW = ["int4", "uint4", "int2", "uint2", "float4_e2m1fn"]
DTYPES = [*FLOATS, *INTEGERS, *NARROW, "bool", "complex64", "complex128"]


def random_array(dtype, size, rng, density=1.0):
    """Any bits at all, as far as the type has them; zeros with some probability."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype.name in NARROW or dtype == np.bool_:
        values = np.arange(16 if "4" in dtype.name else 4 if "2" in dtype.name else 2, dtype=np.uint8)
        signed = values - (len(values) // 2 if dtype.name.startswith("int") else 0)
        table = (
            values.view(dtype) if "float" in dtype.name or dtype == np.bool_ else signed.astype(np.int8).astype(dtype)
        )
        array = table[rng.integers(0, len(table), size)]
    else:
        array = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).copy()
    array[rng.random(size) >= density] = np.zeros((), dtype)
    return array


def round_trip(array, encoded):
    how = json.loads(json.dumps(encoded.how))
    sizes = how.pop("zstd", {})

    def part(name):
        data = np.frombuffer(encoded.parts[name].tobytes(), np.uint8)
        return loosen(data, sizes[name]) if name in sizes else data

    return decode(how, part, array.size, array.dtype)


def assert_same(array, encoded):
    back = round_trip(array, encoded)
    assert back.dtype == array.dtype and back.tobytes() == array.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(0, 400),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_bit_comes_back(dtype, size, density, seed):
    array = random_array(dtype, size, np.random.default_rng(seed), density)
    encoded = encode(array)
    assert encoded.nbytes <= array.nbytes
    assert_same(array, encoded)
    assert_same(array, squeeze(encoded, level=1))


@pytest.mark.parametrize("size", [0, 1, 7, 65_535, 65_536, 65_537, 200_001])
@pytest.mark.parametrize("bits", [1, 3, 4, 17, 32])
def test_bits_are_packed_across_blocks(size, bits):
    codes = np.random.default_rng(size).integers(0, 1 << bits, size, np.uint64)
    packed = pack_bits(codes, bits)
    assert packed.nbytes == math.ceil(size * bits / 8)
    np.testing.assert_array_equal(unpack_bits(packed, size, bits, np.dtype(np.uint64)), codes)


def test_signs_of_zeros_and_payloads_of_nans_stay():
    array = np.zeros(1000, np.float32)
    array[[3, 500]] = [-0.0, 1.5]
    array.view(np.uint32)[700] = 0x7FC01234
    encoded = encode(array)
    assert encoded.how["kind"] == "sparse" and encoded.how["nonzeros"] == 3
    assert_same(array, encoded)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("int4", 4), ("uint4", 4), ("int2", 2), ("uint2", 2), ("float4_e2m1fn", 4), ("bool", 1)]
)
def test_narrow_types_take_their_own_bits(dtype, bits):
    array = random_array(dtype, 8000, np.random.default_rng(0))
    assert encode(array).nbytes == 1000 * bits


def test_int8_of_sixteen_levels_takes_four_bits():
    levels = np.random.default_rng(0).integers(-8, 8, 10_000).astype(np.int8)
    encoded = encode(levels)
    assert encoded.how == {"kind": "packed", "bits": 4, "offset": -8} and encoded.nbytes == 5000
    assert_same(levels, encoded)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_ends_of_every_integer_type_come_back(dtype):
    ends = np.iinfo(dtype)
    assert_same(near := np.full(200, ends.max, dtype) - np.arange(200, dtype=dtype) % 7, encode(near))
    assert_same(near := np.full(200, ends.min, dtype) + np.arange(200, dtype=dtype) % 7, encode(near))
    assert_same(both := np.array([ends.min, ends.max] * 100, dtype), encode(both))


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_pruned_int8_takes_its_values_and_little_more(density):
    """Elias–Fano takes at most 2 + log2(u/n) bits a position, and a bitmap one bit for every element."""
    rng, size = np.random.default_rng(1), 266_200
    array = random_array("int8", size, rng)
    array[array == 0] = 1
    array[rng.random(size) >= density] = 0
    count = np.count_nonzero(array)
    positions = min(count * (2 + math.log2(size / count)), size) / 8
    encoded = encode(array)
    assert encoded.nbytes <= count + positions + 16
    print(f"\ndensity {density}: {4 * size / encoded.nbytes:.1f}× smaller than float32, {encoded.how['positions']}")
    assert_same(array, encoded)


def test_dense_floats_stay_as_they_are():
    array = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    encoded = encode(array)
    assert encoded.how == {"kind": "plain"} and encoded.parts[""].tobytes() == array.tobytes()


def test_zstd_makes_repetition_small_and_leaves_noise_alone():
    array = np.tile(np.arange(32, dtype=np.float32), 500)
    encoded = squeeze(encode(array))
    assert encoded.nbytes < array.nbytes / 50
    assert_same(array, encoded)
    noise = encode(np.random.default_rng(0).normal(size=1000).astype(np.float32))
    assert squeeze(noise) is noise


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(StorageError, match=r"jaxinfer\[zstd\]"):
        squeeze(encode(np.zeros(1000, np.float32)))


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "plain"},
        {"kind": "packed", "bits": 3, "offset": 0},
        {"kind": "sparse", "nonzeros": 5, "positions": {"kind": "bitmap"}, "values": {"kind": "plain"}},
        {"kind": "sparse", "nonzeros": 5, "positions": {"kind": "elias-fano", "low": 2}, "values": {"kind": "plain"}},
        {"kind": "fractal"},
    ],
)
def test_parts_that_do_not_fit_are_errors(how):
    for data in (np.zeros(0, np.uint8), np.full(3, 255, np.uint8)):
        with pytest.raises(StorageError):
            decode(how, lambda name, data=data: data, 100, np.dtype(jnp.float32))
