"""The quantized program: the original traced anew for each kind of arguments, with other arithmetic at its products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer import _jax
from jaxinfer.analysis.reparametrized import Reparametrized
from jaxinfer.analysis.weights import OnWeights, Weights, bound
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.graph.retrace import Program
from jaxinfer.quantization.activations import Codes, Static
from jaxinfer.quantization.forms import Use, apply
from jaxinfer.quantization.layers import matrix_form, product_positions
from jaxinfer.quantization.lookups import looked_up
from jaxinfer.quantization.report import QuantizationReport
from jaxinfer.quantization.scheme import Scheme
from jaxinfer.quantization.segments import on_codes, wanted_codes
from jaxinfer.quantization.tensor import Quantized


class QuantizeError(Exception):
    """A program could not be quantized, or a quantized program not be used in this way."""


@dataclass(frozen=True, eq=False)
class Treated:
    """What happens at a product that reads a quantized parameter.

    Attributes:
        leaf: the parameter's position.
        side: which operand it is.
        scheme: what holds for it.
        form: the name of the form that it is computed in.
        static: how its other operand is written, if calibration settled that.
        smooth, correction: see :class:`jaxinfer.quantization.method.Written`.
    """

    leaf: int
    side: int
    scheme: Scheme
    form: str
    static: Static | None = None
    smooth: Any = None
    correction: Any = None


class OnCodes(OnWeights):
    """Runs a program with quantized parameters."""

    def __init__(self, graph: Graph, treated: Mapping[int, Treated], names: Sequence[str]) -> None:
        super().__init__()
        positions = product_positions(graph)
        self._treated = {node: treated[p] for node, p in positions.items() if p in treated}
        self._names = names
        statics = {
            node: (t.side, t.static)
            for node, t in self._treated.items()
            if t.static is not None and t.smooth is None and t.form.startswith("int8")
        }
        self._wanted = wanted_codes(graph, statics)

    def meets(self, node: Node, side: int) -> bool:
        return matrix_form(node, side) is not None

    def array(self, weights: Weights) -> Any:
        value = weights.value
        return weights.move(value.dequantize() if isinstance(value, Quantized) else value)

    def other(self, x: Any) -> Any:
        return x.real() if isinstance(x, Codes) else super().other(x)

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        if any(isinstance(x, Codes) for x in inputs) and not any(isinstance(x, Weights) for x in inputs):
            with _jax.at_source(node.source, node.context):
                codes = on_codes(node, inputs, self._wanted.get(Value(node, 0)))
            if codes is not None:
                return [codes]
        return [self._settled(Value(node, i), x) for i, x in enumerate(super().default(node, *inputs))]

    def _settled(self, value: Value, x: Any) -> Any:
        static = self._wanted.get(value)
        return x if static is None or isinstance(x, (Codes, Weights)) else static.codes(x)

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        treated = self._treated.get(node)
        if not isinstance(weights.value, Quantized):
            w = self.array(weights)
            x = self.other(x)
            return bound(node, [x, w] if side else [w, x])
        if treated is None or treated.leaf != weights.leaf:
            raise QuantizeError(
                f"for arguments of these shapes the program reads {self._names[weights.leaf]} at another product than "
                "in the call it was quantized for: quantize it with such arguments"
            )
        use = Use(node, side, weights, treated.scheme, treated.static, treated.smooth, treated.correction)
        return apply(treated.form, use, x)

    def lookup(self, node: Node, weights: Weights, *indices: Any) -> Any:
        if not isinstance(weights.value, Quantized):
            return super().lookup(node, weights, *indices)
        return weights.move(looked_up(node, weights.value, indices))

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return super().scan(node, *map(_real, inputs))


def _real(x: Any) -> Any:
    return x.real() if isinstance(x, Codes) else x


class QuantizedProgram(Reparametrized):
    """A program some of whose parameters are :class:`Quantized`; called like the original, with the new parameters.

    Attributes:
        program: the original.
        names: key paths of the parameters.
        treated: what happens at products that read quantized ones, by their number in the program.
        report: what became of each parameter.
    """

    form = Quantized

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        treated: Mapping[int, Treated],
        report: QuantizationReport,
    ):
        super().__init__(program, names)
        self.treated, self.report = treated, report

    def domain(self, graph: Graph) -> OnCodes:
        return OnCodes(graph, self.treated, self.names)

    def explain(self) -> QuantizationReport:
        """What became of each parameter, and why."""
        return self.report
