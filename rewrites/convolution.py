"""Convolutions in other forms. Which one is fastest depends on shape and backend, so all of them are offers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax import lax

from jaxinfer.rewrites.convolution_forms import FORMS, ConvolutionForm
from jaxinfer.rewriting import Match, Rule, op, var

_NOTES = {
    "pointwise_as_dot": "conv(x, w[1, 1]) → x @ w",
    "depthwise_as_shifted_sum": "depthwise conv(x, w) → sum of shifted x · w; XLA spreads a NaN over channels",
    "few_channels_as_shifted_sum": "conv(x, w), few channels → sum of shifted x times w, one term a tap and channel",
    "im2col_as_dot": "conv(x, w) → columns(x) @ w",
    "shifted_dots": "conv(x, w) → sum of shifted x @ w[tap]",
    "rowwise_dots": "conv(x, w) → sum of row columns(x) @ w[row]",
    "grouped_as_batched_dot": "grouped conv(x, w) → product batched over groups; XLA spreads a NaN over them",
    "grouped_as_split": "grouped conv(x, w) → one conv a group, concatenated; XLA spreads a NaN over them",
    "winograd_2": "conv(x, w[3, 3]) → F(2, 3); a non-finite input spreads over its tile",
    "winograd_4": "conv(x, w[3, 3]) → F(4, 3); a non-finite input spreads over its tile",
}
# Forms that differ from a plain product only where the window has several positions.
_BY_TAP = frozenset({"im2col_as_dot", "shifted_dots", "rowwise_dots"})
# Some forms write one operation a group or a position of the window; beyond this many they would be slow to compile.
_MOST_PARTS = 16
_MOST_TAPS = 121
# F(4, 3) keeps its rounding error within the tier when it sums over this many channels; over fewer, rounding in the
# transforms shows.
_WINOGRAD_4_CHANNELS = 16


def _cases(form: ConvolutionForm) -> Any:
    """Programs in which a form applies: one to three spatial dimensions, strides, dilations, paddings, groups."""

    def cases(s: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        if form.name.startswith("winograd"):
            s.only("float32", "float64")
        rank = s.choice((1, 2, 2)) if not form.name.startswith("winograd") else s.choice((1, 2))
        window = {"pointwise_as_dot": 1}.get(form.name, 3)
        free = not form.name.startswith("winograd")
        strides = (s.choice((1, 2)) if free else 1,) * rank
        dilation = (s.choice((1, 2)) if free and window > 1 else 1,) * rank
        padding = ((s.choice((0, 1)), s.choice((0, 1, 2))) if window > 1 else (0, 0),) * rank
        few = _WINOGRAD_4_CHANNELS if form.name == "winograd_4" else 3
        groups, inner, outer = {"depthwise": (3, 1, 3), "grouped": (2, 2, 4)}.get(form.name.split("_")[0], (1, few, 4))
        space = tuple(s.choice((6, 7, 9)) for _ in range(rank))
        layout = ("NWC", "NHWC")[rank - 1], ("WIO", "HWIO")[rank - 1], ("NWC", "NHWC")[rank - 1]

        def program(x: Any, w: Any) -> Any:
            return lax.conv_general_dilated(
                x,
                w,
                strides,
                padding,
                rhs_dilation=dilation,
                dimension_numbers=layout,
                feature_group_count=groups,
                preferred_element_type=x.dtype,
            )

        yield program, (s.array(2, *space, groups * inner), s.frozen(*(window,) * rank, inner, outer))

    return cases


def _rule(form: ConvolutionForm) -> Rule:
    def after(m: Match, x: Any, w: Any) -> Any:
        return form.apply(x, w, **m.params("conv"))

    def when(m: Match) -> bool:
        params = m.params("conv")
        window = [m["w"].shape[i] for i in params["dimension_numbers"].rhs_spec[2:]]
        if form.name in _BY_TAP and all(size == 1 for size in window):
            return False
        # The gradient of a kernel is a convolution whose window is a whole image.
        if math.prod(window) > _MOST_TAPS:
            return False
        # A channel to itself is no product: no nearer than ten times the shifted sum, and timing it takes long.
        if form.name == "grouped_as_batched_dot" and m["w"].shape[params["dimension_numbers"].rhs_spec[1]] == 1:
            return False
        if form.name == "grouped_as_split" and params["feature_group_count"] > _MOST_PARTS:
            return False
        if form.name == "winograd_4" and m["w"].shape[params["dimension_numbers"].rhs_spec[1]] < _WINOGRAD_4_CHANNELS:
            return False
        return form.accepts(m["x"].aval, m["w"].aval, params)

    return Rule(
        name=form.name.replace("_", "-"),
        note=_NOTES[form.name],
        before=op("conv_general_dilated", var("x"), var("w"), name="conv"),
        after=after,
        tier="reassociate",
        kind="offer",
        when=when,
        cases=_cases(form),
        # XLA may compute a grouped convolution as a dense one with zeros between the groups, which spreads a NaN.
        finite=form.name.startswith(("winograd", "depthwise", "grouped")),
    )


RULES: tuple[Rule, ...] = tuple(_rule(form) for form in FORMS)
