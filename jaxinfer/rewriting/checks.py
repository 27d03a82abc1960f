"""What the prover checks of one case, one function for each promise.

The bounds are stated in :mod:`jaxinfer.rewriting.prove`, which says what is tried when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, interpret, run
from jaxinfer.rewriting.case import Case
from jaxinfer.rewriting.evaluate import Integers, NotExact, OpByOp, Reals

ERROR_RATIO = 8.0
FLOOR_ULPS = 4.0
LOSSY_BOUND = 0.05

# Two float64 evaluations of equal real functions of a few small operands differ by rounding alone.
_SAME_REALS = 1e-11
_SAME_GRADIENTS = 1e-9
_SAMPLES = 8


def same_over_integers(case: Case) -> bool:
    """Whether both sides are polynomials with whole coefficients, equal at a random point modulo 2**64.

    Raises:
        ProofError: if they are polynomials and differ.
    """
    rng = case.sampler.rng
    whole = [rng.integers(-(2**31), 2**31, np.shape(x)) if _is_real(x) else np.asarray(x) for x in case.inputs]
    try:
        before, after = (interpret(g, Integers(), *whole) for g in (case.before, case.after))
    except NotExact:
        return False
    for i, (a, b) in enumerate(zip(before, after)):
        if not np.array_equal(a, b):
            raise case.fail(f"result {i} differs over the integers: {_change(a, b)}", whole)
    return True


def same_over_reals(case: Case) -> None:
    """Whether both sides agree with float64 in place of every float (to the stated bound for ``lossy`` rules).

    Raises:
        ProofError: if they do not.
    """
    old, new = (_reals(graph, case.inputs) for graph in (case.before, case.after))
    bound = LOSSY_BOUND if case.rule.tier == "lossy" else _SAME_REALS
    for i, (a, b) in enumerate(zip(old, new)):
        if not _close(a, b, bound):
            raise case.fail(f"result {i} differs over the reals: {_change(a, b)}")


def _reals(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    domain = Reals()
    return [_numbers(y) for y in interpret(graph, domain, *map(domain.lift, inputs))]


def _close(a: np.ndarray, b: np.ndarray, bound: float) -> bool:
    if not _is_real_or_complex(a):
        return np.array_equal(a, b)
    finite = np.isfinite(a)
    if not _same_broken_places(a, b):
        return False
    scale = max(1.0, float(np.max(np.abs(a), initial=0, where=finite)))
    return bool(np.all(np.abs(np.where(finite, a - b, 0)) <= bound * scale)) if a.size else True


# -- dtype by dtype ---------------------------------------------------------------------------------------------------

Pair = Callable[[Sequence[Any]], tuple[list[Any], list[Any]]]


def keeps_its_tier(case: Case) -> tuple[int, float | None]:
    """Evaluates both sides in the case's own dtype, on ordinary values, zeros, denormals, NaN and ±Inf.

    Returns:
        How many evaluations were on special values, and the largest error in units of the original's (None for the
        bitwise tier).

    Raises:
        ProofError: if the new form does not keep the rule's tier.
    """
    rng = case.sampler.rng
    bitwise = case.rule.tier == "bitwise"
    evaluate = _op_by_op(case) if bitwise else _compiled(case)
    ordinary = [case.inputs, *(_varied(rng, case.inputs) for _ in range(_SAMPLES - 1))]
    # Some processors' own conversion to bfloat16 takes denormals for zeros; whether XLA uses it depends on the program.
    kinds = ("zero",) if case.sampler.dtype.name == "bfloat16" else ("zero", "denormal")
    small = [_sprinkled(rng, case.inputs, kind) for kind in kinds for _ in range(2)]
    broken = [] if case.rule.finite else list(_broken(rng, case.inputs))
    special = len(small) + len(broken)
    if bitwise:
        for inputs in [*ordinary, *small, *broken]:
            _same_bits(case, *evaluate(inputs), inputs)
        return special, None
    try:
        ratio = max(_error_ratio(case, evaluate, ordinary), _error_ratio(case, evaluate, small))
    except _TooWrong:
        # An original that was right by luck is no measure: judge on many more points.
        more = [
            (_sprinkled(rng, x, "zero") if i % 4 == 0 else x)
            for i, x in enumerate(_varied(rng, case.inputs) for _ in range(16 * _SAMPLES))
        ]
        try:
            ratio = _error_ratio(case, evaluate, [*ordinary, *small, *more])
        except _TooWrong as error:
            raise case.fail(str(error)) from None
    for inputs in broken:
        _same_broken(case, *evaluate(inputs), inputs)
    return special, ratio


def same_bits(case: Case) -> None:
    """Whether both sides give the same bits on the case's own inputs, operation by operation.

    Raises:
        ProofError: if they do not.
    """
    _same_bits(case, *_op_by_op(case)(case.inputs), case.inputs)


def _op_by_op(case: Case) -> Pair:
    def evaluate(inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        old, new = (interpret(g, OpByOp(), *map(jnp.asarray, inputs)) for g in (case.before, case.after))
        return [_numbers(x) for x in old], [_numbers(x) for x in new]

    return evaluate


def _compiled(case: Case) -> Pair:
    weights = list(dict.fromkeys((*case.before.weights, *case.after.weights)))

    def both(values: Sequence[Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        held = dict(zip(weights, values))
        return run(case.before, held, *inputs), run(case.after, held, *inputs)

    compiled = _jit(both)

    def evaluate(inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        old, new = compiled([w.value for w in weights], list(inputs))
        return [_numbers(x) for x in old], [_numbers(x) for x in new]

    return evaluate


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    # Each program runs on a handful of small arrays: what costs is compiling it.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def _same_bits(case: Case, old: Sequence[Any], new: Sequence[Any], inputs: Sequence[Any]) -> None:
    for i, (a, b) in enumerate(zip(old, new)):
        same = np.array_equal(a, b, equal_nan=_is_real_or_complex(a))
        if same and _is_real_or_complex(a):
            same = all(
                np.array_equal(np.signbit(x) & ~np.isnan(x), np.signbit(y) & ~np.isnan(y))
                for x, y in ((a.real, b.real), (a.imag, b.imag))
            )
        if not same:
            raise case.fail(f"result {i} is not the same bit for bit: {_change(a, b)}", inputs)


def _same_broken(case: Case, old: Sequence[Any], new: Sequence[Any], inputs: Sequence[Any]) -> None:
    for i, (a, b) in enumerate(zip(old, new)):
        if _is_real_or_complex(a) and not _same_broken_places(a, b):
            hint = "a rule that holds for finite values only says finite=True and why"
            raise case.fail(f"result {i} is NaN or infinite elsewhere: {_change(a, b)} ({hint})", inputs)


class _TooWrong(Exception):
    """The new form is further from the reals than the tier allows."""


def _error_ratio(case: Case, evaluate: Pair, samples: Sequence[Sequence[Any]]) -> float:
    """The largest error of the new form against the reals, in units of the original's, over all results.

    Raises:
        _TooWrong: if it is more than the tier allows.
    """
    errors: dict[int, list[tuple[float, float, float]]] = {}
    ulp = float(jnp.finfo(case.sampler.dtype).eps)
    for inputs in samples:
        old, new = evaluate(inputs)
        for i, (a, b, exact) in enumerate(zip(old, new, _reals(case.before, inputs))):
            if _is_real_or_complex(a) and a.size:
                finite = np.isfinite(exact) & np.isfinite(a)
                with np.errstate(invalid="ignore"):  # where both are infinite nothing is compared
                    differences = (exact, a - exact, b - exact)
                scale, was, now = (float(np.max(np.abs(x), initial=0, where=finite)) for x in differences)
                errors.setdefault(i, []).append((scale, was, now if np.isfinite(now) else np.inf))
                ulp = max(ulp, float(jnp.finfo(case.before.outputs[i].dtype).eps))
    worst = 0.0
    for i, found in errors.items():
        scale, was, now = map(max, zip(*found))
        least = ulp * scale + float(jnp.finfo(case.sampler.dtype).smallest_normal)
        allowed = max(ERROR_RATIO * was, FLOOR_ULPS * least)
        if case.rule.tier == "lossy":
            allowed = max(allowed, LOSSY_BOUND * scale)
        if now > allowed:
            raise _TooWrong(f"result {i} has the error {now:.3g}, {allowed:.3g} is allowed (the original's: {was:.3g})")
        worst = max(worst, now / max(was, least))
    return worst


# -- derivatives ------------------------------------------------------------------------------------------------------


def same_derivative(case: Case) -> bool:
    """Whether the case has a derivative that says anything, the same on both sides along random directions.

    Reverse mode is tried first, forward mode where the original has no other. A derivative that vanishes everywhere is
    compared but proves nothing, so it does not count.

    Raises:
        ProofError: if the derivatives differ, or the new form has none.
    """
    if not (any(map(_is_real, case.inputs)) and any(_is_float(v.aval) for v in case.before.outputs)):
        return False
    for mode in (_reverse, _forward):
        try:
            jax.eval_shape(lambda *xs, mode=mode: _derivative(mode, case.before, xs), *case.inputs)
            break
        except Exception:  # A loop of unknown length has no reverse mode, an opaque call has none at all
            continue
    else:
        return False
    try:
        both = _jit(lambda *xs: [_derivative(mode, graph, xs) for graph in (case.before, case.after)])
        old, new = both(*case.inputs)
    except Exception as error:
        raise case.fail(f"the new form cannot be differentiated: {type(error).__name__}: {error}") from error
    for i, (a, b) in enumerate(zip(old, new)):
        if not _close(np.asarray(a), np.asarray(b), _SAME_GRADIENTS):
            raise case.fail(f"derivative {i} differs: {_change(a, b)}")
    return any(np.any(np.asarray(a) != 0) for a in old)


def _derivative(mode: Callable[..., Any], graph: Graph, inputs: Sequence[Any]) -> Any:
    moving = [i for i, x in enumerate(inputs) if _is_real(x)]

    def moved(*values: Any) -> list[Any]:
        given = list(inputs)
        for i, x in zip(moving, values):
            given[i] = x
        return [y for y in run(graph, {}, *given) if _is_float(_jax.aval_of(y))]

    return mode(moved, *(inputs[i] for i in moving))


def _reverse(function: Callable[..., Any], *values: Any) -> Any:
    outputs, pull = jax.vjp(function, *values)
    return pull([_direction(i, y) for i, y in enumerate(outputs)])


def _forward(function: Callable[..., Any], *values: Any) -> Any:
    return jax.jvp(function, values, tuple(_direction(i, x) for i, x in enumerate(values)))[1]


def _direction(index: int, like: Any) -> Any:
    return jnp.asarray(np.random.default_rng(index).standard_normal(like.shape), like.dtype)


# -- values -----------------------------------------------------------------------------------------------------------


def _is_float(aval: Any) -> bool:
    return not _jax.is_extended(aval.dtype) and bool(_jax.is_inexact(aval.dtype))


def _is_real_or_complex(x: np.ndarray) -> bool:
    return bool(_jax.is_inexact(x.dtype))


def _is_real(x: Any) -> bool:
    return not _jax.is_extended(x.dtype) and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _numbers(x: Any) -> np.ndarray:
    """An array for comparison: floats of every width as float64, typed keys as their bits."""
    if _jax.is_extended(x.dtype):
        return np.asarray(jax.random.key_data(x))
    x = np.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return x.astype(np.complex128)
    return x.astype(np.float64) if _is_real(x) else x


def _same_broken_places(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are NaN, Inf and -Inf in the same places."""
    return np.array_equal(np.where(np.isfinite(a), 0, a), np.where(np.isfinite(b), 0, b), equal_nan=True)


def _change(a: np.ndarray, b: np.ndarray) -> str:
    """The element that differs most, before and after; the sign of zero counts."""
    if a.shape != b.shape:
        return f"shape {a.shape} became {b.shape}"
    with np.errstate(invalid="ignore"):
        apart = np.abs(a.astype(np.complex128) - b.astype(np.complex128))
    apart = np.where(np.isnan(apart), np.inf, apart)
    if _is_real_or_complex(a):
        apart = np.where(a == b, np.signbit(a.real) != np.signbit(b.real), apart)
        apart = np.where(np.isnan(a) & np.isnan(b), 0, apart)
    place = np.unravel_index(int(np.argmax(apart)), a.shape) if a.ndim else ()
    at = f" at {tuple(map(int, place))}" if a.ndim else ""
    return f"{a[place]} became {b[place]}{at}"


def _varied(rng: np.random.Generator, inputs: Sequence[Any]) -> list[Any]:
    """Other values of the same signs and magnitudes."""
    return [
        (np.asarray(x) * (1 + rng.uniform(0, 0.5, np.shape(x)))).astype(x.dtype) if _is_real(x) else x for x in inputs
    ]


def _sprinkled(rng: np.random.Generator, inputs: Sequence[Any], kind: str) -> list[Any]:
    """The inputs with many elements replaced by zeros or denormals of both signs."""

    def sprinkle(x: Any) -> Any:
        if not _is_real(x):
            return x
        small = 0.0 if kind == "zero" else float(jnp.finfo(x.dtype).smallest_normal) / 4
        signed = np.where(rng.random(np.shape(x)) < 0.5, -small, small)
        return np.where(rng.random(np.shape(x)) < 0.4, signed, np.asarray(x).astype(np.float64)).astype(x.dtype)

    return [sprinkle(x) for x in inputs]


def _broken(rng: np.random.Generator, inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """The inputs with one element of one of them replaced by NaN, Inf or -Inf."""
    for i, x in enumerate(inputs):
        if _is_real(x) and np.size(x):
            for value in (np.nan, np.inf, -np.inf):
                changed = np.array(x)
                changed.flat[rng.integers(changed.size)] = value
                yield [*inputs[:i], changed, *inputs[i + 1 :]]
