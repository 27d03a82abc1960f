"""Which form a product is computed in: timed layer by layer, at the shapes of the first batch.

Forms are timed as programs of their own, in which small ones run several times one after the other: starting a program
takes longer than many a product. Where ranges are static, an integer form takes codes and hands codes on, as within a
segment of such layers, and the floating-point forms are timed twice: among their like, and between codes that they have
to read and write. Each is timed as it is, and with the kernels that `optimize` puts in the place of products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.weights import Weights, bound
from jaxinfer.graph import emit, trace, trace_function
from jaxinfer.graph.node import param_key, params_key
from jaxinfer.native import library
from jaxinfer.quantization import integer
from jaxinfer.quantization.activations import Codes, Static
from jaxinfer.quantization.forms import FLOAT, TURNED, Use, apply, forms_of, real
from jaxinfer.quantization.layers import Layer
from jaxinfer.quantization.rows import columns, count, is_rows, result, rows
from jaxinfer.quantization.scheme import Scheme
from jaxinfer.quantization.tensor import Quantized, quantize_array
from jaxinfer.rewriting import Rewriter, fold, load_rules, within
from jaxinfer.search.cache import Store, key
from jaxinfer.search.device import environment_key
from jaxinfer.search.measure import compare, time_candidates

_BUDGET_S = 0.5
# Long enough that threads which fell asleep while a form on one of them was timed do not count.
_SAMPLE_S = 3e-3
_PAIRS_S = 1.0
# Figures taken in another way are no timings to compare with: to be raised when what is timed around a form changes.
_WAY = 3
# Multiply-adds of one call, about a millisecond's.
_WORK = 1 << 27
_MOST_REPEATS = 8
# Products with more entries of activations than this run once in a call.
_MOST_MOVED = 1 << 20
# Forms of several small operations. In a program of one product starting those took 40 µs, which repeats hide.
_SEVERAL = ("digits", "multiply and sum")
_STARTING_S = 5e-5
BETWEEN = "float between codes"
_BY_KERNEL = ", by kernel"
# Weights of more bytes than this do not stay in a processor's caches from one call to the next.
_CACHE_BYTES = 32 << 20
_MOST_COPIES = 32
# Rows up to this many are tried with weights that lie transposed, in floating point too.
_FEW_ROWS = 16


class _Candidate(NamedTuple):
    """A form to be timed, as a function of what the product is fed with and of weights, both made by functions."""

    run: Callable[..., Any]
    x: Callable[[], Any]
    weights: Callable[[], Any]


class Timings:
    """Seconds of the forms of layers; equal layers are timed once, and kept for later processes.

    Args:
        total: bytes of all parameters in floating point. Between two calls of a layer all of them are read, so weights
            come from as far away as that many lie.
        cache: where timings are kept; None to neither read nor write any.
    """

    def __init__(self, total: int, cache: Store | None) -> None:
        self._total, self._cache = total, cache
        self._known: dict[Any, Mapping[str, float]] = {}

    def of(self, layer: Layer, scheme: Scheme) -> Mapping[str, float]:
        """Seconds of each form of a layer; of ``"float"``, of the fastest of the floating-point forms.

        A form of the scheme that looks faster than that is timed in pairs beside it. Where their 95 % bound says that
        it is, its seconds are by their ratio, else by the bound.
        """
        node = layer.reads[0].node
        kind = (
            node.op,
            params_key(node.params),
            tuple((v.shape, str(v.dtype)) for v in node.inputs),
            layer.reads[0].side,
            layer.shape,
            layer.kept,
            param_key((str(scheme.weights), str(scheme.activations), scheme.dynamic)),
        )
        if kind not in self._known:
            self._known[kind] = self._found(layer, _candidates(layer, scheme))
        return self._known[kind]

    def _found(self, layer: Layer, candidates: Mapping[str, _Candidate]) -> Mapping[str, float]:
        """The timings of an earlier process, or new ones."""
        times, repeats = self._times(layer), _repeats(layer)
        name = None if self._cache is None else _name(candidates, times, repeats)
        stored: Any = None if self._cache is None or name is None else self._cache.get(name)
        if not _are_timings(stored, candidates):
            stored = _timed(candidates, times, repeats)
            if self._cache is not None and name is not None:
                self._cache.put(name, stored)
        found: dict[str, float] = {}
        for form, seconds in stored.items():
            kind = next((k for k in (BETWEEN, FLOAT) if form.startswith(f"{k} ")), form.removesuffix(_BY_KERNEL))
            found[kind] = min(seconds, found.get(kind, seconds))
        return found

    def _times(self, layer: Layer) -> int:
        """How many times the layer's bytes the program reads from one call to the next, as a power of two."""
        mine = int(np.prod(layer.shape)) * np.dtype(layer.dtype).itemsize
        return 1 << max(0, (max(1, self._total // mine) - 1).bit_length())


def _candidates(layer: Layer, scheme: Scheme) -> dict[str, _Candidate]:
    """What is timed: the floating-point forms, those between codes, and the scheme's."""
    read = layer.reads[0]
    operand = read.node.inputs[1 - read.side]

    def x() -> Any:
        return jnp.asarray(np.random.default_rng(0).normal(size=operand.shape), operand.dtype)

    def array() -> Any:
        return jnp.asarray(np.random.default_rng(1).normal(size=layer.shape), layer.dtype)

    found: dict[str, _Candidate] = {}
    for name, fun in _float_forms(layer).items():
        weights = (lambda: columns_first(layer, array())) if name == "turned" else array
        found[f"{FLOAT} {name}"] = _Candidate(fun, x, weights)
    static, handed = _static(scheme), x
    if static is not None:
        handed = lambda: static.codes(x()).values  # noqa: E731
        for name, fun in _float_forms(layer).items():
            if name != "turned":
                found[f"{BETWEEN} {name}"] = _Candidate(_on_codes(fun, static, operand.dtype), handed, array)
    for form in forms_of(layer, scheme):
        fun = _quantized(layer, scheme, form, static)
        run = fun if static is None else _on_codes(fun, static, operand.dtype)
        found[form] = _Candidate(run, handed, _lying(layer, scheme, form, array))
    plain = {f"{FLOAT} plain": _Candidate(_plain(layer), x, array)}
    if static is not None:
        # A kernel before it gives real numbers instead of codes in the same time.
        plain[f"{BETWEEN} plain"] = _Candidate(_to_codes(_plain(layer), static), x, array)
    for name, candidate in {**found, **plain}.items():
        by_kernel = _with_kernels(candidate)
        if by_kernel is not None:
            found[name + _BY_KERNEL] = by_kernel
    return found


def _with_kernels(candidate: _Candidate) -> _Candidate | None:
    """The same with kernels in the place of its products, if there are any for them."""
    if library() is None:
        return None
    x, (leaves, tree) = jax.eval_shape(candidate.x), jax.tree.flatten(candidate.weights())
    jaxpr = _jax.make_jaxpr(
        lambda x, *leaves: jax.tree.leaves(candidate.run(x, jax.tree.unflatten(tree, leaves))),
        [*map(_jax.abstract, (x, *leaves))],
    )
    graph = trace(jaxpr, dict(enumerate(leaves, 1)))
    rules = within(load_rules(), "reassociate", jax.default_backend())
    rewriter = Rewriter([r for r in rules if r.native])
    offers = rewriter.offers(graph)
    if not offers:
        return None
    changed = fold(rewriter.apply(graph, {node: forms[-1] for node, forms in offers.items()}))
    shape = jax.tree.structure(jax.eval_shape(candidate.run, x, jax.eval_shape(candidate.weights)))

    def run(x: Any, weights: Any) -> Any:
        return jax.tree.unflatten(shape, emit(changed)(weights, x))

    return _Candidate(run, candidate.x, lambda: [w.value for w in changed.weights])


def _lying(layer: Layer, scheme: Scheme, form: str, array: Callable[[], Any]) -> Callable[[], Quantized]:
    return lambda: laid_out(layer, written(layer, array(), scheme), form)


def _repeats(layer: Layer) -> int:
    """How many times a product runs in one call."""
    read = layer.reads[0]
    inputs, side, out = read.node.inputs, read.side, read.node.aval
    rows = out.size // int(np.prod([inputs[side].shape[a] for a in read.form.kept]))
    moved = int(np.prod(inputs[1 - side].shape)) + out.size
    if moved > _MOST_MOVED or integer.is_depthwise(read.node):
        # What stands between one run and the next would take as long as the product, or be fused into it.
        return 1
    # Of few rows, reading the weights takes longer than multiplying.
    work = max(rows, _FEW_ROWS) * int(np.prod(inputs[side].shape))
    return max(1, min(_MOST_REPEATS, _WORK // work))


def _name(candidates: Mapping[str, _Candidate], times: int, repeats: int) -> str | None:
    """What the timings are kept under; None where a form has no name that is the same in every process."""
    prints = {form: _fingerprint(candidate) for form, candidate in candidates.items()}
    if None in prints.values():
        return None
    kernels = library()
    environment = [environment_key(""), kernels and kernels.digest]
    return key("quantized product", _WAY, environment, times, repeats, sorted(prints.items()))


def _fingerprint(candidate: _Candidate) -> str | None:
    given = jax.eval_shape(lambda: (candidate.x(), candidate.weights()))
    leaves, tree = jax.tree.flatten(given)
    graph = trace_function(lambda *flat: jax.tree.leaves(candidate.run(*jax.tree.unflatten(tree, flat))), *leaves)
    return graph.fingerprint


def _are_timings(stored: Any, candidates: Mapping[str, _Candidate]) -> bool:
    return (
        isinstance(stored, dict)
        and set(stored) == set(candidates)
        and all(isinstance(t, float) and t > 0 for t in stored.values())
    )


def _timed(candidates: Mapping[str, _Candidate], times: int, repeats: int) -> dict[str, float]:
    calls = {name: _call(candidate, times, repeats) for name, candidate in candidates.items()}
    found = time_candidates(list(calls.values()), budget_s=_BUDGET_S, sample_s=_SAMPLE_S)
    seconds = {name: time / repeats for name, time in zip(calls, found)}
    plain = min((n for n in calls if n.startswith(f"{FLOAT} ")), key=seconds.__getitem__)
    # The least of several timings is too good as often as not: only pairs tell whether it is.
    unsure = {n for n in calls if not n.startswith((f"{FLOAT} ", f"{BETWEEN} ")) and seconds[n] < seconds[plain]}
    sure = seconds[plain]
    while unsure and seconds[best := min(unsure, key=seconds.__getitem__)] < sure:
        unsure.remove(best)
        pairs = compare(calls[plain], calls[best], budget_s=_PAIRS_S)
        seconds[best] = seconds[plain] * (pairs.ratio if pairs.is_faster else max(1.0, pairs.high))
        sure = min(sure, seconds[best])
    for form in seconds:
        # Forms of several small operations must gain what starting those takes in a program of few others.
        if form.startswith(_SEVERAL) and seconds[plain] - seconds[form] < _STARTING_S:
            seconds[form] = max(seconds[form], seconds[plain])
    return seconds


def _call(candidate: _Candidate, times: int, repeats: int) -> Callable[[], Any]:
    """A form as a compiled call, with weights in turn from as many copies as it takes to lie as far away as in use."""
    x, weights = candidate.x(), candidate.weights()
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weights))
    copies = min(_MOST_COPIES, times, -(-2 * _CACHE_BYTES // size))
    # Copies are made while others are timed, if they are not waited for.
    made = jax.block_until_ready([jax.tree.map(lambda a: jnp.array(a, copy=True), weights) for _ in range(copies)])
    turns = itertools.cycle(made)
    program = jax.jit(_in_turn(candidate.run)).lower(x, [weights] * repeats).compile()
    return lambda: program(x, [next(turns) for _ in range(repeats)])


def _in_turn(run: Callable[..., Any]) -> Callable[..., Any]:
    """Products with one weight after the other, each of which waits for the one before; the largest of all results."""

    def several(x: Any, weights: Sequence[Any]) -> Any:
        found = run(x, weights[0])
        for w in weights[1:]:
            # It is never replaced, but nobody knows before the last result is there.
            given = jnp.where(jnp.ravel(found)[0] == 77, jnp.ones_like(x), x)
            found = jnp.maximum(found, run(given, w))
        return found

    return several


def written(layer: Layer, array: Any, scheme: Scheme) -> Quantized:
    """A parameter at the nearest values."""
    assert scheme.weights is not None
    return quantize_array(array, scheme.weights, *layer.axes(scheme.weights))


def laid_out(layer: Layer, quantized: Quantized, form: str) -> Quantized:
    """A parameter lying as a form reads it."""
    if not is_rows(layer.reads[0].node):
        return quantized
    order = (*layer.kept, *layer.summed) if form in TURNED else (*layer.summed, *layer.kept)
    return quantized.reordered(order)


def columns_first(layer: Layer, array: Any) -> Any:
    """The weights of a product of rows and columns: [n, k]."""
    read = layer.reads[0]
    return jnp.array(lax.transpose(columns(read.node, read.side, read.move(array)), (1, 0)))


def _plain(layer: Layer) -> Callable[..., Any]:
    """The product as it is written."""
    read = layer.reads[0]

    def plain(x: Any, w: Any) -> Any:
        w = read.move(w)
        x = real(x)
        return bound(read.node, [x, w] if read.side else [w, x])

    return plain


def _float_forms(layer: Layer) -> dict[str, Callable[..., Any]]:
    """Ways to compute the product in floating point, those that an optimizer would try."""
    read = layer.reads[0]
    node, side = read.node, read.side

    def product(x: Any, w: Any) -> Any:
        return result(node, side, jnp.matmul(rows(node, side, real(x)), columns(node, side, read.move(w))))

    def turned(x: Any, w: Any) -> Any:
        return result(node, side, lax.dot_general(rows(node, side, x), w, (((1,), (1,)), ((), ()))))

    def shifts(x: Any, w: Any) -> Any:
        return integer.depthwise(real(x), read.move(w), node.params)

    found = {"plain": _plain(layer)}
    if integer.is_pointwise(node):
        found["product"] = product
    if is_rows(node) and count(node, side) <= _FEW_ROWS:
        found["turned"] = turned
    return {"shifts": shifts} if integer.is_depthwise(node) else found


def _quantized(layer: Layer, scheme: Scheme, form: str, static: Static | None) -> Callable[..., Any]:
    read = layer.reads[0]

    def run(x: Any, w: Quantized) -> Any:
        return apply(form, Use(read.node, read.side, Weights(layer.leaf, w, read.move, read.place), scheme, static), x)

    return run


def _static(scheme: Scheme) -> Static | None:
    """For integers with static ranges, a range like any other: from −3 to 5."""
    form = scheme.activations
    return Static.of(form, -3.0, 5.0) if form is not None and form.is_integer and not scheme.dynamic else None


def _to_codes(fun: Callable[..., Any], static: Static) -> Callable[..., Any]:
    """A product from real numbers to codes."""
    return lambda x, weights: static.codes(jnp.maximum(fun(x, weights), 0)).values


def _on_codes(fun: Callable[..., Any], static: Static, dtype: Any) -> Callable[..., Any]:
    """A product from codes to codes."""

    def run(values: Any, weights: Any) -> Any:
        x = Codes(values, static.scale, static.zero_point, dtype)
        return static.codes(jnp.maximum(fun(x, weights), 0)).values

    return run
