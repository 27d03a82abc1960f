"""GPTQ: parameters are rounded one row after the other, and what each does to the result is made good by the rest.

With X the rows that weights W [k, n] are multiplied with and H = XᵀX, row i goes to its nearest values Ŵᵢ, and the
rows that are still free move to where ‖X(W − Ŵ)‖² is least again: Wⱼ −= Uᵢⱼ / Uᵢᵢ · (Wᵢ − Ŵᵢ) for j > i, where
H⁻¹ = UᵀU and U is upper triangular. If P reverses the order of rows and L is the Cholesky factor of P H P, then U is
the inverse of P L P: one decomposition, and no inverse of H.

Reference: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization for generative
pre-trained transformers", ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_triangular

from jaxinfer.quantization.calibrate import Inputs, Wanted
from jaxinfer.quantization.clipping import clipped_array, clipped_scale, scale_numbers
from jaxinfer.quantization.layers import Layer
from jaxinfer.quantization.method import Written
from jaxinfer.quantization.scheme import Format, Scheme
from jaxinfer.quantization.tensor import quantize_array, ranges, scale_of

# Rows whose effect on all later ones is gathered before it is applied: a matrix product instead of many outer ones.
_BLOCK = 128


@dataclass(frozen=True)
class GPTQ:
    """Rounds parameters so that the results of their products on the calibration data stay what they are.

    Attributes:
        act_order: begin with the rows that are fed with the largest inputs, while most others can still make good for
            them. Scales are settled before the first row is rounded then.
        damping: added to the diagonal of H, as a share of its mean.
        clip: choose scales with the least mean square error instead of those that cover the whole range.
    """

    act_order: bool = False
    damping: float = 0.01
    clip: bool = True

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise ValueError(f"damping={self.damping}: it takes a positive share, or H may have no inverse")

    def wanted(self, layer: Layer, scheme: Scheme) -> Wanted | None:
        return Wanted(gram=True)

    def write(self, layer: Layer, array: Any, scheme: Scheme, inputs: Inputs | None) -> Written:
        form = scheme.weights
        assert form is not None
        axes, group_axis = layer.axes(form)
        # In another order a group has no beginning at which its scales could be chosen.
        settled = self.act_order or group_axis is None
        start = (clipped_array if self.clip and settled else quantize_array)(array, form, axes, group_axis)
        assert inputs is not None and inputs.gram is not None
        numbers = layer.by_group(layer.matrix(scale_numbers(layer.shape, form, np.shape(start.scale), group_axis)))
        rounding = Rounding(form, numbers, start.scale, start.zero_point, self.clip and form.has_scale)
        matrix = np.asarray(layer.matrix(np.asarray(array)), np.float64)
        gram = inputs.gram.reshape(-1, *inputs.gram.shape[-2:])
        sizes = np.diagonal(gram, axis1=1, axis2=2).sum(0)
        order = np.argsort(-sizes, kind="stable") if self.act_order else np.arange(len(matrix))
        rounded = gptq(layer.by_group(matrix), gram, rounding, order, self.damping, settled)
        values = layer.array(np.concatenate(list(rounded), 1).astype(np.float32))
        scale, zero_point = rounding.scales(np.shape(start.scale))
        written = quantize_array(values, form, axes, group_axis, scale=scale, zero_point=zero_point)
        return Written(replace(written, dtype=start.dtype))


class Rounding:
    """The nearest values of a format, row by row of a matrix, or of the matrices of all groups.

    Args:
        form: the format.
        numbers: which scale holds for each entry, int[..., k, n].
        scale, zero_point: all of them; None where the format has none.
        clip: whether scales that are chosen anew clip.
    """

    def __init__(self, form: Format, numbers: np.ndarray, scale: Any, zero_point: Any, clip: bool):
        self._form, self._numbers, self._clip = form, numbers, clip
        self._scale = None if scale is None else np.asarray(scale, np.float32).reshape(-1).copy()
        self._zero = None if zero_point is None else np.asarray(zero_point).reshape(-1).copy()

    def row(self, i: int, x: np.ndarray) -> np.ndarray:
        """The values nearest to row i, float64[..., n]."""
        if self._scale is None:
            return x.astype(self._form.dtype).astype(np.float64)
        at = self._numbers[..., i, :]
        scale = self._scale[at].astype(np.float64)
        zero = 0.0 if self._zero is None else self._zero[at].astype(np.float64)
        y = np.round(x / scale) + zero if self._form.is_integer else x / scale
        codes = np.clip(y, self._form.low, self._form.high).astype(self._form.dtype).astype(np.float64)
        return (codes - zero) * scale

    def group(self, i: int) -> int:
        """One past the last row of the group that begins with row i; i itself if none begins there."""
        first = self._numbers[..., 0].reshape(-1, self._numbers.shape[-2])[0]
        if i and first[i] == first[i - 1]:
            return i
        last = i + 1
        while last < len(first) and first[last] == first[i]:
            last += 1
        return last

    def settle(self, i: int, rows: np.ndarray) -> None:
        """Chooses the scales of the group that begins with row i by the rows it has now."""
        form = replace(self._form, per="channel")
        block = jnp.asarray(np.moveaxis(rows, -2, 0).reshape(rows.shape[-2], -1), jnp.float32)
        at = self._numbers[..., i, :].reshape(-1)
        scale, zero_point = (
            clipped_scale(block, form, (1,)) if self._clip else scale_of(*ranges(block, form, (1,)), form)
        )
        assert self._scale is not None
        self._scale[at] = np.asarray(scale)[0]
        if self._zero is not None:
            self._zero[at] = np.asarray(zero_point)[0]

    def scales(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """All scales and zero points, in a shape."""
        return tuple(None if x is None else jnp.asarray(x.reshape(shape)) for x in (self._scale, self._zero))  # type: ignore[return-value]


def gptq(
    matrix: np.ndarray,
    gram: np.ndarray,
    rounding: Rounding,
    order: np.ndarray,
    damping: float,
    settled: bool = True,
) -> np.ndarray:
    """Rounds a matrix so that ‖X(W − Ŵ)‖² stays small.

    Args:
        matrix: W, float64[k, n]; those of several groups, which have inputs of their own, as [groups, k, n].
        gram: XᵀX, float64[k, k] or [groups, k, k].
        rounding: to what.
        order: which row comes when, a permutation of the rows.
        damping: share of the mean of the diagonal that is added to it.
        settled: whether scales are; otherwise each group's are chosen when its first row is reached.

    Returns:
        Ŵ, float64 of W's shape.
    """
    factor = _factor(gram[..., order[:, None], order], damping)
    work, rounded = matrix[..., order, :].copy(), np.empty_like(matrix)
    count = len(order)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        errors = np.zeros((*work.shape[:-2], end - start, work.shape[-1]))
        for i in range(start, end):
            if not settled and (last := rounding.group(i)) > i:
                # Rows beyond this block have not been told of its errors yet.
                pending = factor[..., start:i, end:last].swapaxes(-1, -2) @ errors[..., : i - start, :]
                rows = [work[..., i : min(last, end), :], work[..., end:last, :] - pending]
                rounding.settle(i, np.concatenate(rows, -2))
            values = rounding.row(int(order[i]), work[..., i, :])
            rounded[..., order[i], :] = values
            error = (work[..., i, :] - values) / factor[..., i, i, None]
            errors[..., i - start, :] = error
            work[..., i:end, :] -= factor[..., i, i:end, None] * error[..., None, :]
        work[..., end:, :] -= factor[..., start:end, end:].swapaxes(-1, -2) @ errors
    return rounded


def _factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """U of H⁻¹ = UᵀU."""
    one = np.eye(gram.shape[-1])
    mean = np.diagonal(gram, axis1=-2, axis2=-1).mean(-1)[..., None, None]
    damped = gram + np.where(mean > 0, damping * mean, 1.0) * one
    roots = np.linalg.cholesky(damped[..., ::-1, ::-1])[..., ::-1, ::-1]
    inverses = [solve_triangular(root, one) for root in roots.reshape(-1, *one.shape)]
    return np.stack(inverses).reshape(gram.shape)
