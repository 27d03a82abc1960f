"""Fourier transforms of any length, against JAX's derivatives."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check

pytestmark = pytest.mark.usefixtures("float64")
check = functools.partial(check, ours={"fft"}, mixed=False)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_transforms(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(2, 3, n))
    z = x + 1j * rng.normal(size=x.shape)
    half = np.fft.rfft2(x)
    # Twice in a row, so that second derivatives are not zero.
    check(lambda z, x: (jnp.fft.fft2(z * jnp.fft.ifft(z)), jnp.fft.rfft2(x * x)), z, x)
    check(lambda x, h: (jnp.fft.rfft(x, axis=1), jnp.fft.irfft2(h * h, (3, n))), x, half)


def test_longer_shorter_and_shifted():
    x = np.random.default_rng(0).normal(size=(4, 6))
    check(lambda x: jnp.fft.irfft(jnp.fft.rfft(x, 9), 4), x, order=1)
    check(lambda x: jnp.abs(jnp.fft.fftshift(jnp.fft.fftn(x))) ** 2, x)
    check(lambda x: jnp.fft.ihfft(jnp.fft.hfft(x.astype(complex))), x, order=1)


def test_empty_batch():
    check(lambda x: jnp.fft.rfft(x), np.zeros((0, 4)), order=1)
