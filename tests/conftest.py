"""What every test needs before JAX is imported: the CPU, and a cache folder of its own."""

import os
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"

_cache = tempfile.TemporaryDirectory(prefix="jaxinfer-test-cache-", ignore_cleanup_errors=True)
os.environ["JAXINFER_CACHE_DIR"] = _cache.name


@pytest.fixture(scope="session")
def kernels():
    """The kernels in C; without a C compiler, tests that need them are skipped."""
    from jaxinfer import native

    return native.library() or pytest.skip(native.why_missing())
