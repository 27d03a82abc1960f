"""How fast a device can be: the peak rates for the analytic cost model, and what identifies a machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import platform as host_platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from jaxinfer.search.cache import Store, default_cache, key
from jaxinfer.search.measure import Clock, interleaved


@dataclasses.dataclass(frozen=True, slots=True)
class Peaks:
    """Rates that large, friendly operations reach on a device.

    Attributes:
        dot_f32, dot_bf16, dot_f64, dot_i8: operations per second of matrix products, two for a multiply-add.
        vector: float32 operations per second of fused elementwise work.
        bandwidth: bytes per second when streaming through memory.
        launch_s: seconds that one operation costs however small it is.
    """

    dot_f32: float
    dot_bf16: float
    dot_f64: float
    dot_i8: float
    vector: float
    bandwidth: float
    launch_s: float

    def dot_rate(self, dtype: Any) -> float:
        """Operations per second of a matrix product with operands of `dtype`."""
        dtype = jnp.dtype(dtype)
        if jnp.issubdtype(dtype, jnp.inexact):
            # Complex products are counted as real ones of half the size.
            size = dtype.itemsize // (2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1)
            return {8: self.dot_f64, 4: self.dot_f32}.get(size, self.dot_bf16)
        return self.dot_i8 if dtype.itemsize == 1 and dtype != jnp.bool_ else self.vector


# Orders of magnitude for two cores with AVX-512, one data-centre card and one TPU core. What matters is their
# proportion: with them choices are the same everywhere.
_DEFAULTS = {
    "cpu": Peaks(1.5e11, 5e10, 7e10, 4e11, 3e10, 1.5e10, 1e-6),
    "gpu": Peaks(5e13, 4e14, 2e13, 8e14, 2e13, 2e12, 3e-6),
    "tpu": Peaks(5e13, 2e14, 1e12, 4e14, 4e12, 1e12, 2e-6),
}


def default_peaks(platform: str) -> Peaks:
    """Constants for a kind of platform, the same on every machine; all but cpu and tpu count as gpu."""
    return _DEFAULTS.get(platform, _DEFAULTS["gpu"])


def peaks(device: jax.Device | None = None, *, measure: bool, cache: Store | None = None) -> Peaks:
    """The peak rates of a device: those measured earlier, else measured now, else `default_peaks`.

    With `tune="off"` call `default_peaks` instead: what was measured differs between machines and days.

    Args:
        device: by default JAX's first device.
        measure: whether to measure, for about a second, what the cache does not have.
        cache: where measured rates are kept; by default the user's.
    """
    device = device if device is not None else jax.devices()[0]
    cache = cache if cache is not None else default_cache()
    name = key("peaks", environment_key("", device))
    known = _from_stored(cache.get(name))
    if known is None and measure:
        known = measure_peaks(device)
        cache.put(name, dataclasses.asdict(known))
    return known if known is not None else default_peaks(device.platform)


def measure_peaks(device: jax.Device | None = None, *, clock: Clock = time.perf_counter) -> Peaks:
    """Measures the rates of `device`, by default JAX's first, with a few small programs in about a second."""
    device = device if device is not None else jax.devices()[0]
    host = device.platform == "cpu"
    # Large enough to reach the peak, on the host beyond its caches when streaming, and done in milliseconds.
    side, streamed, vector, chain = (512, 1 << 24, 1 << 20, 64) if host else (4096, 1 << 27, 1 << 24, 256)

    def seconds(program: Callable[..., Any], *shapes: tuple[tuple[int, ...], Any]) -> float:
        inputs = [jax.device_put(np.ones(shape, dtype), device) for shape, dtype in shapes]
        compiled = jax.jit(program).lower(*inputs).compile()
        (samples,) = interleaved([lambda: compiled(*inputs)], budget_s=0.06, min_rounds=2, clock=clock)
        return min(samples)

    def dot(dtype: Any, size: int = side) -> float:
        result = jnp.int32 if dtype == jnp.int8 else None
        product = functools.partial(jnp.matmul, preferred_element_type=result)
        return 2 * size**3 / seconds(product, ((size, size), dtype), ((size, size), dtype))

    def multiply_add(x: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = x * 0.5 + 1.0
        return x

    def many_tiny(x: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = lax.dot(x, x)
        return x

    with jax.enable_x64(True):
        dot_f64 = dot(jnp.float64, side if host else side // 2)
    tiny, single = (seconds(program, ((8, 8), jnp.float32)) for program in (many_tiny, lambda x: lax.dot(x, x)))
    return Peaks(
        dot_f32=dot(jnp.float32),
        dot_bf16=dot(jnp.bfloat16, side // 2 if host else side),
        dot_f64=dot_f64,
        dot_i8=dot(jnp.int8),
        vector=2 * chain * vector / seconds(multiply_add, ((vector,), jnp.float32)),
        # Read only: a large fresh output would time the system's page faults instead.
        bandwidth=4 * streamed / seconds(jnp.sum, ((streamed,), jnp.float32)),
        launch_s=max(tiny - single, 1e-9 * chain) / (chain - 1),
    )


def _from_stored(value: Any) -> Peaks | None:
    """Reads rates back; None for what another release stored, or what cannot be a rate."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(Peaks)}:
        return None
    if not all(isinstance(rate, float) and 0.0 < rate < math.inf for rate in value.values()):
        return None
    return Peaks(**value)


def environment_key(rules: str, device: jax.Device | None = None) -> str:
    """Digest of everything outside a program that moves its timings.

    Args:
        rules: hash of the rules that the search may use.
        device: where programs run; by default JAX's first device.
    """
    if device is None:
        device = jax.devices()[0]
    return key(
        rules,
        [device.platform, device.device_kind, len(jax.devices(device.platform)), jax.process_count()],
        device.client.platform_version,
        [_host(), _host_threads(), os.environ.get("NPROC", "")],
        [jax.__version__, jaxlib.__version__],
        [os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")],
        str(jax.config.jax_default_matmul_precision),
        bool(jax.config.jax_enable_x64),
    )


def _host_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _host() -> str:
    """Model and features of the processor: JAX calls them all "cpu", and hosts may share a home."""
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    lines = [host_platform.machine(), host_platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        first = cpuinfo.read().split("\n\n")[0]
        lines += [line for line in first.splitlines() if line.startswith(wanted)]
    return "\n".join(lines)
