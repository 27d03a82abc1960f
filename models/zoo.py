"""The registry: every model by name, with variables, example inputs and a loss.

Example::

    model = load("mobilenetv2")
    model.apply(model.variables, *model.inputs)
    fast = autoinfer.optimize(model.apply).freeze(*model.known)
    fast(*model.live)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxinfer.models import efficientnet, examples, g2p, losses, minilm
from jaxinfer.models.cnn import CNN
from jaxinfer.models.graph import GCN
from jaxinfer.models.initialise import random_variables
from jaxinfer.models.mlp import MLP
from jaxinfer.models.mobilenet import MobileNetV2
from jaxinfer.models.recommender import TwoTower
from jaxinfer.models.recurrent import Recurrent
from jaxinfer.models.resnet import BasicBlock, Bottleneck, ResNet
from jaxinfer.models.speech import SpeechCTC
from jaxinfer.models.transformer import Decoder, Encoder
from jaxinfer.models.vit import ViT

SEED = 0


@dataclass(frozen=True)
class Size:
    """A model at one size, and inputs that fit it."""

    module: nn.Module
    inputs: examples.MakeInputs


@dataclass(frozen=True)
class Published:
    """Weights from elsewhere, and real inputs to go with them."""

    weights: Callable[[], Any]
    inputs: examples.MakeInputs


@dataclass(frozen=True)
class Entry:
    """One line of the registry.

    Attributes:
        full: the model as users run it.
        tiny: the same architecture, small enough to differentiate in float64 in a second.
        loss: (outputs, *inputs) → scalar.
        gain: of the random kernels; see `random_variables`.
        frozen_inputs: how many leading inputs are known before a request comes.
        published: pretrained weights for `full`, if there are any.
    """

    full: Size
    tiny: Size
    loss: Callable[..., jax.Array]
    gain: float = 1.0
    frozen_inputs: int = 0
    published: Published | None = None


@dataclass(frozen=True)
class Model:
    """A model ready to run, in inference mode.

    Attributes:
        name: its name in ZOO.
        module: the Flax module.
        variables: its parameters and statistics.
        inputs: example inputs for batch 1.
        make_inputs: batch → example inputs.
        loss: (variables, *inputs) → scalar, differentiable with respect to every variable.
        frozen_inputs: how many leading inputs are known before a request comes (a recommender's items).
        pretrained: whether the variables are published weights.
    """

    name: str
    module: nn.Module
    variables: Any
    inputs: tuple[jax.Array, ...]
    make_inputs: Callable[[int], tuple[jax.Array, ...]]
    loss: Callable[..., jax.Array]
    frozen_inputs: int
    pretrained: bool

    @property
    def apply(self) -> Callable[..., Any]:
        """(variables, *inputs) → outputs."""
        return self.module.apply

    @property
    def known(self) -> tuple[Any, ...]:
        """The leading arguments of `apply` known before a request comes: variables and frozen inputs."""
        return (self.variables, *self.inputs[: self.frozen_inputs])

    @property
    def live(self) -> tuple[jax.Array, ...]:
        """The example inputs that come with a request."""
        return self.inputs[self.frozen_inputs :]


def load(
    name: str, *, tiny: bool = False, pretrained: bool = True, dtype: Any = jnp.float32, seed: int = SEED
) -> Model:
    """A model of the zoo with variables and inputs; equal arguments give equal models.

    Args:
        name: one of ZOO.
        tiny: the small variant, always with random variables.
        pretrained: use published weights where the model has some; False draws random ones.
        dtype: of variables and inputs that are not integers; float64 needs jax_enable_x64.
        seed: of the random variables and inputs.

    Raises:
        ValueError: there is no such model, or published weights do not fit it.
        ModuleNotFoundError: the package with the published weights is not installed.
    """
    if name not in ZOO:
        raise ValueError(f"no model {name!r} in the zoo; there are {', '.join(ZOO)}")
    entry = ZOO[name]
    size = entry.tiny if tiny else entry.full
    published = entry.published if pretrained and not tiny else None
    draw = published.inputs if published else size.inputs

    def place(leaf: np.ndarray) -> jax.Array:
        return jnp.asarray(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else leaf.dtype)

    def make_inputs(batch: int) -> tuple[jax.Array, ...]:
        return tuple(map(place, draw(np.random.default_rng(seed), batch)))

    def loss(variables: Any, *inputs: jax.Array) -> jax.Array:
        return entry.loss(size.module.apply(variables, *inputs), *inputs)

    inputs = make_inputs(1)
    if published:
        variables = published.weights()
        _check_fit(name, size.module, variables, inputs)
    else:
        variables = random_variables(size.module, inputs, seed, entry.gain)
    return Model(
        name=name,
        module=size.module,
        variables=jax.tree.map(place, variables),
        inputs=inputs,
        make_inputs=make_inputs,
        loss=loss,
        frozen_inputs=entry.frozen_inputs,
        pretrained=published is not None,
    )


def _check_fit(name: str, module: nn.Module, variables: Any, inputs: tuple[jax.Array, ...]) -> None:
    expected = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    wanted = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(expected)}
    given = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(variables)}
    wrong = [path for path in sorted(wanted | given) if wanted.get(path) != given.get(path)]
    if wrong:
        lines = [f"{path}: the model has {wanted.get(path)}, the file {given.get(path)}" for path in wrong]
        raise ValueError(f"the published weights of {name} do not fit the model: {'; '.join(lines)}")


ZOO: dict[str, Entry] = {
    "mlp": Entry(
        full=Size(MLP(), examples.normal(784)),
        tiny=Size(MLP((16, 12, 5)), examples.normal(8)),
        loss=losses.classification,
        gain=2.0,
    ),
    "cnn": Entry(
        full=Size(CNN(), examples.normal(32, 32, 3)),
        tiny=Size(CNN((4, 6), 8, 5), examples.normal(8, 8, 3)),
        loss=losses.classification,
        gain=2.0,
    ),
    "resnet18": Entry(
        full=Size(ResNet(), examples.normal(224, 224, 3)),
        tiny=Size(ResNet((1, 1), BasicBlock, 4, 5), examples.normal(16, 16, 3)),
        loss=losses.classification,
        gain=2.0,
    ),
    "resnet50": Entry(
        full=Size(ResNet((3, 4, 6, 3), Bottleneck), examples.normal(224, 224, 3)),
        tiny=Size(ResNet((1, 1), Bottleneck, 4, 5), examples.normal(16, 16, 3)),
        loss=losses.classification,
        gain=2.0,
    ),
    "mobilenetv2": Entry(
        full=Size(MobileNetV2(), examples.normal(224, 224, 3)),
        tiny=Size(MobileNetV2(((1, 4, 1, 1), (3, 6, 2, 2)), 4, 8, 5), examples.normal(16, 16, 3)),
        loss=losses.classification,
        gain=2.0,
    ),
    "efficientnet_lite0": Entry(
        full=Size(efficientnet.EfficientNetLite(), examples.normal(224, 224, 3)),
        tiny=Size(
            efficientnet.EfficientNetLite(((1, 4, 1, 1, 3), (3, 6, 2, 2, 5)), 4, 8, 5),
            examples.normal(16, 16, 3),
        ),
        loss=losses.classification,
        gain=2.0,
        published=Published(efficientnet.published_weights, examples.photographs),
    ),
    "lstm": Entry(
        full=Size(Recurrent(256, nn.LSTMCell), examples.normal(128, 128)),
        tiny=Size(Recurrent(6, nn.LSTMCell), examples.normal(5, 4)),
        loss=losses.regression,
    ),
    "lstm_optimized": Entry(
        full=Size(Recurrent(256, nn.OptimizedLSTMCell), examples.normal(128, 128)),
        tiny=Size(Recurrent(6, nn.OptimizedLSTMCell), examples.normal(5, 4)),
        loss=losses.regression,
    ),
    "gru": Entry(
        full=Size(Recurrent(256, nn.GRUCell), examples.normal(128, 128)),
        tiny=Size(Recurrent(6, nn.GRUCell), examples.normal(5, 4)),
        loss=losses.regression,
    ),
    "encoder": Entry(
        full=Size(Encoder(), examples.tokens(4096, 128)),
        tiny=Size(Encoder(11, 6, 2, 8, 2), examples.tokens(11, 6)),
        loss=losses.regression,
    ),
    "decoder": Entry(
        full=Size(Decoder(), examples.tokens(4096, 128)),
        tiny=Size(Decoder(11, 6, 2, 8, 2), examples.tokens(11, 6)),
        loss=losses.next_token,
    ),
    "vit": Entry(
        full=Size(ViT(), examples.normal(224, 224, 3)),
        tiny=Size(ViT(4, 2, 8, 2, 5), examples.normal(8, 8, 3)),
        loss=losses.classification,
    ),
    "gcn": Entry(
        full=Size(GCN(), examples.network(512, 64)),
        tiny=Size(GCN((6, 5, 3)), examples.network(9, 4)),
        loss=losses.classification,
        gain=2.0,
        frozen_inputs=1,
    ),
    "two_tower": Entry(
        full=Size(TwoTower(), examples.catalogue(2000, 64, 64, 20)),
        tiny=Size(TwoTower(12, 4, (8, 6)), examples.catalogue(12, 3, 3, 4)),
        loss=losses.classification,
        frozen_inputs=2,
    ),
    "ctc": Entry(
        full=Size(SpeechCTC(), examples.normal(200, 80)),
        tiny=Size(SpeechCTC((2, 3), 4, 1, 5), examples.normal(16, 8)),
        loss=losses.ctc,
    ),
    "minilm": Entry(
        full=Size(minilm.MiniLM(), examples.masked_tokens(30522, 128)),
        tiny=Size(minilm.MiniLM(11, 8, 2, 8, 2), examples.masked_tokens(11, 8)),
        loss=losses.regression,
        published=Published(minilm.published_weights, examples.sentences),
    ),
    "g2p": Entry(
        full=Size(g2p.G2P(), examples.words),
        tiny=Size(g2p.G2P(hidden=6, steps=4), examples.words),
        loss=losses.spelling,
        published=Published(g2p.published_weights, examples.words),
    ),
}
"""Every model by name."""
