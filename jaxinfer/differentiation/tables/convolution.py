"""Convolutions: linear in the image and in the kernel.

Both cotangents are convolutions again, by which XLA's CPU backend computes some of them many times too slowly: those
are written as sums and products there.

Reference: Dumoulin and Visin, *A guide to convolution arithmetic for deep learning*, arXiv:1603.07285.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.differentiation.rules import PullbackRule, TangentRule
from jaxinfer.differentiation.tables.bilinear import like, tangent
from jaxinfer.differentiation.tables.convolution_sums import image_as_sums, kernel_as_sums
from jaxinfer.graph import Node


def _dilated(size: int, dilation: int) -> int:
    return 0 if size == 0 else 1 + dilation * (size - 1)


def _move_groups(x: Any, count: int, source: int, target: int) -> Any:
    """The outer factor ``count`` of one axis as the outer factor of another."""
    shape = list(x.shape)
    apart = lax.reshape(x, [*shape[:source], count, shape[source] // count, *shape[source + 1 :]])
    moved = jnp.moveaxis(apart, source, target)
    shape[source] //= count
    shape[target] *= count
    return lax.reshape(moved, shape)


def _conv_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (x, kernel), (ct,) = primals, cotangents
    if ct.size == 0:
        return [None, None]
    image = kernel_ct = None
    if active[0]:
        image = image_as_sums(node, ct, x, kernel)
        image = _conv_image(node, ct, x, kernel) if image is None else like(image, x)
    if active[1]:
        kernel_ct = kernel_as_sums(node, ct, x, kernel)
        kernel_ct = _conv_kernel(node, ct, x, kernel) if kernel_ct is None else like(kernel_ct, kernel)
    return [image, kernel_ct]


def _window_sizes(node: Node, ct: Any, x: Any, kernel: Any) -> list[tuple[int, int, int, int, int]]:
    """Along each spatial axis: image, kernel and result with their dilations, then the paddings before and after."""
    p = node.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    return [
        (
            _dilated(x.shape[x_spec[2 + i]], p["lhs_dilation"][i]),
            _dilated(kernel.shape[kernel_spec[2 + i]], p["rhs_dilation"][i]),
            _dilated(ct.shape[out_spec[2 + i]], p["window_strides"][i]),
            *padding,
        )
        for i, padding in enumerate(p["padding"])
    ]


def _conv_image(node: Node, ct: Any, x: Any, kernel: Any) -> Any:
    """The cotangent spread by the strides, with the kernel reversed and its features exchanged."""
    p = node.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    features, batches = p["feature_group_count"], p["batch_group_count"]
    groups = max(features, batches)
    padding = [
        (k - before - 1, image + before - out) for image, k, out, before, _ in _window_sizes(node, ct, x, kernel)
    ]
    if groups > 1:
        kernel = _move_groups(kernel, groups, kernel_spec[0], kernel_spec[1])
    kernel = lax.convert_element_type(lax.rev(kernel, kernel_spec[2:]), ct.dtype)
    found = lax.conv_general_dilated(
        ct,
        kernel,
        window_strides=p["lhs_dilation"],
        padding=padding,
        lhs_dilation=p["window_strides"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            out_spec, (kernel_spec[1], kernel_spec[0], *kernel_spec[2:]), x_spec
        ),
        feature_group_count=groups,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    if batches > 1:
        found = _move_groups(found, batches, x_spec[1], x_spec[0])
    return like(found, x)


def _conv_kernel(node: Node, ct: Any, x: Any, kernel: Any) -> Any:
    """The image convolved with the cotangent: batch and feature axes change places, strides and dilations too."""
    p = node.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    padding = [
        (before, out - image + k - before - 1) for image, k, out, before, _ in _window_sizes(node, ct, x, kernel)
    ]

    def exchanged(spec: Sequence[int]) -> tuple[int, ...]:
        return (spec[1], spec[0], *spec[2:])

    found = lax.conv_general_dilated(
        lax.convert_element_type(x, ct.dtype),
        ct,
        window_strides=p["rhs_dilation"],
        padding=padding,
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["window_strides"],
        dimension_numbers=lax.ConvDimensionNumbers(exchanged(x_spec), exchanged(out_spec), exchanged(kernel_spec)),
        feature_group_count=p["batch_group_count"],
        batch_group_count=p["feature_group_count"],
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    return like(found, kernel)


TANGENTS: Mapping[str, TangentRule] = {"conv_general_dilated": tangent}
PULLBACKS: Mapping[str, PullbackRule] = {"conv_general_dilated": _conv_pullback}
