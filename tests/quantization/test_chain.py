"""Which layers are quantized: as exhaustive search over all choices says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxinfer.quantization.chain import Timed, fastest


def _layer(now: float, plain: float, between: float) -> Timed:
    return Timed(0, "int8", {"int8": now, "float": plain, "float between codes": between})


def _total(layers: list[Timed], states: tuple[bool, ...]) -> float | None:
    """Seconds of a choice; None where a layer is quantized that is slower than in floating point."""
    padded = (False, *states, False)
    total = 0.0
    for i, (layer, now) in enumerate(zip(layers, states)):
        beside = padded[i] + padded[i + 2]
        if not layer.seconds:
            if now:
                return None
            continue
        plain, between = layer.seconds["float"], layer.seconds["float between codes"]
        if not now:
            total += plain + beside * (between - plain) / 2
        elif layer.now <= 0.95 * plain or (beside == 2 and layer.now <= 0.95 * between):
            total += layer.now / 0.95
        else:
            return None
    return total


@pytest.mark.parametrize("seed", range(20))
def test_all_layers_together_take_the_least_time(seed) -> None:
    rng = np.random.default_rng(seed)
    layers = [_layer(*rng.uniform(0.5, 1.5, 3)) if rng.random() < 0.9 else Timed(0, "float", {}) for _ in range(7)]
    totals = {s: t for s in itertools.product([False, True], repeat=7) if (t := _total(layers, s)) is not None}
    found = totals[tuple(fastest(layers))]
    assert found == pytest.approx(min(totals.values()))


def test_a_slow_layer_between_codes_is_quantized_and_alone_it_is_not() -> None:
    fast, slow = _layer(0.5, 1.0, 1.0), _layer(1.1, 1.0, 1.5)
    assert fastest([fast, slow, fast]) == [True, True, True]
    assert fastest([fast, slow]) == [True, False] and fastest([slow]) == [False] and fastest([]) == []


def test_a_fast_layer_whose_neighbours_lose_more_stays() -> None:
    layers = [_layer(2.0, 1.0, 3.0), _layer(0.9, 1.0, 1.0), _layer(2.0, 1.0, 3.0)]
    assert fastest(layers) == [False, False, False]
    assert "takes no longer" in layers[1].why_not and "2.00 times" in layers[0].why_not
