"""Settled programs that start without being rewritten or compiled again.

What rewriting did with the weights of a program is kept as the compiled programs that folded them, and what runs as
one more; a later process loads them, folds its own weights and is ready. The graph that stands for it all is made again
only when somebody asks for it, from the same timings and with the arrays that are there already.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import _jax
from jaxinfer.graph import Graph
from jaxinfer.rewriting import compile_known, evaluate_known
from jaxinfer.search import program_files
from jaxinfer.search.cache import Store, key

# Where a weight comes from: (_ORIGINAL, its place among the original's) or (a fold, the place among its results).
_ORIGINAL = -1
# Where the code is that makes programs of functions.
_ROOMS = ("", "graph", "native", "analysis", "rewriting", "search")


@dataclass
class _Fold:
    operands: list[Any]
    code: _jax.Code | None
    results: list[Any]


class Record:
    """What rewriting looks up and folds while a program is settled, for :func:`save`.

    Args:
        cache: where timings are kept.
    """

    def __init__(self, cache: Store):
        self._cache = cache
        self.timings: dict[str, Any] = {}
        self.folds: list[_Fold] = []

    def get(self, key: str, default: Any = None) -> Any:
        """A timing measured earlier."""
        value = self._cache.get(key, default)
        if value is not default:
            self.timings[key] = value
        return value

    def put(self, key: str, value: Any) -> None:
        """Keeps a timing."""
        self.timings[key] = value
        self._cache.put(key, value)

    def evaluate(self, known: Graph) -> Sequence[Any]:
        """Computes folded values."""
        operands = [w.value for w in known.weights]
        compiled = compile_known(known)
        code = _jax.serialize(compiled)
        results = list(compiled(operands))
        self.folds.append(_Fold(operands, code, results))
        return results


@dataclass
class Ready:
    """A program loaded with its weights folded.

    Attributes:
        weights: the arrays that the program takes first, in the order of its graph's weights.
        program: flat weights and operands in, flat results out.
        committed: whether calls bind their results to a device.
        timings: what rewriting looked up when the program was settled.
        folded: of each fold the results that are weights, by place.
    """

    weights: list[Any]
    program: _jax.Loaded
    committed: bool
    timings: dict[str, Any]
    folded: list[dict[int, Any]]

    def replay(self) -> Replay:
        """What makes the graph of this program again."""
        return Replay(self.timings, self.folded)


@dataclass
class Replay:
    """Gives rewriting what it found out before; in the place of :class:`Record`."""

    timings: dict[str, Any]
    folded: list[dict[int, Any]]
    _next: int = field(default=0, init=False)

    def get(self, key: str, default: Any = None) -> Any:
        """A timing as it was looked up then."""
        return self.timings.get(key, default)

    def put(self, key: str, value: Any) -> None:
        """Keeps a timing here."""
        self.timings[key] = value

    def evaluate(self, known: Graph) -> Sequence[Any]:
        """The arrays folded already; other values are computed."""
        have = self.folded[self._next] if self._next < len(self.folded) else {}
        self._next += 1
        if len(have) == len(known.outputs):
            return [have[i] for i in range(len(have))]
        return [have.get(i, x) for i, x in enumerate(evaluate_known(known))]


def save(
    name: str,
    form: Sequence[str],
    original: Graph,
    operands: Sequence[Any],
    weights: Sequence[Any],
    run: _jax.Code | None,
    record: Record,
) -> None:
    """Keeps a settled program for later processes, where it can be kept.

    Args:
        name: the name of its verdict.
        form: name and fingerprint of the form that runs.
        original: the graph of the program as written.
        operands: the arguments of the first call.
        weights: the arrays of the form, in order.
        run: the form compiled, taking the weights first; None if that cannot be kept.
        record: what was looked up and folded on the way to it.
    """
    places = {id(w.value): (_ORIGINAL, i) for i, w in enumerate(original.weights)}
    for number, fold in enumerate(record.folds):
        for i, result in enumerate(fold.results):
            places.setdefault(id(result), (number, i))
    arrays = list(weights)
    needed: list[int] = []
    for number in reversed(range(len(record.folds))):
        if any(places.get(id(x), (None, 0))[0] == number for x in arrays):
            needed.insert(0, number)
            arrays.extend(record.folds[number].operands)
    if any(id(x) not in places for x in arrays) or placement([*arrays, *operands]) is None:
        return
    codes = [*(record.folds[i].code for i in needed), run]
    if None in codes:
        return
    folds = [
        {
            "number": number,
            "operands": [places[id(x)] for x in record.folds[number].operands],
            "results": [_type_text(x) for x in record.folds[number].results],
        }
        for number in needed
    ]
    description = {
        "form": list(form),
        "folds": folds,
        "weights": [places[id(x)] for x in weights],
        "kept": [code[1] for code in codes if code],
        "timings": record.timings,
    }
    program_files.write(_file(name), description, [code[0] for code in codes if code])


def load(name: str, form: Sequence[str], title: str, original: Graph, operands: Sequence[Any]) -> Ready | None:
    """Loads a settled program and folds its weights.

    Args:
        name: the name of its verdict.
        form: name and fingerprint of the form that is to run.
        title: what profiles call the program.
        original: the graph of the program as written, with its weights.
        operands: the arguments of the first call.

    Returns:
        The program; None where none was kept, or it cannot be loaded here.
    """
    place = placement([*(w.value for w in original.weights), *operands])
    found = program_files.read(_file(name)) if place else None
    if place is None or found is None or found[0]["form"] != list(form):
        return None
    try:
        return _loaded(*found, title, original, operands, *place)
    except Exception:
        # Whatever another release of JAX or another driver thinks of that code: it can be compiled again.
        return None


def _loaded(
    description: dict[str, Any],
    codes: Sequence[bytes],
    title: str,
    original: Graph,
    operands: Sequence[Any],
    device: jax.Device,
    committed: bool,
) -> Ready:
    arrays = {(_ORIGINAL, i): w.value for i, w in enumerate(original.weights)}
    sources = [tuple(source) for source in description["weights"]]

    def program(i: int, inputs: Sequence[Any], results: Sequence[Any]) -> _jax.Loaded:
        types = [_jax.abstract(x) for x in inputs]
        return _jax.Loaded(title, codes[i], description["kept"][i], types, results, device, committed)

    folded: list[dict[int, Any]] = []
    for i, fold in enumerate(description["folds"]):
        number, inputs = fold["number"], [arrays[tuple(source)] for source in fold["operands"]]
        results = program(i, inputs, [_type(*text) for text in fold["results"]])(*inputs)
        arrays.update(((number, j), x) for j, x in enumerate(results))
        folded.extend({} for _ in range(len(folded), number + 1))
        folded[number] = {j: x for j, x in enumerate(results) if (number, j) in sources}
    weights = [arrays[source] for source in sources]
    run = program(len(codes) - 1, [*weights, *operands], original.out_avals)
    return Ready(weights, run, committed, description["timings"], folded)


def placement(arrays: Sequence[Any]) -> tuple[jax.Device, bool] | None:
    """The first device, and whether arrays are bound to it; None if one is elsewhere, or of a type that JAX made up."""
    device = jax.devices()[0]
    placed = [x for x in arrays if isinstance(x, jax.Array)]
    if jax.config.jax_default_device is not None:
        return None
    if any(_jax.is_extended(x.dtype) or x.devices() != {device} for x in placed):
        return None
    return device, any(x.committed for x in placed)


def _file(name: str) -> str:
    return key("ready", name, _source_digest())


@functools.cache
def _source_digest() -> str:
    """A digest of the code that makes programs: what another release settled is settled again."""
    digest = hashlib.blake2b(digest_size=16)
    for room in _ROOMS:
        for path in sorted(Path(__file__).parent.joinpath(room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _type_text(array: Any) -> tuple[list[int], str, bool]:
    aval = _jax.aval_of(array)
    return list(aval.shape), str(aval.dtype), aval.weak_type


def _type(shape: Sequence[int], dtype: str, weak: bool) -> Any:
    return jax.core.ShapedArray(tuple(shape), jnp.dtype(dtype), weak_type=weak)
