import contextlib
import dataclasses
import itertools
import sqlite3

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.search import device as device_module
from jaxinfer.search.cache import Cache
from jaxinfer.search.device import Peaks, default_peaks, environment_key, measure_peaks, peaks


@pytest.fixture
def cache(tmp_path):
    with contextlib.closing(Cache(tmp_path)) as opened:
        yield opened


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement with one that counts its runs."""
    runs = []
    rates = Peaks(*[float(i) for i in range(1, 8)])

    def measure(device):
        runs.append(device)
        return rates

    monkeypatch.setattr(device_module, "measure_peaks", measure)
    return rates, runs


def test_rates_are_measured_once_and_kept(cache, measured):
    rates, runs = measured
    assert peaks(measure=True, cache=cache) == rates
    assert peaks(measure=True, cache=cache) == rates
    assert peaks(measure=False, cache=cache) == rates
    assert runs == [jax.devices()[0]]


def test_nothing_is_measured_where_it_is_not_allowed(cache, measured):
    platform = jax.devices()[0].platform
    assert peaks(measure=False, cache=cache) == default_peaks(platform)
    assert measured[1] == [] and len(cache) == 0


@pytest.mark.parametrize("spoil", ["missing", "type", "zero", "inf", "list"])
def test_stored_rates_that_make_no_sense_are_measured_again(cache, measured, spoil):
    good = dataclasses.asdict(measured[0])
    bad = {
        "missing": {name: rate for name, rate in good.items() if name != "vector"},
        "type": good | {"vector": "fast"},
        "zero": good | {"vector": 0.0},
        "inf": good | {"vector": float("inf")},
        "list": [1.0, 2.0],
    }[spoil]
    peaks(measure=True, cache=cache)
    (name,) = _keys(cache)
    cache.put(name, bad)
    assert peaks(measure=True, cache=cache) == measured[0]
    assert len(measured[1]) == 2


def _keys(cache: Cache) -> list[str]:
    with contextlib.closing(sqlite3.connect(cache.path)) as connection:
        return [key for (key,) in connection.execute("SELECT key FROM entries")]


def test_measured_rates_are_those_of_a_real_device():
    """Wide limits that hold from a phone to a rack, so that only a wrong formula or unit fails."""
    rates = measure_peaks()
    for name in ("dot_f32", "dot_bf16", "dot_f64", "dot_i8", "vector"):
        assert 1e8 < getattr(rates, name) < 1e17, name
    assert 1e8 < rates.bandwidth < 1e14
    assert 1e-9 <= rates.launch_s < 1e-3


def test_measuring_works_with_a_simulated_clock():
    """On a clock that ticks once per reading all programs take equally long, and rates are in proportion to work."""
    ticks = itertools.count()
    rates = measure_peaks(clock=lambda: next(ticks) * 1e-3)
    assert rates.dot_f32 == pytest.approx(rates.dot_i8)
    assert rates.launch_s > 0.0


@pytest.mark.parametrize(
    "dtype, field",
    [
        (jnp.float32, "dot_f32"),
        (jnp.complex64, "dot_f32"),
        (jnp.bfloat16, "dot_bf16"),
        (jnp.float16, "dot_bf16"),
        (jnp.float8_e4m3fn, "dot_bf16"),
        ("float64", "dot_f64"),
        ("complex128", "dot_f64"),
        (jnp.int8, "dot_i8"),
        (jnp.uint8, "dot_i8"),
        (jnp.int32, "vector"),
        (jnp.bool_, "vector"),
    ],
)
def test_dot_rate_by_dtype(dtype, field):
    rates = Peaks(*[float(i) for i in range(1, 8)])
    assert rates.dot_rate(dtype) == getattr(rates, field)


def test_default_rates_by_platform():
    assert default_peaks("cuda") == default_peaks("rocm") == default_peaks("gpu")
    assert len({default_peaks(platform) for platform in ("cpu", "gpu", "tpu")}) == 3


def test_environment_key_follows_what_moves_timings(monkeypatch):
    seen = [environment_key("rules"), environment_key("other rules")]
    assert environment_key("rules", jax.devices()[0]) == seen[0]
    with jax.enable_x64(not jax.config.jax_enable_x64):
        seen.append(environment_key("rules"))
    with jax.default_matmul_precision("float32"):
        seen.append(environment_key("rules"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    seen.append(environment_key("rules"))
    monkeypatch.setenv("NPROC", "1")
    seen.append(environment_key("rules"))
    monkeypatch.setattr(jax, "__version__", "0.0.0")
    seen.append(environment_key("rules"))
    monkeypatch.setattr(device_module, "_host", lambda: "another processor")
    seen.append(environment_key("rules"))
    monkeypatch.setattr(device_module, "_host_threads", lambda: 1000)
    seen.append(environment_key("rules"))
    assert len(set(seen)) == len(seen)
