"""Which forms of a convolution are offered at all."""

import jax
import numpy as np

from jaxinfer.graph import trace
from jaxinfer.rewrites import convolution
from jaxinfer.rewriting import Rewriter


def _offered(function, *shapes):
    graph = trace(jax.make_jaxpr(function)(*(np.zeros(shape, np.float32) for shape in shapes)))
    return {node.op: offers for node, offers in Rewriter(convolution.RULES).offers(graph).items()}


def _convolve(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_a_small_window_may_be_taken_apart():
    assert "conv_general_dilated" in _offered(_convolve, (1, 14, 14, 8), (5, 5, 8, 8))


def test_the_gradient_of_a_kernel_is_not_taken_apart_pixel_by_pixel():
    """Its window is the whole image: thousands of operations, which take XLA minutes to compile."""

    def of_kernel(x, w, cotangent):
        return jax.linear_transpose(lambda w: _convolve(x, w), w)(cotangent)

    assert not _offered(of_kernel, (1, 56, 56, 8), (3, 3, 8, 8), (1, 56, 56, 8))
