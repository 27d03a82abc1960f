"""Kernels in the place of products: what they take along, what they leave, and how they are chosen."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer.graph import check, run, trace
from jaxinfer.rewrites import RULES as REGISTERED
from jaxinfer.rewrites import native_kernels
from jaxinfer.rewriting import Rewriter, Rule, op, var
from jaxinfer.search import choose as choosing
from jaxinfer.search.cache import Cache
from jaxinfer.search.choose import Policy, choose
from jaxinfer.search.device import default_peaks

pytestmark = pytest.mark.usefixtures("kernels")
RULES = native_kernels.RULES
KERNELS = ("packed_convolution", "depthwise_convolution")
X, W, BIAS = random(2, 12, 12, 16), random(3, 3, 16, 40), random(40)
DEEP = random(3, 3, 1, 16)


def conv(x, w, strides=(1, 1), padding="SAME", layout=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **options)


def relu6(x):
    return jnp.minimum(jnp.maximum(x, 0.0), 6.0)


def operations(graph):
    """What is left to do at each call: names of operations, those of known values alone left out."""
    return sorted(n.op for n in graph.walk() if n not in graph.known and n.op not in ("input", "const"))


def kernel(graph):
    (node,) = (n for n in graph.walk() if n.op in KERNELS)
    return node


def taken(function, *args, known=(), tolerance=1e-5):
    """The program with all offers taken, checked against float64."""
    return compare(function, args, RULES, known, tolerance)


def assert_left(function, *args, known=()):
    before, after = rewrite(function, args, RULES, known)
    assert str(before) == str(after)


# -- what is taken along ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail, low, high",
    [
        (lambda y, b: relu6(y + b), 0.0, 6.0),
        (lambda y, b: lax.clamp(0.0, b + y, 6.0), 0.0, 6.0),
        (lambda y, b: jnp.clip(y + b, -1, 2), -1.0, 2.0),
        (lambda y, b: jax.nn.relu(y + b), 0.0, np.inf),
        (lambda y, b: jnp.minimum(y + b, 1.5), -np.inf, 1.5),
        (lambda y, b: y + b, -np.inf, np.inf),
    ],
    ids=["relu6", "clamp", "clip", "relu", "minimum", "bias"],
)
def test_bias_and_bounds_are_taken_along(tail, low, high):
    after = taken(lambda x, w, b: tail(conv(x, w), b), X, W, BIAS, known=(1, 2))
    assert operations(after) == ["packed_convolution"]
    node = kernel(after)
    assert (node.params["low"], node.params["high"], node.params["has"]) == (low, high, (True, False))


@pytest.mark.parametrize(
    "bias",
    [random(40), random(1, 1, 1, 40), random(1), np.float32(0.7), np.full((2, 12, 12, 40), 0.7, np.float32)],
    ids=["row", "with all axes", "one number", "scalar", "as large as the result"],
)
def test_biases_of_every_shape(bias):
    """One that varies along other axes is an array that is known: it is not taken."""
    after = taken(lambda x, w, b: jax.nn.relu(conv(x, w) + b), X, W, bias, known=(1, 2))
    kernel(after)
    if bias.size <= 40:
        assert operations(after) == ["packed_convolution"]


def test_depthwise():
    def layer(x, w, b):
        return relu6(conv(x, w, (2, 1), ((0, 1), (1, 0)), feature_group_count=16) + b)

    after = taken(layer, X, DEEP, BIAS[:16], known=(1, 2))
    assert operations(after) == ["depthwise_convolution"]


@pytest.mark.parametrize("rows", [1, 30])
def test_products(rows):
    after = taken(lambda x, w, b: relu6(x @ w + b), random(rows, 200), random(200, 150), random(150), known=(1, 2))
    assert [name for name in operations(after) if name != "reshape"] == ["packed_convolution"]


def test_a_product_with_the_weights_first():
    after = taken(lambda w, x: w @ x, random(150, 200), random(200, 9), known=(0,))
    assert set(operations(after)) <= {"packed_convolution", "reshape", "transpose"}


def residual(x, w, v, b):
    return jax.nn.relu(conv(x, w) + b + conv(jnp.tanh(x), v))


def test_of_two_products_the_first_takes_the_other():
    after = taken(residual, X, W, random(3, 3, 16, 40, seed=1), BIAS, known=(1, 2, 3))
    assert operations(after) == ["packed_convolution", "packed_convolution", "tanh"]
    first, last = (n for n in after.walk() if n.op == "packed_convolution")
    assert {first.params["has"], last.params["has"]} == {(False, False), (True, True)}
    assert last.inputs[-1].node is first, "it waits for the other and adds it"


@pytest.mark.parametrize("swapped", [False, True])
def test_an_array_is_taken_along_on_either_side(swapped):
    def layer(x, w):
        y, other = conv(x, w), jnp.tanh(jnp.tile(x, 3)[..., :40])
        return jax.nn.relu(other + y if swapped else y + other)

    after = taken(layer, X, W, known=(1,))
    assert kernel(after).params["has"] == (False, True) and kernel(after).params["low"] == 0.0
    assert not {"add", "max"} & set(operations(after))


@pytest.mark.parametrize("layout", [("NCHW", "OIHW", "NHWC"), ("NHWC", "OHWI", "NHWC"), ("CHWN", "HWOI", "NHWC")])
def test_operands_are_laid_out_anew(layout):
    x, w = (np.transpose(a, [from_.index(c) for c in to]) for a, from_, to in zip((X, W), ("NHWC", "HWIO"), layout))
    after = taken(lambda x, w, b: relu6(conv(x, w, layout=layout) + b), x, w, BIAS, known=(1, 2))
    assert set(operations(after)) <= {"packed_convolution", "transpose"}


def test_results_with_channels_elsewhere_take_nothing_along():
    layout = ("NHWC", "HWIO", "NCHW")
    after = taken(lambda x, w, b: relu6(conv(x, w, layout=layout) + b), X, W, BIAS[:, None, None], known=(1, 2))
    assert kernel(after).params["has"] == (False, False)
    assert {"add", "transpose"} <= set(operations(after))


def test_one_dimension():
    x, w = random(4, 60, 16), random(3, 16, 40)
    after = taken(lambda x, w, b: relu6(conv(x, w, (1,), layout=("NWC", "WIO", "NWC")) + b), x, w, BIAS, known=(1, 2))
    assert set(operations(after)) <= {"packed_convolution", "reshape", "expand_dims", "broadcast_in_dim", "squeeze"}


POOLED = tuple(r for r in RULES if r.name == "packed-convolution-pooled")


def largest(y, pool=(2, 2), strides=None, padding="VALID"):
    strides = pool if strides is None else strides
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, *pool, 1), (1, *strides, 1), padding)


def test_the_largest_of_windows_side_by_side():
    for pool in ((2, 2), (1, 3), (3, 2)):
        layer = lambda x, w, b, pool=pool: largest(jax.nn.relu(conv(x, w) + b), pool)  # noqa: E731
        after = compare(layer, (X[:, :, :11], W, BIAS), POOLED, (1, 2))
        assert operations(after) == ["packed_convolution"]
        assert kernel(after).params["pool"] == pool and kernel(after).params["low"] == 0.0


@pytest.mark.parametrize(
    "layer",
    [
        lambda x, w: largest(conv(x, w), (3, 3), (2, 2)),  # windows that overlap
        lambda x, w: largest(conv(x, w), padding=((0, 0), (1, 1), (0, 0), (0, 0))),
        lambda x, w: largest(conv(x, w), (5, 5)),  # more than a tile
        lambda x, w: largest(conv(x, w) + jnp.tanh(jnp.tile(x, 3)[..., :40])),  # something is added
        lambda x, w: (largest(conv(x, w)), conv(x, w).sum()),  # needed otherwise
        lambda x, w: jnp.mean(conv(x, w), (1, 2)),
    ],
)
def test_other_pools_are_left_alone(layer):
    _, after = rewrite(layer, (X, W), POOLED, known=(1,))
    assert "packed_convolution" not in operations(after)


# -- what is left -----------------------------------------------------------------------------------------------------


def test_a_value_with_another_use_stays():
    """The sum is needed by itself: the kernel ends there."""

    def layer(x, w, b):
        y = conv(x, w) + b
        return jax.nn.relu(y), jnp.sum(y)

    after = taken(layer, X, W, BIAS, known=(1, 2), tolerance=1e-4)
    assert kernel(after).params["low"] == -np.inf and kernel(after).params["has"] == (True, False)
    assert {"max", "reduce_sum"} <= set(operations(after))


def test_a_result_of_the_program_stays():
    def layer(x, w, b):
        y = conv(x, w)
        return y, y + b

    after = taken(layer, X, W, BIAS, known=(1, 2))
    assert kernel(after).params["has"] == (False, False) and "add" in operations(after)


@pytest.mark.parametrize(
    "tail",
    [
        lambda y: jnp.maximum(jnp.minimum(y, -1.0), 2.0),  # the other way round
        lambda y: jnp.minimum(jnp.maximum(y, 2.0), 1.0),  # bounds that cross
        lambda y: jnp.maximum(y, jnp.nan),
        lambda y: lax.clamp(2.0, y, 1.0),
        lambda y: jax.nn.relu(y) + 1.0,
        lambda y: y * 2.0,
        lambda y: jnp.maximum(y, jnp.arange(40.0)),
    ],
)
def test_bounds_of_other_kinds_stay(tail):
    _, after = rewrite(lambda x, w: tail(conv(x, w)), (X, W), RULES, known=(1,))
    assert "packed_convolution" in operations(after)
    (have,) = run(after, {}, X)
    with jax.enable_x64(True):
        want = tail(conv(jnp.asarray(X, jnp.float64), jnp.asarray(W, jnp.float64)))
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-4)
    assert len(operations(after)) > 1


def test_two_biases_or_addends_are_one_of_each():
    def layer(x, w, b, c):
        return conv(x, w) + b + jnp.tanh(b * x[..., :1]) + jnp.sin(c * x[..., :1])

    after = taken(layer, X, W, BIAS, BIAS, known=(1, 2, 3))
    assert kernel(after).params["has"] == (True, True)
    assert operations(after).count("add") == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8])
def test_other_types_stay(dtype):
    x, w = jnp.asarray(X * 9, dtype), jnp.asarray(W * 9, dtype)
    assert_left(lambda x, w: conv(x, w), x, w, known=(1,))
    assert_left(lambda x, w: conv(x, w, feature_group_count=16), x, jnp.asarray(DEEP, dtype), known=(1,))
    assert_left(lambda x, w: x @ w, x[0, 0], w[0, 0], known=(1,))


def test_double_precision_stays():
    with jax.enable_x64(True):
        x, w = jnp.asarray(X, jnp.float64), jnp.asarray(W, jnp.float64)
        assert_left(lambda x, w: conv(x, w), x, w, known=(1,))
        assert_left(lambda x, w: x @ w, x.reshape(-1, 16), w[0, 0], known=(1,))


def test_sums_in_another_type_stay():
    half = jnp.asarray(X, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    assert_left(lambda x, w: conv(x, w, preferred_element_type=jnp.float32), *half, known=(1,))


@pytest.mark.parametrize(
    "layer, weights",
    [
        (lambda x, w: conv(x, w, feature_group_count=4), random(3, 3, 4, 40)),
        (lambda x, w: conv(x, w, feature_group_count=16), random(3, 3, 1, 32)),
        (lambda x, w: conv(x, w, padding=((2, 2), (2, 2)), lhs_dilation=(2, 1)), W),
        (lambda x, w: conv(x, w, batch_group_count=2), W),
        (lambda x, w: conv(x, w, padding=((-1, 0), (0, 1))), W),
        (lambda x, w: conv(x, w, padding=((1, -1), (0, 0))), random(1, 1, 16, 40)),
        (lambda x, w: jnp.einsum("nhwk,nkc->nhwc", x, w), random(2, 16, 40)),
        (lambda x, w: x @ x.mT, W),
    ],
    ids=["groups", "two of each channel", "holes", "batch groups", "cut off", "moved", "batched", "nothing known"],
)
def test_other_products_stay(layer, weights):
    assert_left(layer, X, weights, known=(1,))


def test_three_dimensions_stay():
    layout = ("NDHWC", "DHWIO", "NDHWC")
    x, w = random(1, 6, 6, 6, 16), random(3, 3, 3, 16, 40)
    assert_left(lambda x, w: conv(x, w, (1, 1, 1), layout=layout), x, w, known=(1,))


def test_weights_that_are_not_known_stay():
    assert_left(lambda x, w: conv(x, w), X, W)


def test_small_products_stay():
    assert_left(lambda x, w: x @ w, random(1, 100), random(100, 100), known=(1,))
    assert_left(lambda x, w: conv(x, w), random(1, 3, 3, 4), random(3, 3, 4, 5), known=(1,))
    assert_left(lambda x, w: conv(x, w, feature_group_count=16), X[:1, :3, :3], DEEP, known=(1,))
    # What counts is the multiplications, not the weights.
    kernel(taken(lambda x, w: x @ w, random(30, 100), random(100, 100), known=(1,)))


def test_empty_products_stay():
    assert_left(lambda x, w: conv(x, w), X[:0], W, known=(1,))
    assert_left(lambda x, w: conv(x, w), X[..., :0], W[:, :, :0], known=(1,))


def test_nothing_is_offered_without_a_library(monkeypatch):
    monkeypatch.setattr(native_kernels, "library", lambda: None)
    assert_left(lambda x, w: conv(x, w), X, W, known=(1,))


def test_inside_a_loop():
    """Other rules bring the weights into its body."""

    def loop(xs, w, b):
        def step(h, x):
            h = relu6(conv(h + x, w) + b)
            return h, h.sum()

        return lax.scan(step, jnp.zeros_like(xs[0]), xs)

    rules = (*(r for r in REGISTERED if r.kind == "replace"), *RULES)
    after = compare(loop, (np.stack([X, 2 * X]), W[..., :16], BIAS[:16]), rules, known=(1, 2))
    (scan,) = (n for n in after.walk() if n.op == "scan")
    (body,) = scan.subgraphs
    assert kernel(body).params["low"] == 0.0 and kernel(body).params["high"] == 6.0
    assert not {"max", "min", "clamp", "conv_general_dilated"} & set(operations(after))


# -- choosing ---------------------------------------------------------------------------------------------------------

ANOTHER = Rule(
    "another",
    "conv(x, w) → another form",
    op("conv_general_dilated", var("x"), var("w"), name="conv"),
    lambda m, x, w: lax.conv_general_dilated_p.bind(x * 1, w, **m.params("conv")),
    "reassociate",
    "offer",
)


def layer(x, w, b):
    return jnp.tanh(relu6(conv(x, w) + b))


def offered(function=layer, args=(X, W, BIAS), rules=(ANOTHER, *RULES)):
    graph = trace(jax.make_jaxpr(function)(*args), {i: a for i, a in enumerate(args) if i})
    rewriter = Rewriter(rules)
    return graph, rewriter, rewriter.offers(graph)


def timing(monkeypatch, tmp_path, seconds):
    """A policy that measures, and is told how long each form takes; and how many forms it asked about."""
    asked = []

    def time_candidates(calls, budget_s, sample_s):
        asked.append(len(calls))
        results = [np.asarray(jax.tree.leaves(call())[0]) for call in calls]
        for result in results:
            np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=1e-4 * np.abs(results[0]).max())
        return seconds[: len(calls)]

    monkeypatch.setattr(choosing, "time_candidates", time_candidates)
    deadline = time.perf_counter() + 60
    return Policy("cpu", default_peaks("cpu"), cache=Cache(tmp_path), deadline=deadline), asked


def test_a_kernel_is_chosen_where_it_is_faster(monkeypatch, tmp_path):
    graph, rewriter, offers = offered()
    policy, asked = timing(monkeypatch, tmp_path, [3.0, 2.0, 1.0])
    chosen, choices = choose(graph, offers, policy)
    assert asked == [3], "both forms are compared with the original at once"
    assert [(c.chosen, c.source) for c in choices] == [("packed-convolution", "measured")]
    after = rewriter.apply(graph, chosen)
    check(after)
    assert operations(after) == ["packed_convolution", "tanh"]
    with jax.enable_x64(True):
        want = layer(*(jnp.asarray(a, jnp.float64) for a in (X, W, BIAS)))
    np.testing.assert_allclose(run(after, {}, X)[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seconds, winner", [([1.0, 2.0, 3.0], "original"), ([3.0, 1.0, 2.0], "another")])
def test_and_not_where_another_form_is(seconds, winner, monkeypatch, tmp_path):
    graph, rewriter, offers = offered()
    policy, _ = timing(monkeypatch, tmp_path, seconds)
    chosen, choices = choose(graph, offers, policy)
    assert [c.chosen for c in choices] == [winner]
    assert "packed_convolution" not in operations(rewriter.apply(graph, chosen))


def test_forms_that_end_elsewhere_are_one_site():
    """One takes bias and bounds along, the other does not; what follows both ends in the same value."""
    graph, _, offers = offered()
    ((node, found),) = offers.items()
    assert [r.rule.name for r in found] == ["another", "packed-convolution"]
    assert found[0].roots != found[1].roots and node.op == "conv_general_dilated"
    ((both,),) = [choosing._by_result(graph, found)]
    assert both == found
    forms, named = choosing._forms(graph, found)
    assert set(forms) == {"original", "another", "packed-convolution"} and set(named) == set(forms) - {"original"}
    for name, form in forms.items():
        have = operations(form)
        assert have.count("tanh") == 1, "up to where the program goes on"
        assert ("max" in have) == (name != "packed-convolution")


def test_forms_that_end_in_different_values_are_compared_apart():
    """The sum is used twice, so what follows one form is not what follows the other."""

    def shared(x, w, b):
        y = conv(x, w)
        return (relu6(y + b), y.sum())

    graph, _, offers = offered(shared)
    ((_, found),) = offers.items()
    assert len(choosing._by_result(graph, found)) == 1, "both end at the convolution itself"
    other = Rule(
        "wider",
        "conv(x, w) + b → another form of the sum",
        op("add", op("conv_general_dilated", var("x"), var("w"), name="conv"), var("b")),
        lambda m, x, w, b: lax.conv_general_dilated_p.bind(x, w, **m.params("conv")) + b * 1,
        "reassociate",
        "offer",
    )
    graph, _, offers = offered(shared, rules=(other, *RULES))
    every = [r for found in offers.values() for r in found]
    assert len(every) == 2 and len(choosing._by_result(graph, every)) == 2


def test_measured_times_serve_programs_without_kernels(monkeypatch, tmp_path):
    """A program to run elsewhere asks about the same site without the kernel, and finds it settled."""
    graph, _, offers = offered()
    policy, asked = timing(monkeypatch, tmp_path, [3.0, 2.0, 1.0])
    choose(graph, offers, policy)
    graph, _, offers = offered(rules=(ANOTHER,))
    chosen, choices = choose(graph, offers, policy)
    assert [(c.chosen, c.source) for c in choices] == [("another", "cached")] and len(asked) == 1
    assert {r.rule.name for r in chosen.values()} == {"another"}
    again, choices = choose(*offered()[::2], policy)
    assert [(c.chosen, c.source) for c in choices] == [("packed-convolution", "cached")] and len(again) == 1
