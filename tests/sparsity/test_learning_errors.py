"""What learn_masks refuses, and how it says so."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from masking import X, batch, loss, mlp, mlp_params

from jaxinfer import autoinfer
from jaxinfer.autoinfer import L0, NM, Target, TargetError
from jaxinfer.sparsity.learning.batches import Feed


def learn(target=0.3, loss=loss, params=None, batches=batch, steps=2, **options):
    params = mlp_params() if params is None else params
    return autoinfer.learn_masks(
        loss, params, batches, target, optax.adam(1e-2), steps=steps, progress=False, **options
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "given: none"),
        ({"fraction": 0.1, "flops": 0.1}, "given: fraction, flops"),
        ({"fraction": 0.0}, "prunes everything"),
        ({"bytes": -0.5}, "prunes everything"),
        ({"flops": 1.5}, "more than there is"),
    ],
)
def test_targets_that_make_no_sense(target, message):
    with pytest.raises(TargetError, match=message):
        Target(**target)


def test_targets_that_cannot_be_met():
    with pytest.raises(TargetError, match="cannot be met: with one unit left of each of the 3 layers"):
        learn(1e-4)
    # The last layer's biases and one neuron of each layer stay in any case.
    with pytest.raises(TargetError, match=r"flops=0\.001 cannot be met"):
        learn(Target(flops=0.001), granularity="channel", fun=mlp, args=(X[:2],))
    with pytest.raises(TargetError, match=r"2:4 leaves 0\.5 of the fraction, not 0\.3"):
        learn(0.3, granularity=NM(2, 4))
    with pytest.raises(TargetError, match="give fun= and args="):
        learn(Target(flops=0.5))
    with pytest.raises(TargetError, match="say how much is to be left"):
        learn(None)


def test_what_is_to_be_pruned():
    with pytest.raises(ValueError, match="pruning by channel needs to know what goes together"):
        learn(granularity="channel")
    with pytest.raises(ValueError, match="no such group; there are channel, input"):
        learn(granularity="head", fun=mlp, args=(X[:2],))
    with pytest.raises(ValueError, match="prune says no to every parameter"):
        learn(prune=lambda name, leaf: False)
    with pytest.raises(ValueError, match="no parameter has two axes or more"):
        learn(params={"bias": jnp.zeros(3)})
    groups = autoinfer.channel_groups(mlp, mlp_params((16, 8)), X[:2])
    with pytest.raises(ValueError, match="that the parameters to train do not have"):
        learn(params=mlp_params((10, 8)), granularity="channel", groups=groups)


def test_losses_that_are_none():
    with pytest.raises(TypeError, match=r"the loss returned float32\[32, 3\], not a floating-point scalar"):
        learn(loss=lambda p, b: mlp(p, b[0]))
    with pytest.raises(TypeError, match="say has_aux=True"):
        learn(loss=lambda p, b: (loss(p, b), {}))
    with pytest.raises(TypeError, match="has_aux=True is for losses that do"):
        learn(has_aux=True)
    with pytest.raises(TypeError, match=r"int32\[\]"):
        learn(loss=lambda p, b: jnp.int32(0))


def test_a_gradient_that_is_not_finite_is_found_where_it_happens():
    """The loss itself is finite: the parameters of the step before are kept, however late it is seen."""

    def treacherous(params, batch):
        x, y, bad = batch
        return loss(params, (x, y)) + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.square(params["layer0"]["kernel"]).sum())

    def batches(step):
        return (*batch(step), np.asarray(step == 6))

    with pytest.raises(autoinfer.Diverged, match="at step 6 of 200") as caught:
        learn(loss=treacherous, batches=batches, steps=200)
    before = learn(loss=treacherous, batches=batches, steps=6, method=L0(search=1.0, warmup=1.0))
    assert caught.value.last.step == 6 and len(before.history) == 6
    assert np.isfinite(np.asarray(caught.value.last.params["layer0"]["kernel"])).all()


def test_steps_and_batches():
    with pytest.raises(ValueError, match="say how many steps"):
        learn(steps=None)
    with pytest.raises(ValueError, match="negative"):
        learn(steps=-1)
    with pytest.raises(ValueError, match="it needs more than steps=0"):
        learn(steps=0)
    with pytest.raises(ValueError, match="Taylor scores come from training"):
        learn(method=autoinfer.Taylor(autoinfer.Cubic(0, 0)))
    assert learn(steps=None, batches=[batch(0), batch(1), batch(2)]).step == 3


def test_batches_by_step():
    assert [Feed(lambda step: 10 * step, 3, 9)(s) for s in (3, 4)] == [30, 40]
    feed = Feed(["a", "b", "c"], 4, 9)  # a resumed run: the second of the second round
    assert [feed(s) for s in range(4, 8)] == ["b", "c", "a", "b"]

    class Rounds:
        def __iter__(self):
            return iter("ab")

    feed = Feed(Rounds(), 3, 9)  # of unknown length
    assert [feed(s) for s in range(3, 6)] == ["b", "a", "b"]
    feed = Feed(iter("abc"), 1, 9)
    assert [feed(s) for s in (1, 2)] == ["b", "c"]
    with pytest.raises(autoinfer.BatchesExhausted, match="at step 3 of 9"):
        feed(3)
    with pytest.raises(autoinfer.BatchesExhausted):
        Feed([], 0, 9)(0)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"search": 0.0}, {"open": 1.0}, {"warmup": 1.5}, {"damping": -1.0}])
def test_settings_of_l0(wrong):
    with pytest.raises(ValueError):
        L0(**wrong)
