"""What became of each parameter, as data and as a table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from jaxinfer.quantization.scheme import Scheme


@dataclass(frozen=True)
class LayerReport:
    """What became of one parameter.

    Attributes:
        name: its key path.
        position: the number of the first product that reads it, in the order of the program; None where none does.
        product: that product and its shapes.
        scheme: what was asked for; None where an exception says to leave it.
        form: the form that was chosen; ``"lookup"`` where rows of it are taken; ``"float"`` where it was left in
            floating point.
        seconds: seconds of the product in each form that was timed; ``"float"`` is the fastest floating-point one,
            ``"float between codes"`` the same if it has to read and write them. Forms that looked faster than floating
            point were timed once more in pairs beside it.
        low, high: the range of its other operand, where calibration settled that.
        before, after: bytes.
        error: ‖W − Ŵ‖ / ‖W‖, None where nothing was rounded.
        reason: why it was left; ``"between codes"`` where it is faster than ``"float between codes"`` only; or "".
    """

    name: str
    position: int | None
    product: str
    scheme: Scheme | None
    form: str
    seconds: Mapping[str, float]
    low: float | None
    high: float | None
    before: int
    after: int
    error: float | None
    reason: str

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored in fewer bits."""
        return self.form != "float"

    @property
    def ratio(self) -> float | None:
        """How many times faster the product is than the fastest floating-point form; None where not timed."""
        if self.float_seconds is None or self.form not in self.seconds:
            return None
        return self.float_seconds / self.seconds[self.form]

    @property
    def float_seconds(self) -> float | None:
        """Seconds of the floating-point form that the chosen one was compared with; None where not timed."""
        between = "float between codes" if self.reason == "between codes" else "float"
        return self.seconds.get(between)


@dataclass(frozen=True)
class QuantizationReport:
    """What became of each parameter of two axes or more.

    Attributes:
        layers: in the order of the program.
        before, after: bytes of all parameters.
    """

    layers: tuple[LayerReport, ...]
    before: int
    after: int

    def table(self) -> Table:
        """The parameters as a table."""
        title = f"Quantized parameters: {self.before / 2**20:.2f} MiB → {self.after / 2**20:.2f} MiB"
        table = Table(title=title)
        for heading in ("", "parameter", "product", "numbers", "computed as", "float", "now", "faster", "error", ""):
            right = heading in ("float", "now", "faster", "error")
            table.add_column(heading, justify="right" if right else "left")
        for layer in self.layers:
            table.add_row(
                "" if layer.position is None else str(layer.position),
                layer.name,
                layer.product,
                _numbers(layer.scheme) if layer.is_quantized else "",
                layer.form,
                _microseconds(layer.float_seconds),
                _microseconds(layer.seconds.get(layer.form)) if layer.is_quantized else "",
                "" if layer.ratio is None or not layer.is_quantized else f"{layer.ratio:.2f}×",
                "" if layer.error is None else f"{layer.error:.4f}",
                layer.reason,
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=200).print(self.table())
        return text.getvalue()


def _numbers(scheme: Scheme | None) -> str:
    if scheme is None:
        return ""
    formats = [str(f) for f in (scheme.weights, scheme.activations) if f is not None]
    return " × ".join(formats) + (" (dynamic)" if scheme.dynamic else "")


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.0f} µs"
