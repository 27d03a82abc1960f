"""One training step under masks, compiled once; and what a run carries from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxinfer.sparsity.learning.distillation import Distillation
from jaxinfer.sparsity.learning.leaves import Leaves, collection, is_variables
from jaxinfer.sparsity.learning.method import Method, Plan

Carry = dict[str, Any]
"""``trained`` (tree), ``rest`` (the arrays that are not trained), ``optimizer``, ``method`` (the method's state while
masks are searched for, then ``keep``), ``key`` (key data), ``step``, ``failed`` (the step whose loss or gradient was
not finite, else −1)."""


@dataclass(frozen=True, eq=False)
class Trainer:
    """The programs of a run.

    Attributes:
        plan: units, target and number of steps.
        method: how masks are found.
        loss: ``loss(params, batch)``.
        optimizer: of the weights.
        has_aux: whether the loss returns ``(loss, aux)``.
        distillation: what else is learned from.
        key_impl: the kind of random keys.
    """

    plan: Plan
    method: Method
    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation
    has_aux: bool
    distillation: Distillation | None
    key_impl: Any

    @property
    def _leaves(self) -> Leaves:
        return self.plan.units.leaves

    def start(self, params: Any, key: jax.Array) -> Carry:
        """The carry before the first step; the arrays of ``params`` are copied."""
        trained, rest = self._leaves.split(params)
        carry, first = jax.jit(self._start)(trained, rest, key)
        return {**carry, "method": self.method.start(self.plan, carry["trained"], first)}

    def _start(self, trained: Any, rest: list[Any], key: jax.Array) -> tuple[Carry, jax.Array]:
        first, running = jax.random.split(key)
        trained, rest = jax.tree.map(jnp.copy, (trained, rest))
        carry = {
            "trained": trained,
            "rest": rest,
            "optimizer": self.optimizer.init(trained),
            "key": jax.random.key_data(running),
            "step": jnp.zeros((), jnp.int32),
            "failed": jnp.full((), -1, jnp.int32),
        }
        return carry, first

    def taught(self, teacher: Any) -> list[Any]:
        """The arrays of a teacher's parameters, as the steps take them.

        Raises:
            ValueError: they do not have the structure of the parameters.
        """
        if jax.tree.structure(teacher) != self._leaves.treedef:
            raise ValueError("the teacher's parameters do not have the structure of the student's")
        leaves = jax.tree.leaves(teacher)
        return [jnp.asarray(x) for i, x in enumerate(leaves) if i not in self._leaves.static]

    def check(self, carry: Carry, batch: Any) -> None:
        """Looks at the type of the loss.

        Raises:
            TypeError: it is no floating-point scalar, or has a second result where none was announced, or none where
                one was.
        """
        params = self._leaves.merge(carry["trained"], carry["rest"])
        result = jax.eval_shape(lambda batch: self.loss(params, batch), batch)
        is_pair = isinstance(result, tuple) and len(result) == 2
        if is_pair != self.has_aux:
            said = "a pair: say has_aux=True" if is_pair else "no pair: has_aux=True is for losses that do"
            raise TypeError(f"the loss returned {said}")
        value = result[0] if self.has_aux else result
        if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            kind = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
            raise TypeError(f"the loss returned {kind}, not a floating-point scalar: take its mean, for one")

    @cached_property
    def search(self) -> Callable[..., tuple[Carry, Any]]:
        """A step while masks are searched for: ``(carry, batch, teacher) -> (carry, metrics)``."""
        return jax.jit(self._search, donate_argnums=0)

    @cached_property
    def tune(self) -> Callable[..., tuple[Carry, Any]]:
        """A step under settled masks."""
        return jax.jit(self._tune, donate_argnums=0)

    @cached_property
    def update(self) -> Callable[[Carry], Carry]:
        """The method's rarer work."""

        def update(carry: Carry) -> Carry:
            state = self.method.update(self.plan, carry["method"], carry["trained"], carry["step"])
            return {**carry, "method": state}

        return jax.jit(update)

    @cached_property
    def settle(self) -> Callable[[Carry], Carry]:
        """From searching to settled masks."""

        def settle(carry: Carry) -> Carry:
            keep, trained = self.method.settle(self.plan, carry["method"], carry["trained"])
            return {**carry, "trained": trained, "method": {"keep": keep}}

        return jax.jit(settle)

    def _search(self, carry: Carry, batch: Any, teacher: Any) -> tuple[Carry, Any]:
        method, plan, state = self.method, self.plan, carry["method"]
        key = jax.random.fold_in(jax.random.wrap_key_data(carry["key"], impl=self.key_impl), carry["step"])
        learned = {name: state[name] for name in method.learned}

        def objective(trained: Any, learned: Any) -> tuple[Any, Any]:
            now = {**state, **learned}
            z = method.gates(plan, now, key)
            task, aux = self._task(carry, trained, z, batch, teacher, method.straight)
            return task + method.penalty(plan, now, carry["step"]).astype(task.dtype), (task, aux)

        (_, (task, aux)), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            carry["trained"], learned
        )
        entries = plan.units.entries(carry["trained"])
        slopes = plan.units.entries(gradients[0])
        pairs = {i: (entries[i], slopes[i]) for i in entries}
        new = {
            **self._moved(carry, gradients[0], aux),
            "method": method.learn(plan, state, gradients[1], pairs, carry["step"]),
        }
        new["trained"] = method.pull(plan, state, new["trained"])
        metrics = {"loss": task, **method.report(plan, state), **_scalars(aux, self._carried)}
        return _guarded(carry, new, (task, gradients)), metrics

    def _tune(self, carry: Carry, batch: Any, teacher: Any) -> tuple[Carry, Any]:
        z = carry["method"]["keep"].astype(jnp.float32)

        def objective(trained: Any) -> tuple[Any, Any]:
            return self._task(carry, trained, z, batch, teacher, False)

        (task, aux), gradients = jax.value_and_grad(objective, has_aux=True)(carry["trained"])
        new = self._moved(carry, gradients, aux)
        metrics = {"loss": task, **_scalars(aux, self._carried)}
        return _guarded(carry, new, (task, gradients)), metrics

    def _task(self, carry: Carry, trained: Any, z: Any, batch: Any, teacher: Any, straight: bool) -> tuple[Any, Any]:
        """The loss under gates, distillation included, and the loss function's second result."""
        masked = self._leaves.multiply(trained, self.plan.units.spread(z), straight)
        params = self._leaves.merge(masked, carry["rest"])
        result = self.loss(params, batch)
        task, aux = result if self.has_aux else (result, None)
        if (distill := self.distillation) is not None:
            taught = self._leaves.whole(teacher)
            task = (1 - distill.weight) * task + distill.weight * distill.loss(params, taught, batch)
        return task, aux

    def _moved(self, carry: Carry, gradients: Any, aux: Any) -> Carry:
        """The carry after the optimizer's step."""
        updates, optimizer = self.optimizer.update(gradients, carry["optimizer"], carry["trained"])
        return {
            **carry,
            "trained": optax.apply_updates(carry["trained"], updates),
            "rest": self._rest(carry["rest"], aux),
            "optimizer": optimizer,
            "step": carry["step"] + 1,
        }

    @cached_property
    def _collections(self) -> list[Any]:
        """The collection of each leaf that is not trained, None for parameters that are no variables dictionary."""
        leaves = self._leaves
        template = leaves.treedef.unflatten(range(len(leaves.paths)))
        if not is_variables(template):
            return [None] * len(leaves.others)
        return [collection(leaves.paths[i]) for i in leaves.others]

    @cached_property
    def _carried(self) -> frozenset[Any]:
        return frozenset(c for c in self._collections if c is not None and c != "params")

    def _rest(self, rest: list[Any], aux: Any) -> list[Any]:
        """What is not trained, with the collections that the loss returned in place of the old ones."""
        if not isinstance(aux, Mapping) or not self._carried.intersection(aux):
            return rest
        new = list(rest)
        for name in self._carried.intersection(aux):
            places = [i for i, c in enumerate(self._collections) if c == name]
            leaves = jax.tree.leaves(aux[name])
            if [jnp.shape(x) for x in leaves] != [jnp.shape(rest[i]) for i in places]:
                raise ValueError(
                    f"the loss returned a collection {name!r} of another structure than the one it was given"
                )
            for i, leaf in zip(places, leaves):
                new[i] = leaf.astype(rest[i].dtype)
        return new


def _guarded(old: Carry, new: Carry, results: Any) -> Carry:
    """The new carry if this step and all before it were finite; else the old one, with the step noted.

    Nothing is looked at on the host: the state stays as it was before the step that failed, however late that is seen.
    """
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(results)]))
    fine = finite & (old["failed"] < 0)
    kept = jax.tree.map(lambda a, b: jnp.where(fine, b, a), old, new)
    return {**kept, "failed": jnp.where((old["failed"] < 0) & ~finite, old["step"], old["failed"])}


def _scalars(aux: Any, carried: frozenset[Any]) -> dict[str, Any]:
    """The scalars among what the loss returned besides, for the history."""
    if not isinstance(aux, Mapping):
        return {}
    return {str(k): v for k, v in aux.items() if k not in carried and hasattr(v, "shape") and v.shape == ()}
