"""Memory: of checkpointed training, whose savings must survive, and of the zoo's programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, verdict_cell
from jaxinfer.models.zoo import load
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet

CHECKPOINTED_LIMIT = 1.02
PEAK_LIMIT = 1.05


def memory(request: Request, layers: int, width: int, batch: int) -> list[Row]:
    """Measures both, prints tables and writes the rows.

    Args:
        request: where to print and write, and the models to look at.
        layers: of the checkpointed network.
        width: of its layers.
        batch: rows that it is trained on.
    """
    sizes = {"layers": layers, "width": width, "batch": batch}
    options = dict(request.optimize)
    training = [fresh(checkpointed, looped=looped, optimize=options, **sizes) for looped in (True, False)]
    zoo = [
        fresh(program, model=name, batch=size, tiny=request.tiny, optimize=options)
        for name in request.models
        for size in request.batches
    ]
    rows = [{"task": "memory", **row} for row in (*training, *zoo)]
    append(request.output, rows)
    request.console.print(_training_sheet(training))
    request.console.print(_zoo_sheet(zoo))
    return rows


def checkpointed(looped: bool, layers: int, width: int, batch: int, optimize: Mapping[str, Any]) -> Row:
    """Temporary memory of ``value_and_grad`` of a network whose layers are checkpointed, original and optimized.

    Args:
        looped: whether the layers are a ``scan`` or written out.
        layers: how many.
        width: of each.
        batch: rows.
        optimize: options of `autoinfer.optimize`.
    """

    @jax.checkpoint
    def layer(x: jax.Array, weights: jax.Array) -> jax.Array:
        return x + jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[1])

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        if looped:
            x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)
        else:
            for w in weights:
                x = layer(x, w)
        return jnp.mean(x**2)

    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((layers, 2, width, width)) / width**0.5, jnp.float32)
    x = jnp.asarray(rng.standard_normal((batch, width)), jnp.float32)
    forms: dict[str, Callable[..., Any]] = {
        "original": jax.value_and_grad(loss),
        "gradient of the optimized": jax.value_and_grad(autoinfer.optimize(loss, **optimize)),
        "optimized gradient": autoinfer.optimize(jax.value_and_grad(loss), **optimize),
    }
    used = {name: _memory(jax.jit(form).lower(weights, x))["temporary"] for name, form in forms.items()}
    original, *others = used.values()
    return {
        **environment(),
        "what": "checkpointed",
        "form": "scan" if looped else "written out",
        "layers": layers,
        "width": width,
        "batch": batch,
        "temporary_bytes": used,
        "holds": all(other <= CHECKPOINTED_LIMIT * original for other in others),
    }


def program(model: str, batch: int, tiny: bool, optimize: Mapping[str, Any]) -> Row:
    """Memory of one model's programs: arguments (weights included), results and what is needed between."""
    loaded = load(model, tiny=tiny)
    inputs = loaded.make_inputs(batch)
    known = (loaded.variables, *inputs[: loaded.frozen_inputs])
    live = inputs[loaded.frozen_inputs :]
    fast = autoinfer.optimize(loaded.apply, **optimize).freeze(*known)
    fast(*live)
    explained = fast.explain(*live)
    before = _memory(jax.jit(loaded.apply).lower(*known, *live))
    after = _memory(fast.lower(*live))
    folded = explained.weights.folded_bytes if explained.weights else 0
    return {
        **environment(),
        "what": "zoo",
        "model": model,
        "batch": batch,
        "tiny": tiny,
        "optimize": dict(optimize),
        "verdict": explained.verdict,
        "before": before,
        "after": after,
        "folded_bytes": folded,
        "holds": after["peak"] <= PEAK_LIMIT * before["peak"] + (folded or 0),
    }


def _memory(lowered: Any) -> dict[str, int]:
    """Bytes by XLA's account.

    Raises:
        RuntimeError: the backend keeps no account.
    """
    stats = lowered.compile().memory_analysis()
    if stats is None:
        raise RuntimeError(f"{jax.default_backend()} does not say how much memory a program takes; use another backend")
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
    }
    return {**parts, "peak": sum(parts.values()) - stats.alias_size_in_bytes}


def _training_sheet(rows: Sequence[Row]) -> Sheet:
    names = list(rows[0]["temporary_bytes"])
    cells = tuple(
        (
            Cell(f"{row['layers']} layers, {row['form']}"),
            *(Cell(numbers.size(row["temporary_bytes"][name])) for name in names),
            verdict_cell(row["holds"]),
        )
        for row in rows
    )
    title = "Temporary memory of a checkpointed value_and_grad"
    return Sheet(title, ("", *names, f"≤ {CHECKPOINTED_LIMIT}×"), cells, (1, 2, 3))


def _zoo_sheet(rows: Sequence[Row]) -> Sheet:
    columns = ("model", "batch", "peak, original", "peak, optimized", "temporary", "temporary", "folded", "within")
    cells = tuple(
        (
            Cell(row["model"] + (" (tiny)" if row["tiny"] else "")),
            Cell(str(row["batch"])),
            Cell(numbers.size(row["before"]["peak"])),
            Cell(numbers.size(row["after"]["peak"])),
            Cell(numbers.size(row["before"]["temporary"])),
            Cell(numbers.size(row["after"]["temporary"])),
            Cell(numbers.size(row["folded_bytes"])),
            verdict_cell(row["holds"]),
        )
        for row in rows
    )
    note = f"within: the peak is at most {PEAK_LIMIT} times the original's plus the folded weights"
    return Sheet("Memory of the zoo's programs", columns, cells, (1, 2, 3, 4, 5, 6), note)
