"""Kernels read and write nothing beyond their arrays, with vectors of every length that this processor can have."""

import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from compiled_c import build

KERNELS = ("convolution.c", "depthwise.c", "team.c")
WATCHED = "-fsanitize=address,undefined -fno-sanitize-recover=all".split()
# The same sources for processors with shorter vectors.
PROCESSORS = {"native": ["-march=native"], "AVX2": ["-mavx2", "-mfma"], "SSE2": ["-march=x86-64"], "any": []}
# No larger than what is computed together on any processor.
POOLS = ((2, 2), (1, 2), (3, 1), (2, 3))


def cases(count):
    """Calls of random shapes, as the numbers that the program reads."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        kernel, depth, features = rng.integers(2), rng.integers(1, 70), rng.integers(1, 100)
        if rng.random() < 0.3:
            # A product of matrices: no window to speak of.
            images, window, strides, padding, dilation = (1, 1, rng.choice((1, 40))), (1, 1), (1, 1), (0,) * 4, (1, 1)
        else:
            images, window = (rng.integers(1, 3), *rng.integers(1, 12, 2)), rng.integers(1, 6, 2)
            strides, padding = rng.integers(1, 3, 2), rng.integers(0, 4, 4)
            dilation = (1, 1) if rng.random() < 0.5 else rng.integers(1, 3, 2)
        terms = rng.integers(0, 2, 2)
        pool = (1, 1)
        if kernel == 0 and rng.random() < 0.3:
            pool, terms[1] = POOLS[rng.integers(len(POOLS))], 0
        yield kernel, *images, depth, *window, features, *strides, *padding, *dilation, *terms, *pool


LINES = "".join(" ".join(map(str, case)) + "\n" for case in cases(400))


def run(path):
    done = subprocess.run([path], input=LINES, capture_output=True, text=True, timeout=240)
    if done.returncode == -signal.SIGILL:
        pytest.skip("this processor has no such vectors")
    assert done.returncode == 0 and not done.stderr, done.stderr[:3000]
    return done.stdout


@pytest.mark.parametrize("processor", PROCESSORS)
def test_vectors_of_every_length(processor, kernels, tmp_path):
    path = build(tmp_path, "kernel_harness.c", KERNELS, "-O2", *PROCESSORS[processor])
    if not isinstance(path, Path):
        pytest.skip(f"nothing for {processor}: {path.strip().splitlines()[-1]}")
    out = run(path)
    assert out.startswith("400 calls")
    if processor == "native":
        assert out.endswith(f"panels of {kernels.panel}\n")


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_nothing_beyond_the_arrays(processor, kernels, tmp_path):
    path = build(tmp_path, "kernel_harness.c", KERNELS, "-O1", *WATCHED, *PROCESSORS[processor])
    if not isinstance(path, Path):
        pytest.skip(f"no AddressSanitizer, or nothing for {processor}: {path.strip().splitlines()[-1]}")
    run(path)
