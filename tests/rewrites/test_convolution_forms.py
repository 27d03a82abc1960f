"""Every form of a convolution against `lax.conv_general_dilated` itself, evaluated in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.rewrites.convolution_forms import FORMS
from jaxinfer.rewrites.winograd import winograd_kernel

BY_NAME = {form.name: form for form in FORMS}
LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
OTHER_LAYOUTS = [("NCHW", "OIHW", "NCHW"), ("HWNC", "IHWO", "CNWH"), ("CNHW", "HOWI", "NHWC")]


def conv_eqn(x, kernel, **kwargs):
    """The `conv_general_dilated` equation that lax makes, so that forms meet real parameters."""
    call = jax.make_jaxpr(lambda x, k: lax.conv_general_dilated(x, k, **kwargs))(x, kernel)
    (eqn,) = [e for e in call.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    return eqn


def operands(rng, x_shape, kernel_shape, numbers, dtype=np.float64):
    """Random operands, given channels-last, laid out as `numbers` says."""
    rank = len(x_shape)
    space = "HW"[: rank - 2] if rank < 5 else "DHW"
    lhs, rhs, _ = numbers
    x = rng.normal(size=x_shape) if np.issubdtype(dtype, np.floating) else rng.integers(-9, 9, x_shape)
    k = rng.normal(size=kernel_shape) if np.issubdtype(dtype, np.floating) else rng.integers(-9, 9, kernel_shape)
    x = np.transpose(x, [("N" + space + "C").index(a) for a in lhs])
    k = np.transpose(k, [(space + "IO").index(a) for a in rhs])
    return x.astype(dtype), k.astype(dtype)


def check(x, kernel, rtol=1e-10, **kwargs):
    """Compare every form that accepts these operands with the primitive; returns their names."""
    eqn = conv_eqn(x, kernel, **kwargs)
    forms = [f for f in FORMS if f.accepts(eqn.invars[0].aval, eqn.invars[1].aval, eqn.params)]

    def every(x, kernel):
        expected = lax.conv_general_dilated(x, kernel, **kwargs)
        return expected, [f.apply(x, kernel, **eqn.params) for f in forms]

    # One program per case, compiled without optimization: the arithmetic is what is under test.
    quick = jax.jit(every, compiler_options={"xla_backend_optimization_level": 0})
    expected, results = quick(x, kernel)
    want = np.asarray(expected, np.float64)
    atol = rtol * max(np.abs(want).max(initial=0), 1)
    for form, got in zip(forms, results, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype, form.name
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol, err_msg=form.name)
    return [form.name for form in forms]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 3))])
@pytest.mark.parametrize("groups, multiplier", [(1, 5), (4, 1), (4, 3), (2, 4)])
def test_two_dimensions(stride, dilation, padding, groups, multiplier):
    rng = np.random.default_rng(0)
    outputs = multiplier if groups == 1 else groups * multiplier
    x, k = operands(rng, (2, 9, 11, 4), (3, 2, 4 // groups, outputs), LAYOUTS[2])
    used = check(
        x,
        k,
        window_strides=(stride, 1 if stride == 3 else stride),
        padding=padding,
        rhs_dilation=(dilation, 1),
        feature_group_count=groups,
        dimension_numbers=LAYOUTS[2],
    )
    if groups == 1:
        assert {"im2col_as_dot", "shifted_dots", "rowwise_dots", "few_channels_as_shifted_sum"} <= set(used)
    else:
        assert {"grouped_as_batched_dot", "grouped_as_split"} <= set(used)
    assert ("depthwise_as_shifted_sum" in used) == (groups == 4)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "uneven"])
def test_winograd(rank, padding):
    rng = np.random.default_rng(1)
    space = (9, 8, 7)[:rank]
    x, k = operands(rng, (2, *space, 3), (*(3,) * rank, 3, 4), LAYOUTS[rank])
    pads = ((1, 0), (0, 4), (2, 2))[:rank] if padding == "uneven" else padding
    used = check(x, k, window_strides=(1,) * rank, padding=pads, dimension_numbers=LAYOUTS[rank])
    assert {"winograd_2", "winograd_4"} <= set(used)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_and_three_dimensions(rank, groups, stride):
    rng = np.random.default_rng(2)
    x, k = operands(rng, (2, *(7, 6, 5)[:rank], 4), (*(3, 2, 1)[:rank], 4 // groups, 8), LAYOUTS[rank])
    used = check(
        x,
        k,
        window_strides=(stride,) * rank,
        padding=((1, 2), (0, 1), (2, 0))[:rank],
        rhs_dilation=(2, 1, 1)[:rank],
        feature_group_count=groups,
        dimension_numbers=LAYOUTS[rank],
    )
    assert used


@pytest.mark.parametrize("numbers", OTHER_LAYOUTS)
@pytest.mark.parametrize("window, groups", [((1, 1), 1), ((3, 3), 1), ((3, 3), 4), ((2, 3), 2)])
def test_layouts(numbers, window, groups):
    rng = np.random.default_rng(3)
    x, k = operands(rng, (2, 6, 7, 4), (*window, 4 // groups, 8), numbers)
    used = check(
        x,
        k,
        window_strides=(1, 1),
        padding="VALID",
        feature_group_count=groups,
        dimension_numbers=numbers,
    )
    assert used


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pointwise(rank, stride):
    rng = np.random.default_rng(4)
    x, k = operands(rng, (2, *(5, 4, 3)[:rank], 6), (*(1,) * rank, 6, 5), LAYOUTS[rank])
    used = check(x, k, window_strides=(stride,) * rank, padding="VALID", dimension_numbers=LAYOUTS[rank])
    assert "pointwise_as_dot" in used


@pytest.mark.parametrize("x_shape", [(0, 5, 5, 4), (1, 1, 1, 4), (1, 1, 6, 4), (3, 3, 3, 4)])
@pytest.mark.parametrize("groups", [1, 4])
def test_empty_and_unit_sizes(x_shape, groups):
    rng = np.random.default_rng(5)
    x, k = operands(rng, x_shape, (3, 3, 4 // groups, 4), LAYOUTS[2])
    options = {"feature_group_count": groups, "dimension_numbers": LAYOUTS[2]}
    assert check(x, k, window_strides=(1, 1), padding="SAME", **options)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_integers_are_exact(groups):
    rng = np.random.default_rng(6)
    x, k = operands(rng, (2, 6, 6, 4), (3, 3, 4 // groups, 8), LAYOUTS[2], np.int32)
    options = {"padding": "SAME", "feature_group_count": groups, "dimension_numbers": LAYOUTS[2]}
    used = check(x, k, rtol=0, window_strides=(1, 1), **options)
    assert used and not {"winograd_2", "winograd_4"} & set(used)
    narrow = check(
        x.astype(np.int8),
        k.astype(np.int8),
        rtol=0,
        window_strides=(2, 1),
        preferred_element_type=jnp.int32,
        **options,
    )
    assert narrow


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bfloat16_rounds_once(groups):
    """Against the sum in float64 of the same bfloat16 operands: within one rounding to bfloat16."""
    rng = np.random.default_rng(7)
    x, k = (jnp.asarray(a, jnp.bfloat16) for a in operands(rng, (2, 6, 6, 4), (3, 3, 4 // groups, 8), LAYOUTS[2]))
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": groups}
    eqn = conv_eqn(x, k, dimension_numbers=LAYOUTS[2], **options)
    exact = lax.conv_general_dilated(
        x.astype(jnp.float64), k.astype(jnp.float64), dimension_numbers=LAYOUTS[2], **options
    )
    used = [f for f in FORMS if f.accepts(eqn.invars[0].aval, eqn.invars[1].aval, eqn.params)]
    assert used
    for form in used:
        got = form.apply(x, k, **eqn.params)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-4, err_msg=form.name)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_gradients(name):
    rng = np.random.default_rng(8)
    grouped = "grouped" in name or "depthwise" in name
    window = 1 if name == "pointwise_as_dot" else 3
    x, k = operands(rng, (1, 5, 6, 4), (window, window, 1 if grouped else 4, 4), LAYOUTS[2])
    if name == "few_channels_as_shifted_sum":
        x, k = x[..., :3], k[:, :, :3]
    kwargs = {
        "window_strides": (1, 1),
        "padding": "VALID",
        "feature_group_count": 4 if grouped else 1,
        "dimension_numbers": LAYOUTS[2],
    }
    eqn = conv_eqn(x, k, **kwargs)
    form = BY_NAME[name]
    assert form.accepts(eqn.invars[0].aval, eqn.invars[1].aval, eqn.params)

    def gradient(convolve):
        grad = jax.grad(lambda x, k: jnp.sum(jnp.sin(convolve(x, k))), (0, 1))
        return jax.jit(grad, compiler_options={"xla_backend_optimization_level": 0})(x, k)

    got = gradient(lambda x, k: form.apply(x, k, **eqn.params))
    want = gradient(lambda x, k: lax.conv_general_dilated(x, k, **kwargs))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", [2, 4])
def test_winograd_kernel_is_the_kernel_evaluated_at_distinct_points(m):
    """Rows of G are multiples of (1, p, p^2) for m + 1 distinct points p, and (0, 0, 1) for infinity."""
    transformed = np.asarray(winograd_kernel(jnp.eye(3)[:, :, None], m))[..., 0]
    finite = transformed[:-1]
    points = finite[:, 1] / finite[:, 0]
    np.testing.assert_allclose(finite[:, 2], finite[:, 0] * points**2, atol=1e-15)
    assert len(np.unique(np.round(points, 9))) == m + 1
    np.testing.assert_array_equal(transformed[-1], [0, 0, 1])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lhs_dilation": (2, 1), "padding": ((0, 0), (0, 0))},
        {"padding": ((-1, 0), (0, 0))},
        {"padding": "VALID", "batch_group_count": 2, "x": (2, 4, 4, 4)},
        {"padding": "VALID", "x": (1, 2, 4, 4)},
        {"padding": "VALID", "x": (1, 4, 4, 0)},
    ],
)
def test_declines(kwargs):
    kwargs = dict(kwargs)
    x = jnp.zeros(kwargs.pop("x", (2, 5, 5, 4)))
    kernel = jnp.zeros((3, 3, x.shape[-1], 4))
    eqn = conv_eqn(x, kernel, window_strides=(1, 1), dimension_numbers=LAYOUTS[2], **kwargs)
    assert not [f.name for f in FORMS if f.accepts(x.aval, kernel.aval, eqn.params)]


def test_declines_unknown_sizes_and_dilated_windows_where_they_matter():
    from jax import export

    (n,) = export.symbolic_shape("n")
    x, k = jax.ShapeDtypeStruct((n, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
    eqn = conv_eqn(x, k, window_strides=(1, 1), padding="SAME", dimension_numbers=LAYOUTS[2])
    assert not [f.name for f in FORMS if f.accepts(x, k, eqn.params)]

    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    for change in ({"window_strides": (2, 1)}, {"rhs_dilation": (1, 2)}):
        options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUTS[2]} | change
        eqn = conv_eqn(x, k, **options)
        assert not BY_NAME["winograd_2"].accepts(x, k, eqn.params)
        assert BY_NAME["im2col_as_dot"].accepts(x, k, eqn.params)


def test_apply_refuses_what_it_cannot_compute():
    x, kernel = jnp.zeros((1, 5, 5, 4)), jnp.zeros((3, 3, 4, 4))
    eqn = conv_eqn(
        x,
        kernel,
        window_strides=(1, 1),
        padding=[(0, 0)] * 2,
        lhs_dilation=(2, 1),
        dimension_numbers=LAYOUTS[2],
    )
    with pytest.raises(ValueError, match="dilated input"):
        BY_NAME["im2col_as_dot"].apply(x, kernel, **eqn.params)
