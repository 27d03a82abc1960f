"""Networks for digits have the sizes that the literature gives them."""

import jax
import numpy as np

from jaxinfer.models.lenet import LeNet5
from jaxinfer.models.mlp import MLP
from jaxinfer.models.resnet import ResNet


def parameters(module, *shape):
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), np.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_lenet_300_100():
    assert parameters(MLP((300, 100, 10)), 784) == 266_610  # Louizos et al., 2018; Han et al., 2015: 267k


def test_lenet_5():
    assert parameters(LeNet5(), 28, 28, 1) == 431_080  # Caffe's; Han et al., 2015: 431k


def test_lenet_5_is_made_of_convolutions_and_products():
    module = LeNet5((2, 3), 4, 5)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 28, 28, 1)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    p = jax.tree.map(np.asarray, variables["params"])
    y = x
    for name in ("conv0", "conv1"):
        windows = np.lib.stride_tricks.sliding_window_view(y, (5, 5), axis=(1, 2))
        y = np.einsum("bhwcij,ijco->bhwo", windows, p[name]["kernel"]) + p[name]["bias"]
        b, h, w, c = y.shape
        y = np.maximum(y.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4)), 0)
    hidden = np.maximum(y.reshape(2, -1) @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
    expected = hidden @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_a_residual_network_for_digits_keeps_its_first_images_large():
    module = ResNet((1, 1), width=4, classes=10, stem=3, pool=False)
    x = np.zeros((1, 28, 28, 1), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 1, 4)
    _, state = jax.eval_shape(lambda v: module.apply(v, x, capture_intermediates=True), variables)
    shapes = {k: v["__call__"][0].shape for k, v in state["intermediates"].items() if k != "__call__"}
    assert shapes["stem"] == (1, 14, 14, 4)
    assert shapes["stage0_block0"] == (1, 14, 14, 4) and shapes["stage1_block0"] == (1, 7, 7, 8)
