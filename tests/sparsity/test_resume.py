"""Runs that are killed, and go on as if nothing had happened."""

import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax.numpy as jnp
import killed_run
import pytest
from killed_run import EVERY, STEPS
from masking import batch

from jaxinfer import autoinfer

pytest.importorskip("orbax.checkpoint")


@pytest.mark.parametrize(("method", "step"), [("L0", 14), pytest.param("Taylor", 23, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_masks(tmp_path, method, step):
    """The kill comes while masks are searched for (14), and after they were settled (23 of 30)."""
    child = subprocess.run([sys.executable, killed_run.__file__, tmp_path, method, str(step)], timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert max(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == step // EVERY * EVERY
    seen = []
    resumed = killed_run.run(tmp_path, method, lambda s: seen.append(s) or batch(s))
    assert seen == list(range(step // EVERY * EVERY, STEPS))
    whole = killed_run.run(None, method)
    chex.assert_trees_all_equal(resumed.masks, whole.masks)
    chex.assert_trees_all_equal(resumed.params, whole.params)
    assert [row["step"] for row in resumed.history] == [row["step"] for row in whole.history]
    # A run that is complete gives its result again, without a step.
    again = killed_run.run(tmp_path, method, lambda s: pytest.fail("a step was made"))
    chex.assert_trees_all_equal(again.params, whole.params)


def test_errors_lose_nothing(tmp_path):
    """A folder of other settings; a loss that turns NaN; what is wrong with the batches."""

    def broken(step):
        x, y = batch(step)
        return (x * jnp.nan if step == 10 else x), y

    with pytest.raises(autoinfer.Diverged, match="at step 10 of 30") as caught:
        killed_run.run(tmp_path, "L0", broken)
    assert caught.value.step == 10 and caught.value.last.masks is None
    before = killed_run.run(None, "L0", iter([batch(s) for s in range(STEPS)]))
    mended = killed_run.run(tmp_path, "L0")
    chex.assert_trees_all_equal(mended.params, before.params)
    with pytest.raises(autoinfer.CheckpointMismatch, match="another method"):
        killed_run.run(tmp_path, "Taylor")


def test_running_out_of_batches_keeps_what_there_is(tmp_path):
    few = [batch(s) for s in range(7)]
    with pytest.raises(autoinfer.BatchesExhausted, match="batches ended at step 7 of 30") as caught:
        killed_run.run(tmp_path, "L0", iter(few))
    assert caught.value.last.step == 7
    assert (Path(tmp_path) / "7").is_dir()


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install orbax-checkpoint, or jaxinfer\[sparsity\]"):
        killed_run.run(tmp_path, "L0")
