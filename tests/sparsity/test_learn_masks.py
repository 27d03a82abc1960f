"""Masks learned on small problems: targets, trees, methods."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from masking import X, accuracy, batch, loss, mlp, mlp_params

from jaxinfer import autoinfer
from jaxinfer.autoinfer import L0, NM, Block, Cubic, Distillation, Magnitude, StraightThrough, Target, Taylor
from jaxinfer.sparsity.learning.division import divide

METHODS = [L0(), Magnitude(Cubic(every=10)), StraightThrough(Cubic(every=10)), Taylor(Cubic(every=10))]
ADAM = optax.adam(1e-2)


def learn(target=0.3, method=METHODS[1], steps=60, params=None, **options):
    params = mlp_params() if params is None else params
    options = {"optimizer": ADAM, "progress": False} | options
    return autoinfer.learn_masks(
        options.pop("loss", loss), params, options.pop("batches", batch), target, method=method, steps=steps, **options
    )


def kernels(tree):
    return [layer["kernel"] for layer in tree.values()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_what_matters_is_kept(method):
    """At 20 % of the entries the classes are still told apart, by the four features that say anything."""
    result = learn(0.2, method, steps=300)
    assert accuracy(result.params) > 0.9
    first = np.asarray(result.masks["layer0"]["kernel"])
    assert first[:4].mean() > 1.5 * first[4:].mean()
    assert sum(int(m.sum()) for m in kernels(result.masks)) == int(0.2 * sum(m.size for m in kernels(result.masks)))
    assert jax.tree.structure(result.params) == jax.tree.structure(mlp_params())
    for p, m in zip(kernels(result.params), kernels(result.masks)):
        assert m.dtype == bool and m.shape == p.shape
        np.testing.assert_array_equal(np.asarray(p)[~np.asarray(m)], 0)
        assert np.all(np.asarray(p)[np.asarray(m)] != 0)
    assert all(layer["bias"] is None for layer in result.masks.values())
    assert result.history[-1]["step"] == result.step == 300


@pytest.mark.parametrize(
    ("granularity", "by_layer"),
    [("element", False), ("element", True), ("row", False), ("column", True), (Block(3, 2), False)],
)
def test_fractions_are_met(granularity, by_layer):
    units = divide(mlp_params(), granularity, Target(fraction=0.45))
    scores = jax.random.normal(jax.random.key(0), (units.size,))
    keep = jax.jit(lambda s: units.select(s, "fraction", 0.45, by_layer))(scores)
    masks = kernels(units.masks(keep))
    sizes = [m.size for m in masks]
    left = sum(int(m.sum()) for m in masks) / sum(sizes)
    unit = {"element": 1, "row": 16, "column": 16}.get(str(granularity), 6) / sum(sizes)
    assert 0.45 - max(0.01, unit) <= left <= 0.45
    assert units.left(keep)["fraction"] == pytest.approx(left, rel=1e-5)
    if by_layer and granularity == "element":
        for mask in masks:
            assert float(mask.mean()) == pytest.approx(0.45, abs=1.5 / mask.size)


def test_bytes_count_what_cannot_be_pruned():
    params = mlp_params() | {"table": jnp.arange(200)}
    result = learn(Target(bytes=0.7), Magnitude(Cubic(every=10)), 30, params, loss=lambda p, b: loss(_network(p), b))
    arrays = jax.tree.leaves(params)
    total = sum(x.size * x.dtype.itemsize for x in arrays)
    gone = sum(int((~m).sum()) * 4 for m in kernels(_network(result.masks)))
    assert 0.7 - 0.01 <= (total - gone) / total <= 0.7
    assert result.masks["table"] is None
    np.testing.assert_array_equal(result.params["table"], params["table"])


def _network(tree):
    return {name: layer for name, layer in tree.items() if name != "table"}


def test_flops_are_those_of_the_products():
    """One kernel is used by a loop: its entries count four times."""
    params = {"once": jnp.ones((8, 8)), "often": jnp.ones((8, 8)), "never": jnp.ones((8, 8))}
    params = jax.tree.map(lambda x, k: x + jax.random.normal(k, x.shape), params, _keys(params))

    def fun(p, x):
        x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["often"]), None), x @ p["once"], length=4)
        return x + p["never"].sum()

    target = Target(flops=0.5)
    result = learn(
        target,
        Magnitude(Cubic(0, 0)),
        1,
        params,
        loss=lambda p, b: fun(p, b[0][:, :8]).mean(),
        fun=fun,
        args=(X[:, :8],),
    )
    work = sum(int(m.sum()) * times for m, times in zip(jax.tree.leaves(result.masks), (0, 4, 1)))
    names = sorted(params)
    assert names == ["never", "often", "once"]
    assert 0.5 - 4 / 320 <= work / (5 * 64) <= 0.5
    assert result.left["flops"] == pytest.approx(work / (5 * 64))


def _keys(tree):
    return jax.tree.unflatten(jax.tree.structure(tree), list(jax.random.split(jax.random.key(1), len(tree))))


@pytest.mark.parametrize("measure", ["fraction", "flops", "bytes"])
def test_channels_meet_targets(measure):
    """Whatever the scores are; the three measures counted anew from the masks."""
    units = divide(mlp_params(), "channel", Target(**{measure: 0.37}), fun=mlp, args=(X[:4],))
    select = jax.jit(lambda s: units.select(s, measure, 0.37))
    for seed in range(3):
        masks = units.masks(select(jax.random.normal(jax.random.key(seed), (units.size,))))
        rows, columns = ([np.asarray(m).any(1 - axis) for m in kernels(masks)] for axis in (0, 1))
        # A neuron is gone with its column, its bias and the row that reads it.
        for here, there, layer in zip(columns, rows[1:], masks.values()):
            np.testing.assert_array_equal(here, there)
            np.testing.assert_array_equal(here, layer["bias"])
        macs = [int(r.sum() * c.sum()) for r, c in zip(rows, columns)]
        assert [int(m.sum()) for m in kernels(masks)] == macs
        entries = sum(macs) + sum(int(c.sum()) for c in columns)
        # The biases of the last layer belong to no unit that can go.
        known = {"flops": sum(macs) / 344, "bytes": entries / 371, "fraction": (entries - 3) / 368}
        # The largest unit is a neuron of the first layer, with all that reads it.
        assert 0.37 - max(0.01, 21 / 344) <= known[measure] <= 0.37
    assert units.left(select(jax.random.normal(jax.random.key(2), (units.size,)))) == pytest.approx(known, rel=1e-5)


def test_gates_of_channels():
    """L0 as it is by default, to a share of the multiply-accumulates."""
    result = learn(Target(flops=0.37), None, 300, granularity="channel", fun=mlp, args=(X[:4],))
    assert 0.37 - 21 / 344 <= result.left["flops"] <= 0.37
    assert accuracy(result.params) > 0.9
    # The features that say anything are kept, most others are gone.
    features = np.asarray(result.masks["layer0"]["kernel"]).any(1)
    assert features[:4].all() and features[4:].sum() <= 3


def test_heads_go_as_a_whole():
    heads, width = 4, 3

    def fun(p, x):
        q, k, v = (jnp.einsum("td,dhw->thw", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("thw,shw->hts", q, k))
        return jnp.einsum("hts,shw,hwd->td", weights, v, p["o"])

    shapes = {"q": (6, heads, width), "k": (6, heads, width), "v": (6, heads, width), "o": (heads, width, 6)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 4)))
    params = {name: jax.random.normal(keys[name], shape) for name, shape in shapes.items()}
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    result = learn(
        0.5,
        Magnitude(Cubic(0, 0)),
        1,
        params,
        loss=lambda p, b: jnp.square(fun(p, b) - 1).mean(),
        batches=[x],
        granularity="head",
        fun=fun,
        args=(x,),
    )
    gone = {name: ~np.asarray(mask).any(tuple(a for a in range(3) if a != (0 if name == "o" else 1)))
            for name, mask in result.masks.items()}  # fmt: skip
    assert gone["q"].sum() == 2
    for name in "kvo":
        np.testing.assert_array_equal(gone[name], gone["q"])


def test_two_of_four_needs_no_target():
    result = learn(None, METHODS[2], 30, granularity=NM(2, 4))
    for mask in kernels(result.masks):
        np.testing.assert_array_equal(np.asarray(mask).reshape(-1, 4, mask.shape[1]).sum(1), 2)


def test_prune_says_which():
    result = learn(0.3, steps=20, prune=lambda name, leaf: name == "layer1/kernel")
    assert [layer["kernel"] is None for layer in result.masks.values()] == [True, False, True]
    assert int(result.masks["layer1"]["kernel"].sum()) == int(0.3 * 16 * 8)


def test_bfloat16():
    params = mlp_params(dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(learn(0.5, METHODS[2], 10, params).params, params)


def test_float64():
    with jax.enable_x64(True):
        params = mlp_params(dtype=jnp.float64)
        chex.assert_trees_all_equal_shapes_and_dtypes(learn(0.5, METHODS[0], 10, params).params, params)


def test_batch_statistics_are_carried_and_not_pruned():
    """A Flax variables dictionary: one collection is trained, the other returned by the loss."""
    variables = {"params": mlp_params(), "batch_stats": {"mean": jnp.zeros(12), "count": jnp.zeros((), jnp.int32)}}

    def with_statistics(variables, batch):
        x, y = batch
        stats = variables["batch_stats"]
        mean = 0.9 * stats["mean"] + 0.1 * x.mean(0)
        new = {"mean": mean, "count": stats["count"] + 1}
        value = loss(variables["params"], (x - mean, y))
        return value, {"batch_stats": new, "accuracy": jnp.float32(0.5)}

    result = learn(0.3, METHODS[0], 30, variables, loss=with_statistics, has_aux=True)
    assert int(result.params["batch_stats"]["count"]) == 30
    mean = np.zeros(12)
    for step in range(30):
        mean = 0.9 * mean + 0.1 * batch(step)[0].mean(0)
    np.testing.assert_allclose(result.params["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-6)
    assert jax.tree.leaves(result.masks["batch_stats"]) == []
    assert result.history[-1]["accuracy"] == 0.5


def test_leaves_that_are_no_arrays_stay():
    params = {"network": mlp_params(), "name": "mine", "activation": jax.nn.relu}
    result = learn(0.3, steps=10, params=params, loss=lambda p, b: loss(p["network"], b))
    assert result.params["name"] == "mine" and result.params["activation"] is jax.nn.relu


def test_a_step_is_compiled_once():
    params = mlp_params()
    before = jax.tree.map(np.array, params)
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    learn(0.3, METHODS[0], 40, params, loss=counted)
    # Once to look at its type, once while masks are searched for, once under settled ones.
    assert len(traces) == 3
    chex.assert_trees_all_equal(params, before)  # steps take over their arrays, not the user's


def test_distillation_follows_the_teacher():
    """With nothing but the teacher to learn from, labels do not matter."""
    dense = learn(1.0, steps=200).params
    teach = Distillation(lambda p, b: mlp(p, b[0]), weight=1.0, temperature=3.0)
    wrong = lambda step: (batch(step)[0], 0 * batch(step)[1])  # noqa: E731
    taught = learn(0.3, steps=200, params=dense, batches=wrong, distillation=teach)
    assert accuracy(taught.params) > 0.9


def test_distances_of_distillation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 5))
    identity = lambda outputs, _: outputs  # noqa: E731
    soft = Distillation(identity, temperature=2.0).loss(jnp.asarray(a), jnp.asarray(b), None)
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (b, a))
    assert float(soft) == pytest.approx(4 * np.mean(np.sum(p * np.log(p / q), -1)), rel=1e-4)
    hard = Distillation(identity, distance="mse").loss((jnp.asarray(a), jnp.asarray(b)), (jnp.asarray(b),) * 2, None)
    assert float(hard) == pytest.approx(np.mean((a - b) ** 2), rel=1e-5)
    for wrong in ({"weight": 2.0}, {"temperature": 0.0}, {"distance": "l1"}):
        with pytest.raises(ValueError):
            Distillation(identity, **wrong)
