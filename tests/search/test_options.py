"""Compiler options that are tried on whole programs."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.search.options import compiler_options, known


def test_every_trial_is_one_that_this_compiler_takes():
    trials = compiler_options("cpu", 0.0)
    for trial in trials:
        double = jax.jit(lambda x: 2 * x, compiler_options=dict(trial.options))
        assert double(jnp.float32(3)) == 6
    assert len({trial.words for trial in trials}) == len(trials)


def test_long_programs_are_not_compiled_with_what_helps_short_ones():
    short, long = compiler_options("cpu", 1e-5), compiler_options("cpu", 1.0)
    assert [t.words for t in long] == [t.words for t in short if t.longest_s >= 1.0]


@pytest.mark.parametrize("platform", ["tpu", "other"])
def test_other_platforms_have_none(platform):
    assert compiler_options(platform, 0.0) == ()


def test_an_option_that_does_not_exist_is_unknown():
    assert not known({"xla_no_such_option": "1"})
