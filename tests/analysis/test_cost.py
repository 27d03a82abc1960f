"""Operations and bytes, counted by hand; estimates that order forms as machines do."""

import jax.numpy as jnp
import pytest
from jax import lax

from jaxinfer.analysis.cost import cost, seconds
from jaxinfer.graph import trace_function
from jaxinfer.search.device import default_peaks


def _cost(fun, *shapes):
    return cost(trace_function(fun, *(jnp.ones(s, jnp.float32) for s in shapes)))


def test_a_product_is_two_operations_for_each_multiply_add():
    work = _cost(lambda x, w: [x @ w], (3, 5), (5, 7))
    assert work.flops == 2 * 3 * 5 * 7
    assert work.nbytes == 4 * (3 * 5 + 5 * 7 + 3 * 7)


@pytest.mark.parametrize(("groups", "inner"), [(1, 4), (2, 2), (4, 1)])
def test_a_convolution_counts_its_window_and_its_groups(groups, inner):
    def program(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return [lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups)]

    work = _cost(program, (1, 8, 8, 4), (3, 3, inner, 8))
    assert work.flops == 2 * (4 * 4 * 8) * (3 * 3 * inner)


def test_loops_multiply_and_branches_count_the_dearest():
    def loop(x):
        return [lax.scan(lambda c, _: (c @ x, None), x, None, length=6)[0]]

    def branch(x):
        return [lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x)]

    once = _cost(lambda x: [x @ x], (8, 8)).flops
    assert _cost(loop, (8, 8)).flops == 6 * once
    assert once <= _cost(branch, (8, 8)).flops <= once + 100


def test_moving_data_computes_nothing():
    assert _cost(lambda x: [jnp.transpose(x).reshape(-1)[::-1]], (8, 8)).flops == 0


def test_fused_elementwise_work_reads_and_writes_once():
    work = _cost(lambda x: [jnp.tanh(x * 2 + 1)], (1000,))
    assert work.nbytes == pytest.approx(2 * 4 * 1000, abs=16)  # and two literals


def test_depthwise_convolutions_are_estimated_as_slow_on_cpu_only():
    def depthwise(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return [lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=96)]

    def shifted(x, w):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return [sum(padded[:, i : i + 56, j : j + 56] * w[i, j, 0] for i in range(3) for j in range(3))]

    forms = [trace_function(f, jnp.ones((1, 56, 56, 96)), jnp.ones((3, 3, 1, 96))) for f in (depthwise, shifted)]
    on_cpu = [seconds(g, default_peaks("cpu"), "cpu") for g in forms]
    assert on_cpu[1] < on_cpu[0] / 4
