"""What every test needs before JAX is imported: the CPU, and a cache folder of its own."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

_cache = tempfile.TemporaryDirectory(prefix="jaxinfer-test-cache-", ignore_cleanup_errors=True)
os.environ["JAXINFER_CACHE_DIR"] = _cache.name
