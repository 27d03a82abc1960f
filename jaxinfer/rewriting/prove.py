"""The prover: what a rule promises, tried before anybody relies on it.

Each program that ``rule.cases(sampler)`` yields is traced, rewritten by that rule alone, checked, and compared with what
it was:

* **exactly**, where both sides are polynomials: over whole numbers modulo 2**64, at random points;
* **over the reals**: both sides evaluated with float64 in place of every float agree to rounding;
* **in float64, float32, bfloat16 and float16**: a ``bitwise`` rule gives the same bits operation by operation; the error of
  a ``reassociate`` rule against the reals is at most :data:`ERROR_RATIO` times the original's (or :data:`FLOOR_ULPS` ulps of
  the largest result); that of a ``lossy`` one at most :data:`LOSSY_BOUND` of the largest result;
* **on zeros of both signs and denormals** as above; **on NaN and ±Inf** results are NaN, Inf and -Inf in the same places,
  unless the rule is declared ``finite``;
* **in int32**, where the rule fires at all: exactly;
* **gradients** (float64, a random projection; forward mode where reverse mode does not exist) agree, unless the tier is
  ``lossy``;
* **edge trials**: sizes 0 and 1, zeros among known values; here a rule may decline and a program may be invalid.

See :mod:`jaxinfer.rewriting.sampler` for how a case leaves out a dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, check, interpret, run, trace
from jaxinfer.rewriting.engine import Rewriter
from jaxinfer.rewriting.evaluate import Integers, NotExact, OpByOp, Reals
from jaxinfer.rewriting.rule import Rule, RuleError
from jaxinfer.rewriting.sampler import Frozen, Sampler, UnsupportedDtype

DTYPES = ("float64", "float32", "bfloat16", "float16", "int32")
ERROR_RATIO = 8.0
FLOOR_ULPS = 4.0
LOSSY_BOUND = 0.05

# Two float64 evaluations of equal real functions of a few small operands differ by rounding alone.
_SAME_REALS = 1e-11
_SAME_GRADIENTS = 1e-9
_SAMPLES = 8
_EDGE_TRIALS = 4
_LONG = 4000


class ProofError(RuleError):
    """A rule does not keep what it promises; the message holds the program, the inputs and how to repeat the trial."""


@dataclass(frozen=True)
class Proof:
    """What was tried of one rule, and how close it came.

    Attributes:
        rule: its name.
        runs: programs on which it fired, by dtype.
        exact: programs proved over the integers.
        gradients: programs whose derivatives were compared.
        special: evaluations on zeros, denormals, NaN and ±Inf.
        edges: edge trials in which it fired.
        error_ratio: by dtype, the largest error against the reals, in units of the original's (at least one ulp of the
            largest result).
    """

    rule: str
    runs: dict[str, int]
    exact: int
    gradients: int
    special: int
    edges: int
    error_ratio: dict[str, float]


def prove(rule: Rule, *, seed: int = 0, trials: int = 1) -> Proof:
    """Tries a rule on its cases, as the module describes.

    Args:
        rule: the rule.
        seed: seed of every random choice.
        trials: how often each case is drawn in each dtype.

    Returns:
        What was tried.

    Raises:
        ProofError: at the first promise the rule breaks, or if it has no case that fires.
    """
    if rule.cases is None:
        raise ProofError(f"rule {rule.name!r} has no cases: a rule must bring programs to prove it on")
    tally = _Tally()
    for trial in range(trials):
        for dtype in DTYPES:
            for case in _draw(rule, Sampler([seed, trial], dtype), f"seed {seed}, trial {trial}"):
                _prove_case(case, tally)
        for case in _draw(rule, Sampler([seed, trial], "float64", whole=True), f"seed {seed}, trial {trial}, integers"):
            _prove_exactly(case, tally)
        for edge in range(_EDGE_TRIALS):
            where = f"seed {seed}, trial {trial}, edge {edge}"
            for case in _draw(rule, Sampler([seed, trial, edge], "float64", edge=True), where):
                _prove_edge(case, tally)
    if not any(tally.runs.values()):
        raise ProofError(f"rule {rule.name!r}: none of its cases supports any of {', '.join(DTYPES)}")
    return Proof(
        rule.name, dict(tally.runs), tally.exact, tally.gradients, tally.special, tally.edges, dict(tally.ratio)
    )


def prove_all(rules: Iterable[Rule], *, seed: int = 0, trials: int = 1) -> list[Proof]:
    """:func:`prove` for each rule.

    Raises:
        ProofError: after all were tried, with the messages of all that failed.
    """
    proofs, failures = [], []
    for rule in rules:
        try:
            proofs.append(prove(rule, seed=seed, trials=trials))
        except ProofError as error:
            failures.append(str(error))
    if failures:
        raise ProofError("\n\n".join(failures))
    return proofs


class _Tally:
    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()
        self.exact = self.gradients = self.special = self.edges = 0
        self.ratio: dict[str, float] = {}


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """A program before and after the rule, and the arguments it was drawn with."""

    rule: Rule
    sampler: Sampler
    where: str
    before: Graph
    after: Graph
    fired: int
    inputs: tuple[Any, ...]

    def fail(self, what: str, inputs: Sequence[Any] | None = None) -> ProofError:
        """The error that says what went wrong where, with everything needed to see it again."""
        shown = self.inputs if inputs is None else inputs
        values = "\n".join(f"  {i}: {np.asarray(x).dtype}{np.shape(x)} {np.asarray(x)}" for i, x in enumerate(shown))
        return ProofError(
            f"{_title(self.rule, self.where)}: {what}\n"
            f"before:\n{str(self.before)[:_LONG]}\nafter:\n{str(self.after)[:_LONG]}\ninputs:\n{values[:_LONG]}"
        )


def _title(rule: Rule, where: str) -> str:
    return f"rule {rule.name!r} ({rule.note}; {rule.tier}), {where}"


def _draw(rule: Rule, sampler: Sampler, seeds: str) -> Iterator[_Case]:
    """The rule's cases in the sampler's dtype, traced and rewritten."""
    assert rule.cases is not None
    with jax.enable_x64(sampler.dtype.itemsize == 8):
        drawn = iter(rule.cases(sampler))
        for number in range(1_000_000):
            where = f"case {number}, {sampler.dtype}, {seeds}"
            try:
                function, arguments = next(drawn)
                before, inputs = _trace(function, arguments)
            except StopIteration:
                return
            except UnsupportedDtype:
                return
            except Exception as error:
                if sampler.edge:  # Not every program makes sense at every size.
                    return
                hint = "" if _jax.is_inexact(sampler.dtype) else " (a case that needs floats calls s.floating_only())"
                message = f"{_title(rule, where)}: the case itself fails{hint}: {type(error).__name__}: {error}"
                raise ProofError(message) from error
            yield _rewritten(rule, sampler, where, before, inputs)


def _trace(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Graph, tuple[Any, ...]]:
    leaves, tree = jax.tree.flatten(tuple(arguments))
    known = {i: jnp.asarray(x.array) for i, x in enumerate(leaves) if isinstance(x, Frozen)}
    arrays = [known[i] if i in known else jnp.asarray(x) for i, x in enumerate(leaves)]
    jaxpr = _jax.make_jaxpr(
        lambda *xs: jax.tree.leaves(function(*jax.tree.unflatten(tree, xs))), [_jax.aval_of(x) for x in arrays]
    )
    return trace(jaxpr, known), tuple(x for i, x in enumerate(arrays) if i not in known)


def _rewritten(rule: Rule, sampler: Sampler, where: str, before: Graph, inputs: tuple[Any, ...]) -> _Case:
    rewriter = Rewriter([rule])
    try:
        if rule.kind == "replace":
            after = rewriter.fixpoint(before)
        else:
            after = rewriter.apply(before, {node: forms[0] for node, forms in rewriter.offers(before).items()})
        check(after)
        jax.eval_shape(lambda *xs: run(after, {}, *xs), *inputs)
    except Exception as error:
        message = f"{_title(rule, where)}: applying the rule fails: {type(error).__name__}: {error}"
        raise ProofError(f"{message}\nbefore:\n{str(before)[:_LONG]}") from error
    return _Case(rule, sampler, where, before, after, rewriter.log.fired[rule.name], inputs)


def _prove_case(case: _Case, tally: _Tally) -> None:
    dtype = case.sampler.dtype
    floating = _jax.is_inexact(dtype)
    if not case.fired:
        if not floating:
            return
        raise case.fail("the rule does not fire (a case for some dtypes only says s.only(...))")
    tally.runs[dtype.name] += 1
    if not floating or dtype == np.float64:
        _same_over_reals(case)
    if not floating:
        return
    derivative = _Derivative.find(case) if dtype == np.float64 and case.rule.tier != "lossy" else None
    if derivative is not None:
        derivative.compare()
        tally.gradients += 1
    _prove_dtype(case, tally)


# -- exactly, and over the reals --------------------------------------------------------------------------------------


def _prove_exactly(case: _Case, tally: _Tally) -> None:
    if not case.fired or case.rule.tier == "lossy":
        return
    rng = case.sampler.rng
    whole = [rng.integers(-(2**31), 2**31, np.shape(x)) if _is_real(x) else np.asarray(x) for x in case.inputs]
    try:
        before, after = (interpret(g, Integers(), *whole) for g in (case.before, case.after))
    except NotExact:
        return
    tally.exact += 1
    for i, (a, b) in enumerate(zip(before, after)):
        if not np.array_equal(a, b):
            raise case.fail(f"result {i} differs over the integers: {a} became {b}", whole)


def _prove_edge(case: _Case, tally: _Tally) -> None:
    if not case.fired:
        return
    tally.edges += 1
    if case.rule.tier == "bitwise":
        old, new = _op_by_op(case)(case.inputs)
        _same_bits(case, old, new, case.inputs)
    _same_over_reals(case)


def _same_over_reals(case: _Case) -> None:
    old, new = (_reals(graph, case.inputs) for graph in (case.before, case.after))
    bound = LOSSY_BOUND if case.rule.tier == "lossy" else _SAME_REALS
    for i, (a, b) in enumerate(zip(old, new)):
        if not _close(a, b, bound):
            raise case.fail(f"result {i} differs over the reals: {a} became {b}")


def _reals(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    domain = Reals()
    return [_numbers(y) for y in interpret(graph, domain, *map(domain.lift, inputs))]


def _close(a: np.ndarray, b: np.ndarray, bound: float) -> bool:
    if not _is_real_or_complex(a):
        return np.array_equal(a, b)
    finite = np.isfinite(a)
    if not np.array_equal(np.where(finite, 0, a), np.where(np.isfinite(b), 0, b), equal_nan=True):
        return False
    scale = max(1.0, float(np.max(np.abs(a), initial=0, where=finite)))
    return bool(np.all(np.abs(np.where(finite, a - b, 0)) <= bound * scale)) if a.size else True


# -- dtype by dtype ---------------------------------------------------------------------------------------------------

Pair = Callable[[Sequence[Any]], tuple[list[Any], list[Any]]]


def _prove_dtype(case: _Case, tally: _Tally) -> None:
    rng = case.sampler.rng
    bitwise = case.rule.tier == "bitwise"
    evaluate = _op_by_op(case) if bitwise else _compiled(case)
    ordinary = [case.inputs, *(_varied(rng, case.inputs) for _ in range(_SAMPLES - 1))]
    small = [_sprinkled(rng, case.inputs, kind) for kind in ("zero", "denormal") for _ in range(2)]
    broken = [] if case.rule.finite else list(_broken(rng, case.inputs))
    tally.special += len(small) + len(broken)
    if bitwise:
        for inputs in [*ordinary, *small, *broken]:
            _same_bits(case, *evaluate(inputs), inputs)
        return
    try:
        ratio = max(_error_ratio(case, evaluate, ordinary), _error_ratio(case, evaluate, small))
    except _TooWrong:
        # An original that was right by luck is no measure: judge on many more points.
        more = [_varied(rng, case.inputs) for _ in range(16 * _SAMPLES)]
        try:
            ratio = max(_error_ratio(case, evaluate, more), _error_ratio(case, evaluate, small))
        except _TooWrong as error:
            raise case.fail(str(error)) from None
    name = case.sampler.dtype.name
    tally.ratio[name] = max(tally.ratio.get(name, 0.0), ratio)
    for inputs in broken:
        _same_broken(case, *evaluate(inputs), inputs)


def _op_by_op(case: _Case) -> Pair:
    def evaluate(inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        old, new = (interpret(g, OpByOp(), *map(jnp.asarray, inputs)) for g in (case.before, case.after))
        return [_numbers(x) for x in old], [_numbers(x) for x in new]

    return evaluate


def _compiled(case: _Case) -> Pair:
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


def _same_bits(case: _Case, old: Sequence[Any], new: Sequence[Any], inputs: Sequence[Any]) -> None:
    for i, (a, b) in enumerate(zip(old, new)):
        same = np.array_equal(a, b, equal_nan=_is_real_or_complex(a))
        if same and _is_real_or_complex(a):
            same = all(
                np.array_equal(np.signbit(x) & ~np.isnan(x), np.signbit(y) & ~np.isnan(y))
                for x, y in ((a.real, b.real), (a.imag, b.imag))
            )
        if not same:
            raise case.fail(f"result {i} is not the same bit for bit: {a} became {b}", inputs)


def _same_broken(case: _Case, old: Sequence[Any], new: Sequence[Any], inputs: Sequence[Any]) -> None:
    for i, (a, b) in enumerate(zip(old, new)):
        if _is_real_or_complex(a):
            kept = (np.where(np.isfinite(x), 0, x) for x in (a, b))
            if not np.array_equal(*kept, equal_nan=True):
                hint = "a rule that holds for finite values only says finite=True and why"
                raise case.fail(f"result {i} is NaN or infinite elsewhere: {a} became {b} ({hint})", inputs)


class _TooWrong(Exception):
    """The new form is further from the reals than the tier allows."""


def _error_ratio(case: _Case, evaluate: Pair, samples: Sequence[Sequence[Any]]) -> float:
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
                scale, was, now = (
                    float(np.max(np.abs(x), initial=0, where=finite)) for x in (exact, a - exact, b - exact)
                )
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


class _Derivative:
    """The derivative of both sides along random directions, in reverse or forward mode."""

    def __init__(self, case: _Case, mode: Callable[..., Any]):
        self.case = case
        self.mode = mode
        self.moving = [i for i, x in enumerate(case.inputs) if _is_real(x)]

    @staticmethod
    def find(case: _Case) -> _Derivative | None:
        """The mode in which the original can be differentiated, if any."""
        floats = any(_is_real(x) for x in case.inputs) and any(_is_float(v.aval) for v in case.before.outputs)
        for mode in (_reverse, _forward) if floats else ():
            found = _Derivative(case, mode)
            try:
                jax.eval_shape(found.of(case.before), case.inputs)
            except Exception:
                continue  # A loop without a known length has no reverse mode, an opaque call has none at all.
            return found
        return None

    def of(self, graph: Graph) -> Callable[..., Any]:
        def derivative(inputs: Sequence[Any]) -> Any:
            def moved(*values: Any) -> list[Any]:
                all_inputs = list(inputs)
                for i, x in zip(self.moving, values):
                    all_inputs[i] = x
                return [y for y in run(graph, {}, *all_inputs) if _is_float(_jax.aval_of(y))]

            return self.mode(moved, *(inputs[i] for i in self.moving))

        return derivative

    def compare(self) -> None:
        case = self.case
        try:
            both = _jit(lambda inputs: (self.of(case.before)(inputs), self.of(case.after)(inputs)))
            old, new = both(list(case.inputs))
        except Exception as error:
            raise case.fail(f"the new form cannot be differentiated: {type(error).__name__}: {error}") from error
        for i, (a, b) in enumerate(zip(old, new)):
            if not _close(np.asarray(a), np.asarray(b), _SAME_GRADIENTS):
                raise case.fail(f"derivative {i} differs: {a} became {b}")


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
