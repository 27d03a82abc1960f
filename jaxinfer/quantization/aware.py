"""Training that knows of quantization: the program rounds as the quantized one will, and learns its step sizes.

Parameters that products read, and what they are multiplied with, go through :func:`rounded`. Step sizes are trained
with everything else by whatever optimizer the user has; what comes out is quantized with them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.analysis.weights import OnWeights, Weights, bound, run_on
from jaxinfer.graph import Node
from jaxinfer.graph.retrace import Parameters, Program, split
from jaxinfer.graph.retrace import Static as CallStatic
from jaxinfer.quantization.calibrate import Inputs, Wanted, calibrate
from jaxinfer.quantization.clipping import clipped_scale
from jaxinfer.quantization.layers import Layer, is_weights, matrix_form
from jaxinfer.quantization.learned_steps import rounded, spread
from jaxinfer.quantization.method import Method, Nearest, Written
from jaxinfer.quantization.observers import Seen
from jaxinfer.quantization.program import QuantizeError
from jaxinfer.quantization.quantize import first_batch, layers_of, schemes_of
from jaxinfer.quantization.scheme import Format, Override, Scheme, SchemeError
from jaxinfer.quantization.tensor import quantize_array, scale_of


class Settled(NamedTuple):
    """What training came to: ``quantize(fun, s.params, s.scheme, calibration, method=s.method)``.

    Attributes:
        params: the parameters, not rounded.
        scheme: the scheme, with the ranges of activations that were learned.
        method: writes parameters with the steps that were learned.
    """

    params: Any
    scheme: Scheme
    method: Method


@dataclass(frozen=True)
class LearnedSteps:
    """Each entry goes to the nearest value at scales that are given by the parameter's key path.

    Parameters without any are written as ``method`` says.
    """

    scales: Mapping[str, tuple[Any, Any]]
    method: Method = field(default_factory=Nearest)

    def wanted(self, layer: Layer, scheme: Scheme) -> Wanted | None:
        return None if layer.name in self.scales else self.method.wanted(layer, scheme)

    def write(self, layer: Layer, array: Any, scheme: Scheme, inputs: Inputs | None) -> Written:
        if layer.name not in self.scales:
            return self.method.write(layer, array, scheme, inputs)
        assert scheme.weights is not None
        scale, zero_point = self.scales[layer.name]
        axes = layer.axes(scheme.weights)
        return Written(quantize_array(array, scheme.weights, *axes, scale=scale, zero_point=zero_point))


@dataclass(frozen=True)
class Fixed:
    """A range that is known already."""

    low: float
    high: float
    needs_counts: ClassVar[bool] = False

    def range(self, seen: Seen, levels: int, affine: bool) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True, eq=False)
class _Treated:
    """A layer, its scheme, and the zero points of its weights and of what they are multiplied with."""

    layer: Layer
    scheme: Scheme
    weights_zero: Any
    input_zero: Any


class QuantizationAware:
    """A program that rounds; called like the original, with ``trainable`` in the place of the parameters."""

    def __init__(self, program: Program, names: Sequence[str], treated: Mapping[int, _Treated], scheme: Scheme):
        self._program, self._names, self._treated, self._scheme = program, tuple(names), dict(treated), scheme
        functools.update_wrapper(self, program.fun, updated=())

    def __call__(self, trainable: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        arrays, static = split((trainable["params"], args, kwargs))
        return self._run(arrays, static, trainable)

    def _run(self, arrays: Sequence[Any], static: CallStatic, trainable: Mapping[str, Any]) -> Any:
        graph, tree = self._program.trace(arrays, static, keep_custom=True)
        inputs: list[Any] = list(arrays)
        for leaf in range(len(self._names)):
            x = jnp.asarray(inputs[leaf])
            if leaf in self._treated:
                treated = self._treated[leaf]
                inputs[leaf] = Weights.of(leaf, _rounded_weights(treated, x, trainable["weights"][treated.layer.name]))
            elif is_weights(x):
                inputs[leaf] = Weights.of(leaf, x)
        domain = _Rounding(self._treated, trainable["activations"])
        return jax.tree.unflatten(tree, run_on(graph, domain, inputs))

    def settled(self, trainable: Mapping[str, Any]) -> Settled:
        """What to quantize with after training (see :class:`Settled`)."""
        scales, overrides = {}, []
        for treated in self._treated.values():
            name, scheme = treated.layer.name, treated.scheme
            scales[name] = (_positive(trainable["weights"][name]), treated.weights_zero)
            if name in trainable["activations"]:
                form, step = scheme.activations, float(_positive(trainable["activations"][name]))
                assert form is not None
                zero = 0 if treated.input_zero is None else int(treated.input_zero)
                found = Fixed((form.low - zero) * step, (form.high - zero) * step)
                if not form.affine:
                    found = Fixed(-form.high * step, form.high * step)
                scheme = replace(scheme, observer=found)
                overrides.append(Override(re.compile(f"^{re.escape(name)}$"), replace(scheme, overrides=())))
        return Settled(trainable["params"], self._scheme.with_overrides(*overrides), LearnedSteps(scales))


def quantization_aware(
    fun: Callable[..., Any], params: Any, scheme: Scheme, calibration: Iterable[Any]
) -> tuple[QuantizationAware, dict[str, Any]]:
    """A function that rounds as a quantized program does and can be differentiated, and what to train of it.

    Args:
        fun: a function of a tree of parameters and further arguments: a model, or its loss.
        params: the parameters; arrays, not tracers.
        scheme: what is to be written in integers. Static activations learn a step; dynamic ones are scaled by what they
            are. Zero points stay what calibration found.
        calibration: batches, each a tuple of the further arguments (or the only one).

    Returns:
        ``program`` and ``trainable``: ``program(trainable, *args)``, where ``trainable`` is a dictionary of ``params``,
        and the step sizes of ``weights`` and ``activations`` by key path of the parameter. Train it with any optimizer;
        then ``program.settled(trainable)`` says how to quantize.

    Raises:
        CalibrationError: no batch, or one that nothing can be learned from.
        SchemeError: the scheme has numbers that are no integers.
        QuantizeError: the program reads or writes Refs.

    Reference: Esser et al., "Learned step size quantization", ICLR 2020.

    Example:
        >>> program, trainable = quantization_aware(loss, params, Int4(), batches)
        >>> gradients = jax.grad(program)(trainable, batch)
    """
    given = Parameters(params)
    names, arrays = given.names, [jnp.asarray(x) for x in given.arrays]
    program = Program(fun, given.shapes, QuantizeError)
    first, batches = first_batch(calibration)
    found = layers_of(program, given, first)
    schemes = schemes_of(found, names, scheme)
    chosen: dict[int, tuple[Layer, Scheme]] = {}
    for layer in found.layers:
        settled = schemes[layer.leaf]
        if settled is not None and settled.weights is not None:
            _check(settled)
            chosen[layer.leaf] = (layer, settled)
    wanted = {x.position: Wanted(counts=s.observer.needs_counts) for x, s in chosen.values() if _learns(s)}
    inputs = calibrate(program, names, params, batches, wanted) if wanted else {}
    trainable: dict[str, Any] = {"params": params, "weights": {}, "activations": {}}
    treated = {}
    for leaf, (layer, settled) in chosen.items():
        assert settled.weights is not None
        step, zero = clipped_scale(arrays[leaf], settled.weights, *layer.axes(settled.weights))
        trainable["weights"][layer.name] = step
        input_zero = None
        if _learns(settled):
            trainable["activations"][layer.name], input_zero = _input_step(settled, inputs[layer.position])
        treated[leaf] = _Treated(layer, settled, zero, input_zero)
    return QuantizationAware(program, names, treated, scheme), trainable


def _check(scheme: Scheme) -> None:
    for form in (scheme.weights, scheme.activations):
        if form is not None and not form.is_integer:
            raise SchemeError(f"step sizes of {form.number} are not learned: choose int8 or int4")


def _learns(scheme: Scheme) -> bool:
    return scheme.activations is not None and not scheme.dynamic


def _input_step(scheme: Scheme, inputs: Inputs) -> tuple[Any, Any]:
    form = scheme.activations
    assert form is not None
    low, high = scheme.observer.range(inputs.seen, int(form.high - form.low) + 1, form.affine)
    return scale_of(low, high, form)


def _positive(step: Any) -> Any:
    return jnp.maximum(jnp.abs(step), 1e-8)


def _rounded_weights(treated: _Treated, array: Any, step: Any) -> Any:
    form = treated.scheme.weights
    assert form is not None
    _, group_axis = treated.layer.axes(form)
    zero = spread(treated.weights_zero, form, array.shape, group_axis)
    low, high = _bounds(form, zero)
    return rounded(array, spread(step, form, array.shape, group_axis), low, high, array.size / step.size)


def _bounds(form: Format, zero_point: Any) -> tuple[Any, Any]:
    if zero_point is None:
        return form.low, form.high
    zero = jnp.asarray(zero_point, jnp.float32)
    return form.low - zero, form.high - zero


class _Rounding(OnWeights):
    """Runs a program whose weights are rounded already and rounds what they are multiplied with."""

    def __init__(self, treated: Mapping[int, _Treated], steps: Mapping[str, Any]):
        super().__init__()
        self._treated, self._steps = treated, steps

    def meets(self, node: Node, side: int) -> bool:
        return matrix_form(node, side) is not None

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        treated = self._treated.get(weights.leaf)
        if treated is not None and treated.scheme.activations is not None:
            x = self._input(node, side, treated, x)
        w = self.array(weights)
        return bound(node, [x, w] if side else [w, x])

    def _input(self, node: Node, side: int, treated: _Treated, x: Any) -> Any:
        form = treated.scheme.activations
        assert form is not None
        if not treated.scheme.dynamic:
            low, high = _bounds(form, treated.input_zero)
            return rounded(x, self._steps[treated.layer.name], low, high, x.size)
        axes = _shared(node, side, form, x.ndim)
        detached = jax.lax.stop_gradient(x.astype(jnp.float32))
        low, high = jnp.min(detached, axes, keepdims=True), jnp.max(detached, axes, keepdims=True)
        step, zero = scale_of(low, high, form)
        return rounded(x, jax.lax.stop_gradient(step), *_bounds(form, zero), x.size)


def _shared(node: Node, side: int, form: Format, rank: int) -> tuple[int, ...]:
    """The axes along which dynamic activations share a scale."""
    if form.per == "tensor":
        return tuple(range(rank))
    if node.op == "dot_general":
        contract, _ = node.params["dimension_numbers"]
        return tuple(contract[1 - side])
    batch = node.params["dimension_numbers"].lhs_spec[0]
    return tuple(a for a in range(rank) if a != batch)
