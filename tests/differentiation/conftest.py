"""What the tests of derivatives share."""

import jax
import pytest


@pytest.fixture
def float64():
    """Double precision, for comparisons at 1e-9."""
    with jax.enable_x64(True):
        yield
