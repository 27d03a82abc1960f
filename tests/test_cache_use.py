"""Many processes, broken files and locked folders: never a wrong result, and one clear warning at most."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest

PROGRAM = """
    import sys, time, warnings
    import numpy as np
    import jax, jax.numpy as jnp
    from jaxinfer import autoinfer

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel, deep, a, x = draw(3, 3, 1, 24), draw(1, 1, 24, 8), draw(48, 48), draw(1, 12, 12, 24)

    def fun(kernel, deep, a, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=24)
        y = jax.nn.relu(jax.lax.conv_general_dilated(y, deep, (1, 1), "SAME", dimension_numbers=dims))
        return y.sum() + (a @ a @ a[0])

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    want = jax.jit(fun)(kernel, deep, a, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = autoinfer.optimize(fun, tune=4.0).freeze(kernel, deep, a)
        compiled.clear()
        print("started", flush=True)
        have = fast(x)
        count = len(compiled)
        program = fast.program(x)
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
    print("verified", program.verified)
    print("compiled", count)
    print("choices", sorted({choice.source for choice in program.improved.choices}))
    print("reason", program.reason)
    for warning in caught:
        print("warning", warning.category.__name__, str(warning.message).replace(chr(10), " "))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def start(script, folder):
    env = {**os.environ, "JAXINFER_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """What it printed, as {word: rest of the line}; its warnings under "warnings"."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    lines = [line.partition(" ")[::2] for line in out.splitlines()]
    return {**dict(lines), "warnings": [rest for word, rest in lines if word == "warning"]}


def run(script, folder):
    return finish(start(script, folder))


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.suffix in (".sqlite", ".sqlite3", ".db"))


@pytest.fixture(scope="module")
def filled(script, tmp_path_factory):
    """A cache folder as one process leaves it, and what that process said."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, run(script, folder)


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def test_a_later_process_uses_the_verdict_of_the_first(script, filled):
    folder, first = filled
    assert first["verified"] == "now" and not first["warnings"]
    second = run(script, folder)
    assert second["verified"] == "earlier" and not second["warnings"]
    assert second["reason"] == first["reason"]
    assert int(second["compiled"]) < int(first["compiled"])
    assert second["choices"] in ("['cached']", "[]")


def test_two_processes_at_once_lose_nothing(script, tmp_path):
    both = [finish(p) for p in [start(script, tmp_path) for _ in range(2)]]
    assert not any(one["warnings"] for one in both)
    (file,) = files(tmp_path)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    # Each timed the forms and may have chosen another one; whoever comes next settles on one for good.
    run(script, tmp_path)
    assert run(script, tmp_path)["verified"] == "earlier"


def test_a_killed_process_leaves_a_usable_cache(script, tmp_path):
    for seconds in (0.2, 1.0):
        process = start(script, tmp_path)
        assert process.stdout.readline().strip() == "started"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    after = run(script, tmp_path)
    assert not after["warnings"]
    assert run(script, tmp_path)["verified"] == "earlier"


@pytest.mark.parametrize("keep", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 5000))])
def test_a_truncated_cache_file(script, filled, tmp_path, keep):
    folder = copied(filled[0], tmp_path / "cache")
    for path in folder.rglob("*"):
        if path.name.endswith(("-wal", "-shm")):
            path.unlink()
    (file,) = files(folder)
    file.write_bytes(file.read_bytes()[:keep])
    first = run(script, folder)
    assert len(first["warnings"]) <= 1
    assert all(str(file) in warning for warning in first["warnings"])
    second = run(script, folder)
    assert second["verified"] == "earlier" and not second["warnings"]


def test_a_file_that_is_no_cache(script, tmp_path, filled):
    (name,) = (file.name for file in files(filled[0]))
    (tmp_path / name).write_text("this is no database\n" * 400)
    first = run(script, tmp_path)
    assert first["verified"] == "now" and len(first["warnings"]) <= 1
    assert run(script, tmp_path)["verified"] == "earlier"


def test_a_folder_that_cannot_be_written(script, tmp_path):
    """A file stands where the folder should be: not even the superuser can write there."""
    (tmp_path / "file").write_text("")
    done = run(script, tmp_path / "file" / "cache")
    assert done["verified"] == "now" and len(done["warnings"]) <= 1
    assert all("cache" in warning for warning in done["warnings"])


def test_a_read_only_folder(script, filled, tmp_path):
    folder = copied(filled[0], tmp_path / "cache")
    for path in [*folder.rglob("*"), folder]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        done = run(script, folder)
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o700)
    assert done["verified"] == "earlier" and len(done["warnings"]) <= 1
