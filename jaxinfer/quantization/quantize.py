"""``autoinfer.quantize``: parameters in fewer bits, and products computed with them where that measures faster."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph.retrace import Parameters, Program, split
from jaxinfer.quantization.activations import Static
from jaxinfer.quantization.calibrate import CalibrationError, Inputs, arguments, calibrate
from jaxinfer.quantization.chain import Timed, fastest
from jaxinfer.quantization.forms import FLOAT, forms_of
from jaxinfer.quantization.layers import Found, Layer, Table, find_layers
from jaxinfer.quantization.lookups import LOOKUP
from jaxinfer.quantization.measure import Timings, laid_out
from jaxinfer.quantization.method import Method, Nearest, Written, wanted_by
from jaxinfer.quantization.program import QuantizedProgram, QuantizeError, Treated
from jaxinfer.quantization.report import LayerReport, QuantizationReport
from jaxinfer.quantization.scheme import Override, Scheme, SchemeError
from jaxinfer.quantization.tensor import Quantized, quantize_array
from jaxinfer.search.cache import default_cache
from jaxinfer.search.choose import describe

Prefer = Literal["speed", "size"]


class QuantizationWarning(UserWarning):
    """Something that was asked for has no effect."""


def quantize(
    fun: Any,
    params: Any,
    scheme: Scheme,
    calibration: Iterable[Any],
    *,
    prefer: Prefer = "speed",
    method: Method | None = None,
    tune: Literal["auto", "off"] = "auto",
    progress: bool = False,
) -> tuple[QuantizedProgram, Any]:
    """Writes the parameters that products read in fewer bits, and computes the products accordingly.

    Each product is timed in the forms that its scheme can be computed in, and in floating point, at the shapes of the
    first batch. Parameters of which rows are looked up, as of an embedding, are written in fewer bits where size is
    preferred, and only the rows that a call takes are widened. Errors of layers add up: measure what the whole program
    loses.

    Args:
        fun: a function of a tree of parameters and further arguments.
        params: the parameters; arrays, not tracers.
        scheme: which numbers, for what.
        calibration: batches, each a tuple of the further arguments (or the only one); one at least, whose shapes the
            program is tuned for. All of them are run where ranges of activations, or what ``method`` asks for, come
            from them.
        prefer: ``"speed"``: a parameter stays in floating point where no form of its scheme is faster. ``"size"``:
            every parameter that the scheme applies to is written in fewer bits, and the fastest form for it is used.
        method: how parameters that products read are written; by default every entry goes to the nearest value, as
            those of what is only looked up always do.
        tune: ``"auto"`` times what the cache does not have; ``"off"`` times nothing and uses the scheme everywhere,
            the same on every machine.
        progress: whether to show a progress bar over batches.

    Returns:
        The program and its parameters: a tree like ``params`` in which :class:`Quantized` stand for some arrays.

    Raises:
        CalibrationError: no batch, or one that nothing can be learned from.
        SchemeError: an exception fits nothing and ``scheme.unmatched`` is ``"error"``.
        QuantizeError: the program reads or writes Refs.
    """
    method = Nearest() if method is None else method
    if prefer not in ("speed", "size"):
        raise ValueError(f"prefer={prefer!r}: choose 'speed' or 'size'")
    given = Parameters(params)
    names, arrays = given.names, [jnp.asarray(x) for x in given.arrays]
    program = Program(fun, given.shapes, QuantizeError)
    first, batches = first_batch(calibration)
    found = layers_of(program, given, first)
    schemes = schemes_of(found, names, scheme)
    plan = _Plan(found, schemes, arrays, prefer, tune, method)
    plan.choose()
    chosen = {leaf: (layer, plan.schemes[leaf]) for leaf, layer in plan.layers.items() if leaf in plan.chosen}
    wanted = wanted_by(method, chosen)
    inputs = calibrate(program, names, params, batches, wanted, progress=progress) if wanted else {}
    for layer in found.layers:
        if layer.leaf in plan.chosen:
            plan.write(layer, inputs)
    for table in found.tables:
        if table.leaf in plan.chosen:
            plan.write_table(table)
    new = given.with_arrays(plan.values.get(i, x) for i, x in enumerate(arrays))
    return QuantizedProgram(program, names, plan.treated, plan.report(names)), new


def first_batch(calibration: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first batch, and an iterator over all of them."""
    if hasattr(calibration, "shape") or isinstance(calibration, Mapping):
        raise CalibrationError("calibration takes an iterable of batches: put a single one into a list")
    iterator = iter(calibration)
    for batch in iterator:
        return batch, itertools.chain([batch], iterator)
    raise CalibrationError("no calibration data: give one batch at least")


def layers_of(program: Program, params: Parameters, batch: Any) -> Found:
    """What the program does with its parameters in a call with a batch."""
    given, static = split((params.with_arrays(params.arrays), arguments(batch), {}))
    try:
        graph, _ = program.trace(given, static, keep_custom=True)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"batch 0 of the calibration data does not fit the program: {error}") from error
    types = [jax.ShapeDtypeStruct(n.aval.shape, n.aval.dtype) for n in graph.inputs]
    return find_layers(graph, params.names, types[: len(params.arrays)], types[len(params.arrays) :])


def schemes_of(found: Found, names: Sequence[str], scheme: Scheme) -> dict[int, Scheme | None]:
    """What holds for each layer, by the position of its parameter; complains of exceptions that fit nothing."""
    used: list[Override] = []
    schemes: dict[int, Scheme | None] = {}
    for layer in found.layers:
        settled, override = scheme, None
        for read in layer.reads:
            settled, override = scheme.at(layer.name, read.position, found.products)  # type: ignore[assignment]
            if override is not None:
                break
        schemes[layer.leaf] = settled
        used += [
            o for o in scheme.overrides if any(o.fits(layer.name, r.position, found.products) for r in layer.reads)
        ]
    for table in found.tables:
        schemes[table.leaf], _ = scheme.at(table.name, None, found.products)
    for leaf in [*found.others, *(x.leaf for x in found.tables)]:
        used += [o for o in scheme.overrides if o.fits(names[leaf], None, found.products)]
    idle = [o for o in scheme.overrides if not any(o is u for u in used)]
    if idle:
        message = f"{', '.join(repr(o.match) for o in idle)} fits no parameter and no product that reads one"
        if scheme.unmatched == "error":
            raise SchemeError(f"{message}; parameters are {', '.join(x.name for x in found.layers[:12])}")
        warnings.warn(message, QuantizationWarning, stacklevel=3)
    return schemes


@dataclass
class _Choice:
    form: str
    seconds: Mapping[str, float]
    reason: str = ""


class _Plan:
    """What becomes of each layer, as it is settled."""

    def __init__(
        self,
        found: Found,
        schemes: Mapping[int, Scheme | None],
        arrays: Sequence[Any],
        prefer: Prefer,
        tune: str,
        method: Method,
    ):
        self.found, self.arrays = found, arrays
        self.layers: dict[int, Layer] = {x.leaf: x for x in found.layers}
        self.schemes: dict[int, Any] = dict(schemes)
        self.chosen: dict[int, _Choice] = {}
        self.left: dict[int, _Choice] = {}
        self.values: dict[int, Quantized] = {}
        self.treated: dict[int, Treated] = {}
        self._prefer, self._tune, self._method = prefer, tune, method
        self._written: dict[int, tuple[float | None, Static | None]] = {}

    def choose(self) -> None:
        """Settles the form of each layer."""
        timings = Timings(sum(x.size * x.dtype.itemsize for x in self.arrays), default_cache())
        timed: list[Timed] = []
        for layer in self.found.layers:
            scheme = self.schemes[layer.leaf]
            if scheme is None or scheme.weights is None:
                self.left[layer.leaf] = _Choice(FLOAT, {}, "left out by the scheme")
                timed.append(Timed(layer.leaf, FLOAT, {}))
                continue
            forms = forms_of(layer, scheme)
            if self._tune == "off":
                self.chosen[layer.leaf] = _Choice("dequantize" if scheme.activations is None else forms[0], {})
                continue
            seconds = timings.of(layer, scheme)
            timed.append(Timed(layer.leaf, min(forms, key=seconds.__getitem__), seconds))
        self._choose_tables()
        if self._tune == "off":
            return
        quantized = [bool(t.seconds) for t in timed] if self._prefer == "size" else fastest(timed)
        for now, is_quantized in zip(timed, quantized):
            if is_quantized:
                between = self._prefer == "speed" and not now.is_faster
                self.chosen[now.leaf] = _Choice(now.form, now.seconds, "between codes" if between else "")
            elif now.seconds:
                self.left[now.leaf] = _Choice(FLOAT, now.seconds, now.why_not)

    def _choose_tables(self) -> None:
        for table in self.found.tables:
            scheme = self.schemes[table.leaf]
            if scheme is None or scheme.weights is None:
                self.left[table.leaf] = _Choice(FLOAT, {}, "left out by the scheme")
            elif self._prefer == "size":
                self.chosen[table.leaf] = _Choice(LOOKUP, {})
            else:
                self.left[table.leaf] = _Choice(FLOAT, {}, "only looked up: fewer bits save no time")

    def write_table(self, table: Table) -> None:
        """Writes a parameter that is only looked up: every entry goes to the nearest value."""
        form = self.schemes[table.leaf].weights
        quantized = quantize_array(self.arrays[table.leaf], form, *table.axes(form), packing=len(table.shape) - 1)
        self.values[table.leaf] = quantized
        self._written[table.leaf] = (_relative_error(self.arrays[table.leaf], Written(quantized)), None)

    def write(self, layer: Layer, inputs: Mapping[int, Inputs]) -> None:
        """Writes a parameter and settles what happens at its products."""
        scheme, form, array = self.schemes[layer.leaf], self.chosen[layer.leaf].form, self.arrays[layer.leaf]
        written = self._method.write(layer, array, scheme, inputs.get(layer.position))
        error = _relative_error(array, written)
        self.values[layer.leaf] = laid_out(layer, written.quantized, form)
        static = None
        for read in layer.reads:
            static = _static(scheme, inputs.get(read.position), written.smooth)
            self.treated[read.position] = Treated(
                layer.leaf, read.side, scheme, form, static, written.smooth, written.correction
            )
        self._written[layer.leaf] = (error, static)

    def report(self, names: Sequence[str]) -> QuantizationReport:
        """What became of everything."""
        rows = [*map(self._layer_report, self.found.layers), *map(self._layer_report, self.found.tables)]
        for leaf, why in self.found.others.items():
            size = _bytes(self.arrays[leaf])
            rows.append(LayerReport(names[leaf], None, "", None, FLOAT, {}, None, None, size, size, None, why))
        before = sum(map(_bytes, self.arrays))
        after = sum(_bytes(self.values.get(i, x)) for i, x in enumerate(self.arrays))
        return QuantizationReport(tuple(rows), before, after)

    def _layer_report(self, layer: Layer | Table) -> LayerReport:
        choice = self.chosen.get(layer.leaf) or self.left[layer.leaf]
        array = self.arrays[layer.leaf]
        error, static = self._written.get(layer.leaf, (None, None))
        return LayerReport(
            layer.name,
            layer.position,
            describe(layer.node),
            self.schemes[layer.leaf],
            choice.form,
            dict(choice.seconds),
            None if static is None else static.low,
            None if static is None else static.high,
            _bytes(array),
            _bytes(self.values.get(layer.leaf, array)),
            error,
            choice.reason,
        )


def _static(scheme: Scheme, inputs: Inputs | None, smooth: Any) -> Static | None:
    form = scheme.activations
    if form is None or scheme.dynamic or not form.has_scale:
        return None
    assert inputs is not None
    if smooth is not None:
        if inputs.lows is None or inputs.highs is None:
            raise ValueError("a method that smooths static activations has to ask for columns")
        return Static.of(form, float(np.min(inputs.lows / smooth)), float(np.max(inputs.highs / smooth)))
    levels = int(form.high - form.low) + 1 if form.is_integer else 2**form.bits
    return Static.of(form, *scheme.observer.range(inputs.seen, levels, form.affine))


def _relative_error(array: Any, written: Written) -> float | None:
    if written.smooth is not None:
        return None
    exact = np.asarray(array, np.float64)
    difference = np.asarray(written.quantized.dequantize(), np.float64) - exact
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(exact)), 1e-300))


def _bytes(x: Any) -> int:
    return int(x.nbytes) if isinstance(x, Quantized) else int(x.size * x.dtype.itemsize)
