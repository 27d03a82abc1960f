"""Ways to quantize, as a configuration names them, and training that knows of quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax

from jaxinfer import autoinfer
from jaxinfer.experiments.task import Row
from jaxinfer.quantization.program import QuantizedProgram

Items = tuple[Any, ...]


def made(options: Any) -> Any:
    """What stands for an object of `autoinfer`: its ``name`` there, and its fields, which may be such objects too."""
    if isinstance(options, Mapping):
        fields = {key: made(value) for key, value in options.items() if key != "name"}
        return getattr(autoinfer, options["name"])(**fields) if "name" in options else fields
    return [made(x) for x in options] if isinstance(options, list) else options


@dataclass(frozen=True)
class Training:
    """How a network is trained with rounding, from the weights it has.

    Attributes:
        steps: number of steps.
        batch: items in each.
        rate: the first learning rate of Adam, which falls to nothing with a cosine.
    """

    steps: int
    batch: int
    rate: float


class Lesson(NamedTuple):
    """What a network learns by, when it is trained with rounding.

    Attributes:
        loss: (parameters, *items) → scalar.
        batch: (step, items in it) → items.
    """

    loss: Callable[..., jax.Array]
    batch: Callable[[int, int], Items]


class Quantized(NamedTuple):
    """A program in fewer bits."""

    program: QuantizedProgram
    params: Any

    def __call__(self, *args: Any) -> Any:
        return self.program(self.params, *args)


def quantized(
    fun: Callable[..., Any], params: Any, way: Mapping[str, Any], seen: Sequence[Items], lesson: Lesson | None = None
) -> Quantized:
    """A program in fewer bits. Unless asked for, nothing is timed: every layer that the scheme applies to is quantized.

    Args:
        fun: (parameters, *items) → results.
        params: its parameters.
        way: the ``scheme`` and the ``method`` (see :func:`made`; by default the nearest values), and ``training``
            (fields of `Training`) where it is trained with rounding first; ``options`` are further arguments of
            `autoinfer.quantize`.
        seen: batches to calibrate with.
        lesson: what it learns by, if there is training.

    Raises:
        ValueError: there is training, and nothing to learn by.
    """
    scheme = made(way["scheme"])
    method = made(way["method"]) if way.get("method") else None
    if way.get("training"):
        if lesson is None:
            raise ValueError("there is nothing that this network could learn by")
        params, scheme, method = _trained(params, scheme, seen, lesson, Training(**way["training"]))
    options = {"tune": "off", **way.get("options", {})}
    return Quantized(*autoinfer.quantize(fun, params, scheme, seen, method=method, **options))


def _trained(params: Any, scheme: Any, seen: Sequence[Items], lesson: Lesson, training: Training) -> tuple[Any, ...]:
    first = [lesson.batch(index, training.batch) for index in range(len(seen))]
    program, trainable = autoinfer.quantization_aware(lesson.loss, params, scheme, first)
    optimizer = optax.adam(optax.cosine_decay_schedule(training.rate, max(training.steps, 1)))

    @jax.jit
    def step(trainable: Any, state: Any, items: Items) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(program)(trainable, *items), state)
        return optax.apply_updates(trainable, updates), state

    state = optimizer.init(trainable)
    for index in range(training.steps):
        trainable, state = step(trainable, state, lesson.batch(index, training.batch))
    return program.settled(trainable)


def facts(network: str, name: str, way: Mapping[str, Any], found: Quantized) -> Row:
    """What a row says of a way: how many layers it quantized, and the bytes of all parameters."""
    report = found.program.report
    layers = [layer for layer in report.layers if layer.position is not None]
    return {
        "task": "quantize",
        "network": network,
        "way": name,
        "options": dict(way),
        "scheme": str(made(way["scheme"])),
        "layers": {"quantized": sum(x.is_quantized for x in layers), "all": len(layers)},
        "bytes": {"before": report.before, "after": report.after},
    }


def figure(what: str, value: float, goal: float | None = None, most: bool = False, **more: float) -> Row:
    """One number, and whether it is at least (or, with ``most``, at most) what was asked for."""
    holds = None if goal is None else bool(value <= goal if most else value >= goal)
    return {"what": what, "value": float(value), **more, "goal": goal, "most": most, "holds": holds}
