"""The programs `shrink` is judged on are programs: many, of every family, and they run at any batch size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import PROGRAMS
from programs_base import Program

FAMILIES = {
    *("residual", "concat", "grouped", "depthwise", "attention", "recurrent", "scan", "while", "cond", "vmap"),
    *("conv", "dense", "norm", "shared parameters", "embedding", "flatten", "split", "grouped queries", "experts"),
}
RUN = ("flax_mnist_cnn", "flax_seq2seq", "equinox_neural_ode", "jax_vmapped_predict", "own_switch")


def test_names_are_unique() -> None:
    names = [program.name for program in PROGRAMS]
    assert len(set(names)) == len(names)


def test_most_are_third_party() -> None:
    third_party = sum(program.third_party for program in PROGRAMS)
    assert third_party >= 40
    assert third_party >= 0.9 * len(PROGRAMS)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_programs(family: str) -> None:
    assert any(family in program.tags and program.third_party for program in PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_traces_in_float64_at_two_batch_sizes(program: Program) -> None:
    with jax.enable_x64(True):
        made = program.make(jnp.float64)
        assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {np.dtype("float64")}
        for batch in (2, 3):
            outputs = jax.tree.leaves(jax.eval_shape(made.fun, made.params, *made.inputs(batch)))
            assert [out.shape[0] for out in outputs] == [batch] * len(outputs)
            assert {out.dtype for out in outputs} == {np.dtype("float64")}


def _runs(program: Program) -> None:
    """In float32, at two batch sizes; outputs are finite, differ, and are of no extreme size."""
    made = program.make(jnp.float32)
    run = jax.jit(made.fun)
    for batch in (2, 3):
        for out in jax.tree.leaves(run(made.params, *made.inputs(batch))):
            assert out.shape[0] == batch
            assert np.isfinite(out).all()
            assert 1e-3 < np.std(out) < 100


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.name in RUN], ids=lambda program: program.name)
def test_runs(program: Program) -> None:
    _runs(program)


@pytest.mark.slow
@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.name not in RUN], ids=lambda program: program.name)
def test_runs_too(program: Program) -> None:
    _runs(program)
