"""Hard-concrete gates against their distribution, by quadrature and by drawing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sparsity.learning import gates

_LOCATIONS = [-4.0, -1.0, 0.0, 0.7, 3.0]


def _gate(u, location):
    """z of a uniform u, in float64, from the paper's formulas."""
    s = 1 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + location) / (2 / 3)))
    return np.clip(s * 1.2 - 0.1, 0, 1)


@pytest.mark.parametrize("location", _LOCATIONS)
def test_draws_follow_the_distribution(location):
    count = 40_000
    z = np.asarray(gates.sample(jnp.full(count, location, jnp.float32), jax.random.key(3)), np.float64)
    exact = _gate((np.arange(1_000_000) + 0.5) / 1_000_000, location)
    open_ = float(gates.probability(jnp.float32(location)))
    # Five standard deviations of a mean of so many draws.
    assert np.mean(z > 0) == pytest.approx(open_, abs=5 * np.sqrt(open_ * (1 - open_) / count))
    assert np.mean(exact > 0) == pytest.approx(open_, abs=2e-6)
    assert z.mean() == pytest.approx(exact.mean(), abs=5 * exact.std() / np.sqrt(count))
    assert z.std() == pytest.approx(exact.std(), abs=0.01)
    assert np.mean(z == 1) == pytest.approx(np.mean(exact == 1), abs=0.0125)


def test_neighbours_are_independent():
    z = np.asarray(gates.sample(jnp.zeros(20_001), jax.random.key(0)))
    half = z.size // 2 + 1  # two gates share a random word
    for shift in (1, half):
        assert abs(np.corrcoef(z[shift:], z[:-shift])[0, 1]) < 0.06


@pytest.mark.parametrize("location", _LOCATIONS)
def test_the_derivative_of_a_draw(location):
    """dz/d(log α) of a fixed draw, against a difference quotient in float64."""
    key, h = jax.random.key(5), 1e-5
    words = np.asarray(jax.random.bits(key, (32,), jnp.uint32)).astype(np.uint64)
    u = (np.concatenate([words & 0xFFFF, words >> 16]) + 0.5) / 2**16
    slopes = jax.grad(lambda a: gates.sample(a, key).sum())(jnp.full(64, location, jnp.float32))
    expected = (_gate(u, location + h) - _gate(u, location - h)) / (2 * h)
    np.testing.assert_allclose(slopes, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.95])
def test_location_is_the_inverse_of_probability(probability):
    assert float(gates.probability(jnp.float32(gates.location(probability)))) == pytest.approx(probability, rel=1e-5)


def test_what_is_open_for_good_is_one_and_what_is_shut_is_zero():
    np.testing.assert_array_equal(gates.expected(jnp.array([-9.0, 9.0])), [0, 1])
    assert 0 < float(gates.expected(jnp.float32(0.0))) < 1
